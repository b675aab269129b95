"""bounds.onnx: a second graph beside model.onnx that proves its answers in linf, by interval arithmetic.

Between images and logits stand the balls of ``fdml.export.balls``; here are the box that they start from, and the
margin in which they end.

*Range.* Balls grow with the box. The box of all images contains every other, so a run over it at export, in which no
radius reaches LIMIT, shows that nothing overflows at any input.
"""

from typing import Any

import numpy as np

from fdml.boxed import EPS, LABEL, MARGIN, MODEL_KEY
from fdml.errors import InputError
from fdml.export.balls import TINY, UNIT, Ball, Graph, ball_after, matrix, only, refuse, share_of
from fdml.export.convert import IMAGES

LIMIT = 1e30
SLACK = 2.0**-22
"""What rounding the box itself can amount to: its ends by u each, its centre by u, its radius by u/2, and r + SLACK."""


def bounded(model: Any, sha256: str) -> Any:
    """The graph that bounds ``model``, an ONNX model as ``convert`` makes it, whose file has the hash ``sha256``.

    Inputs: ``images`` (batch, c, h, w), float32 in [0, 1], and ``eps``, a float32 scalar, the linf radius in pixel
    units; the box is what lies within eps and in [0, 1]. Outputs: ``label`` (batch), int64, the class that the network
    answers, and ``margin`` (batch), float32: over the whole box the label's logit exceeds every other by at least
    that, as it is computed exactly and as it is computed in float32. Where margin > 0 no image of the box is answered
    otherwise. It is −inf for pixels or an eps out of range.

    Raises ``InputError``, with its name, for an operator that is not covered, and for a network whose bounds over all
    images overflow.
    """
    import onnx

    graph = Graph(model)
    *body, head = model.graph.node
    if head.op_type != "Gemm" or head.output[0] != model.graph.output[0].name:
        refuse(head, "the last operator must be a Gemm that gives the logits")
    graph.balls[IMAGES] = _box(graph)
    for node in body:
        graph.balls[node.output[0]] = ball_after(graph, node)
    rounding = _margin(graph, head)
    _sign(graph.model, sha256)
    onnx.checker.check_model(graph.model, full_check=True)
    _check_range(graph.model, [*(ball.radius for ball in graph.balls.values()), rounding])
    return graph.model


def _box(graph: Graph) -> Ball:
    """The images within eps that lie in [0, 1]."""
    zero, one, half = map(graph.constant, (0, 1, 0.5))
    ends = [graph.node("Clip", graph.node(kind, IMAGES, EPS), zero, one) for kind in ("Sub", "Add")]
    low, high = (graph.node("Mul", end, half) for end in ends)
    radius = graph.node("Add", graph.node("Sub", high, low), graph.constant(SLACK))
    return Ball(graph.node("Add", low, high), radius)


def _margin(graph: Graph, head: Any) -> str:
    """The last layer, merged with the differences of classes: (W_y − W_j) c + b_y − b_j − |W_y − W_j| r, less what the
    network's own rounding of the two logits can be.

    In float64, where nothing of it is large; its rounding is a small part of the spare ones of float32. Gives the name
    of what is taken off for each class.
    """
    add = graph.node
    weight, bias = matrix(graph, head)
    ball = only(graph, head)
    classes = len(weight)
    double = {"to": 11}
    centre, radius = (add("Cast", end, **double) for end in (ball.centre, ball.radius))
    rows, shifts = graph.constant(weight, np.float64), graph.constant(bias, np.float64)
    second, third = graph.constant([1], np.int64), graph.constant([2], np.int64)

    label = add("ArgMax", head.output[0], axis=1, keepdims=0)
    differences = add("Sub", add("Unsqueeze", add("Gather", rows, label), second), rows)
    shift = add("Sub", add("Unsqueeze", add("Gather", shifts, label), second), shifts)
    nominal = add("MatMul", differences, add("Unsqueeze", centre, third))
    loss = add("MatMul", add("Abs", differences), add("Unsqueeze", radius, third))
    plain = add("Add", add("Squeeze", add("Sub", nominal, loss), third), shift)

    share = share_of(weight.shape[1])
    size = add("MatMul", add("Add", add("Abs", centre), radius), graph.constant(share * np.abs(weight.T), np.float64))
    rounding = add("Add", size, graph.constant(share * np.abs(bias) + TINY, np.float64))
    own = add("GatherElements", rounding, add("Unsqueeze", label, second), axis=1)
    # The label is compared with the other classes only.
    other = add("OneHot", label, graph.constant([classes], np.int64), graph.constant([0, LIMIT]), axis=1)
    margins = add("Add", add("Sub", add("Sub", plain, rounding), own), add("Cast", other, **double))
    lowest = add("ReduceMin", margins, second, keepdims=0)
    safe = add("Sub", lowest, add("Mul", add("Abs", lowest), graph.constant(4 * UNIT, np.float64)))

    inside = add("Equal", IMAGES, add("Clip", IMAGES, graph.constant(0), graph.constant(1)))
    axes = graph.constant([1, 2, 3], np.int64)
    inside = add("ReduceMin", add("Cast", inside, to=1), axes, keepdims=0)
    allowed = add("And", add("Cast", inside, to=9), add("GreaterOrEqual", EPS, graph.constant(0)))
    margin = add("Where", allowed, add("Cast", safe, to=1), graph.constant(-np.inf))
    for found, name in ((label, LABEL), (margin, MARGIN)):
        add("Identity", found)
        graph.model.graph.node[-1].output[0] = name
    return rounding


def _sign(model: Any, sha256: str) -> None:
    """The inputs and outputs, and which network this bounds."""
    from onnx import TensorProto, helper

    graph = model.graph
    batch = graph.input[0].type.tensor_type.shape.dim[0].dim_param or "batch"
    graph.input.append(helper.make_tensor_value_info(EPS, TensorProto.FLOAT, []))
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info(LABEL, TensorProto.INT64, [batch]))
    graph.output.append(helper.make_tensor_value_info(MARGIN, TensorProto.FLOAT, [batch]))
    entry = model.metadata_props.add()
    entry.key, entry.value = MODEL_KEY, sha256


def _check_range(model: Any, radii: list[str]) -> None:
    """Raises ``InputError`` where a radius over the box of all images is not below ``LIMIT``."""
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper

    opened = onnx.ModelProto()
    opened.CopyFrom(model)
    kinds = [TensorProto.FLOAT] * (len(radii) - 1) + [TensorProto.DOUBLE]
    outputs = map(helper.make_tensor_value_info, radii, kinds, [None] * len(radii))
    opened.graph.output.extend(outputs)
    session = onnxruntime.InferenceSession(opened.SerializeToString(), providers=["CPUExecutionProvider"])
    shape = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim[1:]]
    images = np.full((1, *shape), 0.5, np.float32)
    for value in session.run(radii, {IMAGES: images, EPS: np.array(0.5, np.float32)}):
        if not (np.asarray(value) < LIMIT).all():
            raise InputError("--bounds: interval bounds of this network overflow: they say nothing of it; train by ibp")
