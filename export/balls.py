"""Balls around the values of an ONNX network, operator by operator, as further nodes of its graph.

A ball is a centre c and a radius r: for each image of a box the value lies in [c − r, c + r], whether it is computed
exactly or in float32, its sums in any order, its products fused or not. What holds for all of these holds for the
network as it is served.

*Sums.* A sum of n products and a bias in float32 is off by at most γ·(|W||x| + |b|), where γ = m·u / (1 − m·u),
u = 2⁻²⁴ and m counts the roundings that a term passes through, in any order at most n + 1 (Higham 2002, sections 3.1
and 8.1). Here m has SPARE more, for what ONNX Runtime's optimiser rounds otherwise: a scale folded into the weights, a
following sum fused with a convolution. One γ is for the network, one for our own centre, one for the radius's own
computation, and the roundings within it are paid by the spare ones:

    c' = W c + b        r' = |W| (r + 3γ (|c| + r)) + 3γ |b| + TINY

TINY covers products that underflow, gradually as is the default. No algorithm that multiplies sums of inputs by sums
of weights (Winograd's) may be used; ONNX Runtime has none on a CPU, which a test looks at.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from fdml.errors import InputError
from fdml.export.convert import opset

UNIT = 2.0**-24
SPARE = 16
TINY = 2.0**-100


@dataclass(frozen=True)
class Ball:
    """The names of a centre and a radius, and the number of roundings in the sum that they came out of, with which a
    following sum may be fused."""

    centre: str
    radius: str
    terms: int = 0


class Graph:
    """The network's own graph, its constants, and the nodes that are added to it."""

    def __init__(self, model: Any) -> None:
        import onnx
        from onnx import numpy_helper

        if opset(model) < 18:
            raise InputError(f"the model is of opset {opset(model)}: bounds need 18 or more; export it anew")
        self.model = onnx.ModelProto()
        self.model.CopyFrom(model)
        self.constants = {entry.name: numpy_helper.to_array(entry) for entry in model.graph.initializer}
        self.balls: dict[str, Ball] = {}
        inferred = onnx.shape_inference.infer_shapes(model).graph
        self.shapes = {
            value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
            for value in [*inferred.input, *inferred.value_info]
        }

    def node(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Adds a node; the name of its output."""
        from onnx import helper

        name = f"bounds/{len(self.model.graph.node)}"
        self.model.graph.node.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def like(self, node: Any, *inputs: str) -> str:
        """Adds ``node`` once more, on other inputs."""
        name = self.node(node.op_type, *inputs)
        self.model.graph.node[-1].attribute.extend(node.attribute)
        return name

    def constant(self, value: Any, dtype: type = np.float32) -> str:
        from onnx import numpy_helper

        name = f"bounds/constant/{len(self.model.graph.initializer)}"
        self.model.graph.initializer.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def spread(self, ball: Ball, share: float) -> str:
        """r + share·(|c| + r)"""
        size = self.node("Add", self.node("Abs", ball.centre), ball.radius)
        return self.node("Add", ball.radius, self.node("Mul", size, self.constant(share)))


def ball_after(graph: Graph, node: Any) -> Ball:
    """Adds the nodes that bound the output of ``node``; its ball. Raises ``InputError`` for what is not covered."""
    if node.domain not in ("", "ai.onnx") or node.op_type not in _LOWERED:
        refuse(node, "bounds do not cover this operator")
    return _LOWERED[node.op_type](graph, node)


def refuse(node: Any, why: str) -> NoReturn:
    raise InputError(f"--bounds: {node.op_type} node {node.output[0]}: {why}; export without --bounds")


def share_of(terms: int) -> float:
    """3γ for a sum of so many products."""
    roundings = (terms + 1 + SPARE) * UNIT
    if roundings > 0.01:
        raise InputError(f"--bounds: a sum of {terms:,} products is too long for bounds in float32")
    return 3 * roundings / (1 - roundings)


def _attributes(node: Any) -> dict[str, Any]:
    from onnx import helper

    return {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}


def _constant(graph: Graph, node: Any, place: int) -> np.ndarray:
    if node.input[place] not in graph.constants:
        refuse(node, f"its input {node.input[place]} is no constant of the file")
    return graph.constants[node.input[place]]


def only(graph: Graph, node: Any) -> Ball:
    """The ball of the first input."""
    if node.input[0] not in graph.balls:
        refuse(node, f"its input {node.input[0]} does not depend on the images")
    return graph.balls[node.input[0]]


def _weighted(graph: Graph, node: Any, terms: int, outputs: int) -> Ball:
    """W x + b: the weights are the second input, a bias of as many values as ``outputs`` may be the third."""
    ball, share = only(graph, node), share_of(terms)
    biased = len(node.input) > 2 and node.input[2]
    bias = np.abs(_constant(graph, node, 2)).astype(np.float64) if biased else np.zeros(outputs)
    radius = graph.like(
        node,
        graph.spread(ball, share),
        graph.node("Abs", node.input[1]),
        graph.constant(share * bias + TINY),
    )
    return Ball(graph.like(node, ball.centre, *node.input[1:]), radius, terms)


def _conv(graph: Graph, node: Any) -> Ball:
    weight = _constant(graph, node, 1)
    return _weighted(graph, node, math.prod(weight.shape[1:]), len(weight))


def _gemm(graph: Graph, node: Any) -> Ball:
    weight, _ = matrix(graph, node)
    return _weighted(graph, node, weight.shape[1], len(weight))


def matrix(graph: Graph, node: Any) -> tuple[np.ndarray, np.ndarray]:
    """The weights (outputs, inputs) of a Gemm and its bias (outputs), in float64."""
    how = _attributes(node)
    if how.get("transA", 0) or how.get("alpha", 1.0) != 1 or how.get("beta", 1.0) != 1:
        refuse(node, "transA, alpha and beta are not covered")
    weight = _constant(graph, node, 1).astype(np.float64)
    weight = weight if how.get("transB", 0) else weight.T
    bias = _constant(graph, node, 2) if len(node.input) > 2 and node.input[2] else np.zeros(())
    if bias.size not in (1, len(weight)):
        refuse(node, "a bias that differs between the images of a batch is not covered")
    return weight, np.broadcast_to(bias.astype(np.float64).reshape(-1), len(weight))


def _mean(graph: Graph, node: Any) -> Ball:
    """Means of so many values: weights that need no constants, as they are positive and alike for centre and radius."""
    how, shape = _attributes(node), graph.shapes[node.input[0]]
    if node.op_type == "AveragePool":
        terms = math.prod(how["kernel_shape"])
    else:
        axes = range(2, len(shape))
        if node.op_type == "ReduceMean":
            axes = _constant(graph, node, 1).reshape(-1).tolist() if len(node.input) > 1 else []
        sizes = [shape[axis] for axis in axes]
        if not sizes or not all(sizes):
            refuse(node, "the mean must be over axes of known size")
        terms = math.prod(sizes)
    ball = only(graph, node)
    radius = graph.like(node, graph.spread(ball, share_of(terms)), *node.input[1:])
    return Ball(graph.like(node, ball.centre, *node.input[1:]), radius, terms)


def _relu(graph: Graph, node: Any) -> Ball:
    # Each end, the centre and the radius are off by a rounding of at most the upper end: 16 u of its half cover them.
    ball, half = only(graph, node), graph.constant(0.5)
    low, high = (
        graph.node("Mul", graph.node("Relu", graph.node(kind, ball.centre, ball.radius)), half)
        for kind in ("Sub", "Add")
    )
    radius = graph.node("Sub", graph.node("Mul", high, graph.constant(1 + 16 * UNIT)), low)
    return Ball(graph.node("Add", low, high), radius)


def _sum(graph: Graph, node: Any) -> Ball:
    """A sum or difference of two values, or of one and a constant."""
    balls = [graph.balls.get(name) for name in node.input]
    terms = 1 + sum(ball.terms for ball in balls if ball is not None)
    share = share_of(terms)
    centres, spreads = [], []
    for place, ball in enumerate(balls):
        if ball is not None:
            centres.append(ball.centre)
            spreads.append(graph.spread(ball, share))
        else:
            size = np.abs(_constant(graph, node, place)).astype(np.float64)
            centres.append(node.input[place])
            spreads.append(graph.constant(share * size + TINY))
    return Ball(graph.like(node, *centres), graph.node("Add", *spreads), terms)


def _scale(graph: Graph, node: Any) -> Ball:
    """A product with a constant, or a quotient by one."""
    place = 0 if node.input[0] in graph.balls else 1
    ball = graph.balls.get(node.input[place])
    if ball is None or (node.op_type == "Div" and place == 1):
        refuse(node, "a product with a constant or a quotient by one is covered")
    _constant(graph, node, 1 - place)
    factor = node.input[1 - place]
    centre = graph.like(node, *((ball.centre, factor) if place == 0 else (factor, ball.centre)))
    terms = ball.terms + 1
    radius = graph.node(node.op_type, graph.spread(ball, share_of(terms)), graph.node("Abs", factor))
    return Ball(centre, graph.node("Add", radius, graph.constant(TINY)), terms)


def _normalised(graph: Graph, node: Any) -> Ball:
    """BatchNormalization in inference, as scale · x + shift."""
    ball = only(graph, node)
    weight, bias, mean, var = (_constant(graph, node, place).astype(np.float64) for place in range(1, 5))
    scale = weight / np.sqrt(var + _attributes(node).get("epsilon", 1e-5))
    terms = ball.terms + 1
    share = share_of(terms)
    along = (-1, *[1] * (len(graph.shapes[node.input[0]]) - 2))

    def affine(x: str, factor: np.ndarray, shift: np.ndarray) -> str:
        scaled = graph.node("Mul", x, graph.constant(factor.reshape(along)))
        return graph.node("Add", scaled, graph.constant(shift.reshape(along)))

    # The shift is a difference that may cancel: what it is made of is what rounding is measured by.
    size = np.abs(bias) + np.abs(mean * scale)
    radius = affine(graph.spread(ball, share), np.abs(scale), share * size + TINY)
    return Ball(affine(ball.centre, scale, bias - mean * scale), radius, terms)


def _same(graph: Graph, node: Any) -> Ball:
    """What moves values and computes none."""
    ball = only(graph, node)
    centre, radius = (graph.like(node, each, *node.input[1:]) for each in (ball.centre, ball.radius))
    return Ball(centre, radius, ball.terms)


_LOWERED: dict[str, Callable[[Graph, Any], Ball]] = {
    "Conv": _conv,
    "Gemm": _gemm,
    "BatchNormalization": _normalised,
    "Relu": _relu,
    **dict.fromkeys(("Add", "Sub"), _sum),
    **dict.fromkeys(("Mul", "Div"), _scale),
    **dict.fromkeys(("ReduceMean", "GlobalAveragePool", "AveragePool"), _mean),
    **dict.fromkeys(("Flatten", "Reshape", "Transpose", "Identity"), _same),
}
