# ruff: noqa: E501 — a case a line reads as a table
import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper, numpy_helper

from fdml.certify.graph import Network
from fdml.certify.operators import Activation, Affine, Conv, Dense, Scale
from fdml.certify.runner import OnnxRunner
from fdml.errors import InputError

RANDOM = np.random.default_rng(1)


def normal(*shape) -> np.ndarray:
    return RANDOM.normal(size=shape).astype(np.float32)


def ints(*values) -> np.ndarray:
    return np.array(values, np.int64)


def model(shape, *nodes, opset=13, ir=8, listed=False, result=None, **constants) -> bytes:
    """Nodes (kind, inputs, outputs, attributes) from x to y."""
    made = [
        helper.make_node(kind, inputs.split(","), outputs.split(","), **more) for kind, inputs, outputs, more in nodes
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
    if listed:
        inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, c.shape) for n, c in constants.items()] + inputs
    outputs = [helper.make_tensor_value_info(result or "y", TensorProto.FLOAT, None)]
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(made, "test", inputs, outputs, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir).SerializeToString()


IMAGE = ["batch", 2, 5, 6]
CASES = {
    "conv": model(IMAGE, ("Conv", "x,w,b", "y", {"strides": [2, 1], "pads": [1, 0, 1, 0]}), w=normal(3, 2, 3, 2), b=normal(3)),
    "conv asymmetric": model(IMAGE, ("Conv", "x,w", "y", {"strides": [2, 2], "pads": [0, 1, 2, 0]}), w=normal(3, 2, 3, 3)),
    "conv dilated": model(IMAGE, ("Conv", "x,w", "y", {"dilations": [2, 2], "pads": [2, 2, 2, 2]}), w=normal(3, 2, 3, 3)),
    "conv groups": model(IMAGE, ("Conv", "x,w,b", "y", {"group": 2}), w=normal(4, 1, 2, 2), b=normal(4)),
    "conv same": model(IMAGE, ("Conv", "x,w", "y", {"auto_pad": "SAME_LOWER", "strides": [2, 2]}), w=normal(3, 2, 3, 2)),
    "conv 1d": model([1, 2, 7], ("Conv", "x,w", "y", {"strides": [2], "pads": [1, 1]}), w=normal(3, 2, 3)),
    "gemm": model([1, 4], ("Gemm", "x,w,b", "y", {"transB": 1, "alpha": 0.5, "beta": 2.0}), w=normal(3, 4), b=normal(3)),
    "gemm plain": model([1, 4], ("Gemm", "x,w", "y", {}), w=normal(4, 3)),
    "matmul": model([1, 3, 4], ("MatMul", "x,w", "y", {}), w=normal(4, 2)),
    "matmul left": model([1, 3, 4], ("MatMul", "w,x", "y", {}), w=normal(2, 3)),
    "matmul vector": model([4], ("MatMul", "x,w", "y", {}), w=normal(4, 3)),
    "matmul by vector": model([1, 4], ("MatMul", "x,w", "z", {}), ("Unsqueeze", "z,a", "y", {}), w=normal(4), a=ints(0)),
    "arithmetic": model(
        IMAGE,
        ("Sub", "x,a", "p", {}), ("Div", "p,b", "q", {}), ("Sub", "c,q", "r", {}), ("Mul", "r,b", "s", {}), ("Neg", "s", "y", {}),
        a=normal(2, 1, 1), b=normal(1, 1, 6), c=normal(5, 1),
    ),
    "broadcast": model([1, 3, 1], ("Add", "x,a", "p", {}), ("Transpose", "x", "q", {"perm": [0, 2, 1]}), ("Sub", "p,q", "y", {}), a=normal(3, 4)[:, :1]),
    "widened by a constant": model([1, 3, 1], ("Add", "x,a", "y", {}), a=normal(3, 4)),
    "batch norm": model(
        IMAGE, ("Conv", "x,w", "z", {}), ("BatchNormalization", "z,g,s,m,v", "y", {"epsilon": 0.1}),
        w=normal(3, 2, 2, 2), g=normal(3), s=normal(3), m=normal(3), v=np.abs(normal(3)),
    ),
    "average pool": model(IMAGE, ("AveragePool", "x", "y", {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 1, 1, 1]})),
    "average pool padded": model(IMAGE, ("AveragePool", "x", "y", {"kernel_shape": [3, 2], "pads": [1, 1, 1, 0], "count_include_pad": 1})),
    "max pool": model(IMAGE, ("MaxPool", "x", "y", {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 0, 1, 1]})),
    "max pool 1d": model([1, 2, 7], ("MaxPool", "x", "y", {"kernel_shape": [2], "strides": [2]})),
    "global average": model(IMAGE, ("GlobalAveragePool", "x", "y", {})),
    "reduce mean": model(IMAGE, ("ReduceMean", "x", "y", {"axes": [2, 3], "keepdims": 0})),
    "reduce sum": model(IMAGE, ("ReduceSum", "x,a", "y", {}), a=ints(-1)),
    "pad": model(IMAGE, ("Pad", "x,p", "y", {}), p=ints(0, 0, 1, 2, 0, 1, 0, -1)),
    "flatten": model(IMAGE, ("Flatten", "x", "y", {"axis": 2})),
    "reshape": model(IMAGE, ("Reshape", "x,s", "y", {}), s=ints(0, -1, 3)),
    "reshape to one": model([1, 4, 1], ("Reshape", "x,s", "y", {}), s=ints(1, 4)),
    "squeeze": model([1, 1, 3, 1], ("Squeeze", "x,a", "z", {}), ("Unsqueeze", "z,b", "y", {}), a=ints(3), b=ints(-1, 1)),
    "squeeze, old": model([1, 1, 3, 1], ("Squeeze", "x", "z", {}), ("Unsqueeze", "z", "y", {"axes": [0]}), opset=11),
    "slice": model(IMAGE, ("Slice", "x,s,e,a,t", "y", {}), s=ints(4, 0), e=ints(-99, 5), a=ints(2, -1), t=ints(-2, 3)),
    "slice, old": model(IMAGE, ("Slice", "x", "y", {"starts": [1], "ends": [3], "axes": [2]}), opset=9),
    "gather": model(IMAGE, ("Gather", "x,i", "y", {"axis": 2}), i=ints(3, 0, 3)),
    "concat": model(IMAGE, ("Neg", "x", "z", {}), ("Concat", "x,c,z", "y", {"axis": -1}), c=normal(1, 2, 5, 2)),
    "split": model(IMAGE, ("Split", "x,s", "a,b", {"axis": 3}), ("Concat", "b,a", "y", {"axis": 3}), s=ints(2, 4)),
    "identities": model(
        IMAGE, ("Identity", "x", "p", {}), ("Dropout", "p", "q", {}), ("Cast", "q", "y", {"to": TensorProto.FLOAT})
    ),
    "activations": model(IMAGE, ("Relu", "x", "p", {}), ("Sigmoid", "p", "q", {}), ("Tanh", "q", "y", {})),
    "leaky": model(IMAGE, ("LeakyRelu", "x", "p", {"alpha": 0.3}), ("PRelu", "p,s", "y", {}), s=normal(2, 1, 1)),
    "abs and clip": model(IMAGE, ("Abs", "x", "p", {}), ("Clip", "p,a,b", "y", {}), a=np.float32(0.2), b=np.float32(0.7)),
    "extremes": model(IMAGE, ("Neg", "x", "z", {}), ("Max", "x,z,c", "p", {}), ("Min", "x,p", "y", {}), c=normal(6)),
    "residual": model(
        IMAGE, ("Conv", "x,w", "p", {"pads": [1, 1, 1, 1]}), ("Relu", "p", "q", {}), ("Add", "q,x", "y", {}), w=normal(2, 2, 3, 3)
    ),
    "shape arithmetic": model(
        IMAGE, ("Shape", "x", "s", {}), ("Slice", "s,a,b", "m", {}), ("Concat", "m,r", "t", {"axis": 0}), ("Reshape", "x,t", "y", {}),
        a=ints(0), b=ints(1), r=ints(-1),
    ),
    "constants multiplied": model([1, 4], ("Mul", "w,v", "z", {}), ("MatMul", "x,z", "y", {}), w=normal(4, 3), v=normal(3)),
    "nhwc": model(
        [1, 5, 6, 2], ("Transpose", "x", "p", {"perm": [0, 3, 1, 2]}), ("Conv", "p,w", "q", {}), ("Transpose", "q", "y", {"perm": [0, 2, 3, 1]}),
        w=normal(3, 2, 2, 2),
    ),
    "listed initializer": model([1, 4], ("MatMul", "x,w", "y", {}), listed=True, ir=3, opset=8, w=normal(4, 3)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_an_operator_gives_what_onnx_runtime_gives_and_bounds_of_it(name: str) -> None:
    network, runner = Network.read(CASES[name]), OnnxRunner(CASES[name])
    x = 2 * normal(6, runner.inputs)
    found = network.forward(torch.from_numpy(x))
    np.testing.assert_allclose(found.numpy(), runner.run(x), rtol=1e-5, atol=1e-5)
    assert found.dtype == torch.float64
    _check_adjoints(network, torch.from_numpy(x).double())


def _check_adjoints(network: Network, x: torch.Tensor) -> None:
    """Of every operator: form · f(x) = back(form) · x + constant(form), and the interval and magnitude contain f."""
    values = [x.reshape(-1, *network.nodes[0].shape)]
    for node in network.nodes[1:]:
        operator = node.operator
        inputs = [values[j] for j in node.inputs]
        assert isinstance(operator, Affine | Activation)
        y = operator.forward(*inputs)
        assert y.shape[1:] == node.shape
        values.append(y)
        low, high = operator.interval(*((v - 0.1, v + 0.2) for v in inputs))
        moved = operator.forward(*(v + 0.2 * torch.rand_like(v) for v in inputs))
        assert ((low <= moved + 1e-9) & (moved <= high + 1e-9)).all()
        if isinstance(operator, Activation):
            continue
        form = torch.randn_like(y)
        found = sum((part * v).flatten(1).sum(1) for part, v in zip(operator.back(form), inputs, strict=True))
        if (constant := operator.constant(form)) is not None:
            found = found + constant
        torch.testing.assert_close(found, (form * y).flatten(1).sum(1))
        assert (operator.magnitude(*(v.abs() for v in inputs)) >= y.abs() - 1e-9).all()


def test_normalisation_is_folded_and_what_is_not_needed_is_dropped() -> None:
    network = Network.read(CASES["batch norm"])
    assert [type(node.operator) for node in network.nodes[1:]] == [Conv]
    network = Network.read(CASES["arithmetic"])
    assert [type(node.operator) for node in network.nodes[1:]] == [Scale]


@pytest.mark.parametrize("architecture", ["cnn", pytest.param("resnet18", marks=pytest.mark.slow)])
def test_our_own_models_are_read(architecture: str) -> None:
    from fdml.evaluate.session import onnx_of
    from fdml.models import build

    channels = 1 if architecture == "cnn" else 3
    options = {"width": 2} if architecture == "cnn" else {}
    made = build(
        architecture, input=(channels, 16, 16), classes=10, mean=[0.4] * channels, std=[0.2] * channels, options=options
    ).eval()
    x = torch.rand(2, channels, 16, 16)
    network = Network.read(onnx_of(made, x))
    assert {type(node.operator) for node in network.nodes} >= {Conv, Dense}
    with torch.no_grad():
        torch.testing.assert_close(network.forward(x.flatten(1)).float(), made(x), rtol=1e-4, atol=1e-4)


def test_a_gradient_passes() -> None:
    network = Network.read(CASES["residual"])
    x = torch.rand(2, network.inputs, requires_grad=True)
    network.single.forward(x).sum().backward()
    assert x.grad is not None


W = normal(4, 3)
REFUSED = {
    "softmax": (model([1, 4], ("Softmax", "x", "y", {})), r"Softmax node y: .*randomised smoothing"),
    "product": (model([1, 4], ("Mul", "x,x", "y", {})), "Mul node y: a product of two"),
    "random": (model([1, 4], ("RandomNormalLike", "x", "r", {}), ("Add", "x,r", "y", {})), "RandomNormalLike node r"),
    "missing": (model([1, 4], ("MatMul", "x,w", "y", {})), "MatMul node y: its input w is not computed before it"),
    "cycle": (model([1, 4], ("Add", "x,b", "a", {}), ("Add", "x,a", "b", {}), ("Relu", "b", "y", {})), "not computed before it"),
    "constant": (model([1, 4], ("Identity", "c", "y", {}), c=normal(3)), "does not depend on its input"),
    "shapes": (model([1, 5], ("MatMul", "x,w", "y", {}), w=W), "MatMul node y"),
    "huge": (model([1, 4], ("Pad", "x,p", "y", {}), p=ints(0, 0, 0, 10**12)), "out of range"),
    "huge constant": (model([1, 4], ("ConstantOfShape", "s", "c", {}), ("Add", "x,c", "y", {}), s=ints(10**7, 10**7)), "too large"),
    "two inputs free": (model([1, None], ("Relu", "x", "y", {})), "its shape is"),
    "integer cast": (model([1, 4], ("Cast", "x", "y", {"to": TensorProto.INT64})), "a cast"),
    "old opset": (model([1, 4], ("Relu", "x", "y", {}), opset=6), "opset 6"),
    "training": (
        model([1, 4], ("Dropout", "x,r,t", "y", {}), r=np.float32(0.5), t=np.array(True)),
        "Dropout node y: a Dropout in training mode is random",
    ),
    "domain": (model([1, 4], ("Relu", "x", "y", {"domain": "com.example"})), "com.example"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_bounded_is_refused_in_one_line(name: str) -> None:
    content, message = REFUSED[name]
    with pytest.raises(InputError, match=message) as caught:
        Network.read(content)
    assert "\n" not in str(caught.value)


def test_broken_files_are_refused(tmp_path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"not a model")
    (tmp_path / "b.onnx.gz").write_bytes(b"not compressed")
    for path in (tmp_path / "a.onnx", tmp_path / "b.onnx.gz", tmp_path / "missing.onnx"):
        with pytest.raises(InputError, match=path.name):
            Network.read(path)


def test_external_data_and_truncated_initializers_are_refused() -> None:
    import onnx

    for change, message in (("external", "another file"), ("short", "broken")):
        made = onnx.load_model_from_string(model([1, 4], ("MatMul", "x,w", "y", {}), w=W))
        tensor = made.graph.initializer[0]
        if change == "external":
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            entry = tensor.external_data.add()
            entry.key, entry.value = "location", "/etc/passwd"
        else:
            tensor.raw_data = tensor.raw_data[:-4]
        with pytest.raises(InputError, match=message):
            Network.read(made.SerializeToString())


def test_a_network_that_is_read_wrongly_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(Activation, "forward", lambda self, *xs: xs[0])
    with pytest.raises(InputError, match="differs from ONNX Runtime"):
        Network.read(model([1, 4], ("MatMul", "x,w", "z", {}), ("Relu", "z", "y", {}), w=W - 3))


def test_the_network_is_applied_by_rows() -> None:
    made = nn.Linear(3, 2).double()
    from fdml.certify.graph import Node

    network = Network((Node(None, (), (3,)), Node(Dense(made.weight.data, made.bias.data), (0,), (2,))), torch.float64)
    x = torch.randn(5, 3, dtype=torch.float64)
    torch.testing.assert_close(network(x), made(x).detach())
