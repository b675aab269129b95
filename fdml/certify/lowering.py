"""ONNX to our own nodes: one function for each operator that bounds cover."""

import gzip
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fdml.certify.graph import Node
from fdml.certify.operators import (
    Activation,
    Concat,
    Conv,
    Dense,
    Operator,
    Permute,
    Reduce,
    Scale,
    Select,
    Sum,
    View,
)
from fdml.errors import InputError

FILE_LIMIT = 2**31  # a protocol buffer cannot be longer
VALUE_LIMIT = 10**8  # elements of one value or constant
NODE_LIMIT = 100_000

FOLDABLE = {
    "Abs", "Add", "And", "Cast", "CastLike", "Ceil", "Clip", "Concat", "ConstantOfShape", "Div", "Equal", "Expand",
    "Exp", "Flatten", "Floor", "Gather", "Gemm", "Greater", "Identity", "Less", "MatMul", "Max", "Min", "Mod", "Mul",
    "Neg", "Not", "Or", "Pow", "Range", "Reciprocal", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd",
    "ReduceSum", "Relu", "Reshape", "Shape", "Sigmoid", "Size", "Slice", "Split", "Sqrt", "Squeeze", "Sub", "Tanh",
    "Tile", "Transpose", "Unsqueeze", "Where",
}  # fmt: skip
"""Operators that are evaluated where all inputs are constants."""


@dataclass(frozen=True)
class Value:
    """The node at ``index`` of the list, of the shape that ONNX gives it for a batch of one."""

    index: int
    shape: tuple[int, ...]


Operand = Value | np.ndarray
Attributes = dict[str, Any]


@dataclass
class Builder:
    """The nodes so far, and their arithmetic."""

    nodes: list[Node] = field(default_factory=list)
    opset: int = 0

    def emit(self, operator: Operator | None, inputs: Sequence[Value], shape: Sequence[int]) -> Value:
        shape = tuple(int(size) for size in shape)
        if not 0 < prod(shape) <= VALUE_LIMIT:
            raise Refused(f"a value of shape {list(shape)} is out of range")
        self.nodes.append(Node(operator, tuple(value.index for value in inputs), shape))
        return Value(len(self.nodes) - 1, shape)

    def view(self, x: Value, shape: Sequence[int]) -> Value:
        if prod(shape) != prod(x.shape):
            raise Refused(f"{list(x.shape)} cannot take the shape {list(shape)}")
        return x if tuple(shape) == x.shape else self.emit(View(x.shape, tuple(map(int, shape))), [x], shape)

    def permute(self, x: Value, order: Sequence[int]) -> Value:
        return self.emit(Permute(tuple(order)), [x], [x.shape[axis] for axis in order])

    def select(self, x: Value, index: np.ndarray) -> Value:
        return self.emit(Select(torch.from_numpy(index.astype(np.int64)), x.shape), [x], index.shape)

    def expand(self, x: Value, shape: Sequence[int]) -> Value:
        if x.shape == tuple(shape):
            return x
        return self.select(x, np.broadcast_to(places(x), shape))

    def scale(self, x: Value, scale: np.ndarray | float, shift: np.ndarray | float) -> Value:
        """scale · x + shift, broadcast as numpy does."""
        scale, shift = np.asarray(scale, np.float64), np.asarray(shift, np.float64)
        x = self.expand(x, np.broadcast_shapes(x.shape, scale.shape, shift.shape))
        constants = [tensor(c.reshape([1] * (len(x.shape) - c.ndim) + list(c.shape))) for c in (scale, shift)]
        return self.emit(Scale(*constants), [x], x.shape)

    def sum(self, one: Value, other: Value, sign: int = 1) -> Value:
        shape = np.broadcast_shapes(one.shape, other.shape)
        return self.emit(Sum((1, sign)), [self.expand(one, shape), self.expand(other, shape)], shape)

    def activation(self, kind: str, x: Value) -> Value:
        return self.emit(Activation(kind), [x], x.shape)

    def sloped(self, x: Value, slope: np.ndarray) -> Value:
        """slope · x below 0, x above: slope · x + (1 − slope) · relu(x)."""
        return self.sum(self.scale(x, slope, 0), self.scale(self.activation("relu", x), 1 - slope, 0))

    def maximum(self, one: Operand, other: Operand) -> Value:
        """b + relu(a − b): exact, and a split of its relu decides it."""
        if not isinstance(one, Value):
            one, other = other, one
        assert isinstance(one, Value)
        if not isinstance(other, Value):
            return self.scale(self.activation("relu", self.scale(one, 1, -other)), 1, other)
        return self.sum(other, self.activation("relu", self.sum(one, other, -1)))

    def dense(self, x: Value, weight: np.ndarray, bias: np.ndarray) -> Value:
        if not x.shape or x.shape[-1] != weight.shape[1]:
            raise Refused(f"a matrix of {weight.shape[1]} columns meets a value of shape {list(x.shape)}")
        bias = np.broadcast_to(bias, weight.shape[:1])
        return self.emit(Dense(tensor(weight), tensor(bias)), [x], [*x.shape[:-1], len(weight)])


class Refused(Exception):  # noqa: N818 — becomes an InputError with the node's name
    """What this node asks for is not covered."""


def tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(array, np.float64))


def places(x: Value) -> np.ndarray:
    """The index of each element, in the shape of the value."""
    return np.arange(prod(x.shape)).reshape(x.shape)


def integers(value: Operand | Sequence[int]) -> list[int]:
    if isinstance(value, Value):
        raise Refused("its shape or axes depend on the input")
    return [int(item) for item in np.asarray(value).reshape(-1)]


def lower(source: Path | bytes) -> tuple[list[Node], str]:
    """The nodes of an ONNX model for one example, and what to call the model. Raises ``InputError``."""
    import onnx
    from onnx import numpy_helper

    what = str(source) if isinstance(source, Path) else "the ONNX model"
    model = _parse(source, what)
    graph = model.graph
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    opset = opsets.get("", opsets.get("ai.onnx", 0))
    if not 7 <= opset <= 30:
        raise InputError(f"{what}: opset {opset} is not read; 8 to 21 are known")
    if len(graph.node) > NODE_LIMIT:
        raise InputError(f"{what}: {len(graph.node):,} nodes, more than {NODE_LIMIT:,}")
    values: dict[str, Operand] = {}
    for entry in graph.initializer:
        if entry.data_location == onnx.TensorProto.EXTERNAL or entry.external_data:
            raise InputError(f"{what}: initializer {entry.name} is in another file; one file is needed")
        try:
            values[entry.name] = numpy_helper.to_array(entry)
        except Exception as error:  # whatever a broken tensor makes of numpy
            raise InputError(f"{what}: initializer {entry.name} is broken: {str(error)[:150]}") from None
    builder = Builder(opset=opset)
    entries = [entry for entry in graph.input if entry.name not in values]
    if len(entries) != 1 or len(graph.output) != 1:
        raise InputError(f"{what}: one input and one output are needed, not {len(entries)} and {len(graph.output)}")
    try:
        values[entries[0].name] = builder.emit(None, [], _shape_of(entries[0]))
    except Refused as error:
        raise InputError(f"{what}: input {entries[0].name}: {error}") from None
    for node in graph.node:
        _lower_node(builder, node, values, what)
    output = values.get(graph.output[0].name)
    if not isinstance(output, Value):
        raise InputError(f"{what}: its output {graph.output[0].name} does not depend on its input")
    builder.nodes = builder.nodes[: output.index + 1]
    return builder.nodes, what


def _parse(source: Path | bytes, what: str) -> Any:
    import onnx
    from google.protobuf.message import DecodeError

    try:
        if isinstance(source, bytes):
            content = source
        elif source.suffix == ".gz":
            with gzip.open(source) as file:
                content = file.read(FILE_LIMIT)
        else:
            with source.open("rb") as file:
                content = file.read(FILE_LIMIT)
        if len(content) >= FILE_LIMIT:
            raise InputError(f"{what}: {FILE_LIMIT:,} bytes or more, but an ONNX file is smaller")
        return onnx.load_model_from_string(content)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{what}: cannot read it: {error}") from None
    except DecodeError:
        raise InputError(f"{what}: not an ONNX file") from None


def _shape_of(entry: Any) -> list[int]:
    """The input's shape, with 1 for a symbolic first axis."""
    if entry.type.tensor_type.elem_type not in (1, 11):  # float, double
        raise Refused("a floating-point tensor is needed")
    dims = entry.type.tensor_type.shape.dim
    shape = [dim.dim_value for dim in dims]
    if shape and shape[0] <= 0:
        shape[0] = 1
    if any(size <= 0 for size in shape):
        raise Refused(f"its shape is {[dim.dim_value or dim.dim_param or '?' for dim in dims]}, but one is needed")
    return shape


def _lower_node(builder: Builder, node: Any, values: dict[str, Operand], what: str) -> None:
    from onnx import helper

    title = f"{what}: {node.op_type} node {node.name or (node.output[0] if node.output else '?')}"
    inputs: list[Operand | None] = []
    for name in node.input:
        if name and name not in values:
            raise InputError(f"{title}: its input {name} is not computed before it")
        inputs.append(values[name] if name else None)
    try:
        attributes = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
        found = _result(builder, node, inputs, attributes)
    except Refused as error:
        raise InputError(f"{title}: {error}; randomised smoothing covers any network") from None
    except InputError:
        raise
    except Exception as error:  # a malformed node can make anything of any step
        raise InputError(f"{title}: cannot be read: {type(error).__name__}: {str(error)[:150]}") from None
    for name, value in zip(node.output, found, strict=False):
        values[name] = value


def _result(builder: Builder, node: Any, inputs: list[Operand | None], attributes: Attributes) -> Sequence[Operand]:
    kind = node.op_type
    if node.domain not in ("", "ai.onnx"):
        raise Refused(f"operators of {node.domain} are not covered by bounds")
    if kind == "Constant":
        return [_constant(attributes)]
    if kind == "Shape" and isinstance(inputs[0], Value):
        shape = inputs[0].shape[attributes.get("start", 0) : attributes.get("end", None)]
        return [np.array(shape, np.int64)]
    if kind in FOLDABLE and all(not isinstance(value, Value) for value in inputs):
        return _folded(node, inputs, builder.opset)  # pyright: ignore[reportArgumentType]
    if kind == "Split":
        return _split(builder, inputs, attributes, len(node.output))
    if kind not in LOWERED:
        raise Refused("bounds do not cover this operator")
    return [LOWERED[kind](builder, inputs, attributes)]


def _constant(attributes: Attributes) -> np.ndarray:
    from onnx import numpy_helper

    if "value" in attributes:
        return numpy_helper.to_array(attributes["value"])
    for name, dtype in (("value_float", np.float32), ("value_floats", np.float32), ("value_int", np.int64),
                        ("value_ints", np.int64)):  # fmt: skip
        if name in attributes:
            return np.array(attributes[name], dtype)
    raise Refused("its constant is neither a tensor nor a number")


def _folded(node: Any, inputs: list[np.ndarray | None], opset: int) -> list[np.ndarray]:
    """The node's value by ONNX's own reference; floats in float64, as all that follows."""
    from onnx import TensorProto, helper
    from onnx.reference import ReferenceEvaluator

    if node.op_type in {"ConstantOfShape", "Expand", "Tile", "Range"}:
        *_, last = (np.asarray(value) for value in inputs if value is not None)
        size = prod(max(1, int(item)) for item in last.reshape(-1)) if last.dtype.kind == "i" else VALUE_LIMIT
        if node.op_type == "Range":
            start, limit, delta = (float(np.asarray(value).reshape(())) for value in inputs if value is not None)
            size = (limit - start) / delta
        if node.op_type == "Tile":
            size *= np.asarray(inputs[0]).size
        if size > VALUE_LIMIT:
            raise Refused("its result is too large")
    names = {name: value for name, value in zip(node.input, inputs, strict=True) if name}
    empty = [helper.make_tensor_value_info(name, TensorProto.UNDEFINED, None) for name in names]
    outputs = [helper.make_tensor_value_info(name, TensorProto.UNDEFINED, None) for name in node.output]
    graph = helper.make_graph([node], "constant", empty, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    return [np.asarray(value) for value in ReferenceEvaluator(model).run(None, names)]


def _add(sign: int) -> Callable[[Builder, list, Attributes], Value]:
    def lowered(builder: Builder, inputs: list, attributes: Attributes) -> Value:
        one, other = inputs
        if isinstance(other, np.ndarray):
            return builder.scale(one, 1, sign * other.astype(np.float64))
        if isinstance(one, np.ndarray):
            return builder.scale(other, sign, one)
        return builder.sum(one, other, sign)

    return lowered


def _mul(builder: Builder, inputs: list, attributes: Attributes) -> Value:
    one, other = inputs if isinstance(inputs[0], Value) else inputs[::-1]
    if isinstance(other, Value):
        raise Refused("a product of two values that both depend on the input is not covered by bounds")
    return builder.scale(one, other, 0)


def _div(builder: Builder, inputs: list, attributes: Attributes) -> Value:
    if isinstance(inputs[1], Value):
        raise Refused("a division by a value that depends on the input is not covered by bounds")
    if not np.all(inputs[1]):
        raise Refused("it divides by zero")
    return builder.scale(inputs[0], 1 / inputs[1].astype(np.float64), 0)


def _gemm(builder: Builder, inputs: list, attributes: Attributes) -> Value:
    x, weight, *rest = inputs
    if not isinstance(x, Value) or isinstance(weight, Value):
        raise Refused("its second factor and nothing else has to be a constant")
    if attributes.get("transA"):
        x = builder.permute(x, (1, 0))
    weight = np.asarray(weight, np.float64) * attributes.get("alpha", 1.0)
    weight = weight if attributes.get("transB") else weight.T
    bias = np.zeros(len(weight)) if not rest or rest[0] is None else rest[0]
    if isinstance(bias, Value):
        raise Refused("its bias depends on the input")
    bias = np.asarray(bias, np.float64) * attributes.get("beta", 1.0)
    if bias.ndim < 2 or len(bias) == 1:
        return builder.dense(x, weight, bias.reshape(-1))
    return builder.scale(builder.dense(x, weight, np.zeros(len(weight))), 1, bias)


def _matmul(builder: Builder, inputs: list, attributes: Attributes) -> Value:
    one, other = inputs
    if isinstance(one, Value) and isinstance(other, Value):
        raise Refused("a product of two values that both depend on the input is not covered by bounds")
    if isinstance(one, Value):
        if other.ndim == 1:
            y = builder.dense(one, other[None], np.zeros(1))
            return builder.view(y, y.shape[:-1])
        if other.ndim > 2:
            if prod(other.shape[:-2]) != 1:
                raise Refused("a batch of matrices is not covered")
            y = builder.dense(one, other.reshape(other.shape[-2:]).T, np.zeros(1))
            return builder.view(y, np.broadcast_shapes(y.shape, [1] * other.ndim))
        return builder.dense(one, other.T, np.zeros(1))
    if one.ndim > 2:
        raise Refused("a batch of matrices is not covered")
    matrix = np.atleast_2d(one)
    if len(other.shape) == 1:
        y = builder.dense(other, matrix, np.zeros(1))
    else:
        swap = [*range(len(other.shape) - 2), len(other.shape) - 1, len(other.shape) - 2]
        y = builder.permute(builder.dense(builder.permute(other, swap), matrix, np.zeros(1)), swap)
    if one.ndim == 2:
        return y
    return builder.view(y, y.shape[:-1] if len(other.shape) == 1 else [*y.shape[:-2], y.shape[-1]])


def _pads(attributes: Attributes, size: Sequence[int], kernel: Sequence[int], stride: Sequence[int],
          dilation: Sequence[int]) -> tuple[list[int], list[int]]:  # fmt: skip
    """Zeros before and after each spatial axis."""
    auto = attributes.get("auto_pad", b"NOTSET").decode()
    dims = len(size)
    if auto in ("NOTSET", ""):
        pads = list(attributes.get("pads", [0] * 2 * dims))
        return pads[:dims], pads[dims:]
    if auto == "VALID":
        return [0] * dims, [0] * dims
    total = [
        max(0, (-(-size[i] // stride[i]) - 1) * stride[i] + dilation[i] * (kernel[i] - 1) + 1 - size[i])
        for i in range(dims)
    ]
    small, large = [t // 2 for t in total], [t - t // 2 for t in total]
    return (small, large) if auto == "SAME_UPPER" else (large, small)


def _image(builder: Builder, x: Value) -> Value:
    """A value (1, c, w) or (1, c, h, w) as an image (1, c, h, w)."""
    if len(x.shape) not in (3, 4) or x.shape[0] != 1:
        raise Refused(f"its input has the shape {list(x.shape)}, but (1, c, w) or (1, c, h, w) is covered")
    return x if len(x.shape) == 4 else builder.view(x, (*x.shape[:2], 1, x.shape[2]))


def _padded(builder: Builder, x: Value, before: Sequence[int], after: Sequence[int]) -> Value:
    """``x`` with zeros before and after each of its axes; negative counts cut."""
    if not any(before) and not any(after):
        return x
    index = places(x)
    cut = tuple(slice(max(0, -b), size - max(0, -a)) for b, a, size in zip(before, after, x.shape, strict=True))
    widths = [(max(0, b), max(0, a)) for b, a in zip(before, after, strict=True)]
    if prod(size + sum(pair) for size, pair in zip(x.shape, widths, strict=True)) > VALUE_LIMIT:
        raise Refused("its padding is out of range")
    return builder.select(x, np.pad(index[cut], widths, constant_values=-1))


def _convolution(builder: Builder, x: Value, weight: np.ndarray, bias: np.ndarray, attributes: Attributes) -> Value:
    """With a kernel of two spatial axes; the attributes have as many entries."""
    stride = list(attributes.get("strides", (1, 1)))
    dilation = list(attributes.get("dilations", (1, 1)))
    before, after = _pads(attributes, x.shape[2:], weight.shape[2:], stride, dilation)
    padding = [min(b, a) for b, a in zip(before, after, strict=True)]
    x = _padded(
        builder,
        x,
        [0, 0, *(b - p for b, p in zip(before, padding, strict=True))],
        [0, 0, *(a - p for a, p in zip(after, padding, strict=True))],
    )
    groups = attributes.get("group", 1)
    if weight.shape[1] * groups != x.shape[1]:
        raise Refused(f"{x.shape[1]} channels meet a kernel {list(weight.shape)} in {groups} groups")
    size = [
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i] + 1 for i in (0, 1)
    ]
    operator = Conv(
        tensor(weight),
        tensor(bias),
        (stride[0], stride[1]),
        (padding[0], padding[1]),
        (dilation[0], dilation[1]),
        groups,
        (x.shape[2], x.shape[3]),
    )
    return builder.emit(operator, [x], [1, weight.shape[0], *size])


def _flat_attributes(attributes: Attributes) -> Attributes:
    """Those of one spatial axis as those of two, of which the first has size 1."""
    found = dict(attributes)
    for name, filler in (("strides", 1), ("dilations", 1), ("kernel_shape", 1)):
        if name in found:
            found[name] = [filler, *found[name]]
    if "pads" in found:
        found["pads"] = [0, found["pads"][0], 0, found["pads"][1]]
    return found


def _conv(builder: Builder, inputs: list, attributes: Attributes) -> Value:
    x, weight, *rest = inputs
    if not isinstance(x, Value) or any(isinstance(value, Value) for value in inputs[1:]):
        raise Refused("its kernel depends on the input")
    image = _image(builder, x)
    if len(x.shape) == 3:
        weight, attributes = weight[:, :, None], _flat_attributes(attributes)
    bias = rest[0] if rest and rest[0] is not None else np.zeros(len(weight))
    y = _convolution(builder, image, weight, bias, attributes)
    return y if len(x.shape) == 4 else builder.view(y, (*y.shape[:2], y.shape[3]))


def _normalised(builder: Builder, inputs: list, attributes: Attributes) -> Value:
    x, *constants = inputs
    if attributes.get("training_mode"):
        raise Refused("a normalisation in training mode is no function of its input alone")
    gain, shift, mean, variance = (np.asarray(value, np.float64) for value in constants)
    scale = gain / np.sqrt(variance + attributes.get("epsilon", 1e-5))
    shape = [-1] + [1] * (len(x.shape) - 2)
    return builder.scale(x, scale.reshape(shape), (shift - mean * scale).reshape(shape))


def _average_pool(builder: Builder, inputs: list, attributes: Attributes) -> Value:
    (x,) = inputs
    image = _image(builder, x)
    if len(x.shape) == 3:
        attributes = _flat_attributes(attributes)
    kernel = attributes["kernel_shape"]
    if attributes.get("ceil_mode") or any(step != 1 for step in attributes.get("dilations", (1, 1))):
        raise Refused("ceil_mode and dilations are not covered")
    channels = image.shape[1]
    ones = np.ones((channels, 1, *kernel))
    y = _convolution(builder, image, ones, np.zeros(channels), {**attributes, "group": channels})
    if attributes.get("count_include_pad"):
        count = np.full((1, 1, 1, 1), prod(kernel))
    else:
        other = Builder()
        inside = other.emit(None, [], (1, 1, *image.shape[2:]))
        _convolution(other, inside, ones[:1], np.zeros(1), {**attributes, "group": 1})
        x_ones = torch.ones(1, *inside.shape, dtype=torch.float64)
        for node in other.nodes[1:]:
            x_ones = node.operator.forward(x_ones)  # pyright: ignore
        count = x_ones[0].numpy()
    y = builder.scale(y, 1 / count, 0)
    return y if len(x.shape) == 4 else builder.view(y, (*y.shape[:2], y.shape[3]))


def _max_pool(builder: Builder, inputs: list, attributes: Attributes) -> Value:
    (x,) = inputs
    image = _image(builder, x)
    if len(x.shape) == 3:
        attributes = _flat_attributes(attributes)
    kernel = attributes["kernel_shape"]
    stride = attributes.get("strides", (1, 1))
    if attributes.get("ceil_mode") or any(step != 1 for step in attributes.get("dilations", (1, 1))):
        raise Refused("ceil_mode and dilations are not covered")
    before, after = _pads(attributes, image.shape[2:], kernel, stride, (1, 1))
    index = np.pad(places(image), [(0, 0), (0, 0), (before[0], after[0]), (before[1], after[1])], constant_values=-1)
    windows = np.lib.stride_tricks.sliding_window_view(index, kernel, (2, 3))[:, :, :: stride[0], :: stride[1]]
    windows = windows.reshape(*windows.shape[:4], -1)
    # A place outside the image repeats one inside; the maximum stays.
    windows = np.where(windows < 0, windows.max(-1, keepdims=True), windows)
    parts = [builder.select(image, windows[..., i]) for i in range(windows.shape[-1])]
    while len(parts) > 1:
        pairs = [builder.maximum(one, other) for one, other in zip(parts[::2], parts[1::2], strict=False)]
        parts = pairs + parts[2 * len(pairs) :]
    y = parts[0]
    return y if len(x.shape) == 4 else builder.view(y, (*y.shape[:2], y.shape[3]))


def _axes(x: Value, axes: Sequence[int]) -> list[int]:
    if any(not -len(x.shape) <= axis < len(x.shape) for axis in axes):
        raise Refused(f"axes {list(axes)} do not fit the shape {list(x.shape)}")
    return sorted({axis % len(x.shape) for axis in axes})


def _reduce(mean: bool) -> Callable[[Builder, list, Attributes], Value]:
    def lowered(builder: Builder, inputs: list, attributes: Attributes) -> Value:
        x = inputs[0]
        given = inputs[1] if len(inputs) > 1 and inputs[1] is not None else attributes.get("axes")
        if (given is None or not len(given)) and attributes.get("noop_with_empty_axes"):
            return x
        axes = _axes(x, integers(given) if given is not None and len(given) else range(len(x.shape)))
        y = builder.emit(Reduce(tuple(axes), x.shape), [x], [1 if i in axes else s for i, s in enumerate(x.shape)])
        if mean:
            y = builder.scale(y, 1 / prod(x.shape[axis] for axis in axes), 0)
        if attributes.get("keepdims", 1):
            return y
        return builder.view(y, [size for i, size in enumerate(x.shape) if i not in axes])

    return lowered


def _global_average(builder: Builder, inputs: list, attributes: Attributes) -> Value:
    return _reduce(mean=True)(builder, inputs, {"axes": list(range(2, len(inputs[0].shape)))})


def _flatten(builder: Builder, inputs: list, attributes: Attributes) -> Value:
    (x,) = inputs
    axis = attributes.get("axis", 1)
    axis = axis + len(x.shape) if axis < 0 else axis
    return builder.view(x, (prod(x.shape[:axis]), prod(x.shape[axis:])))


def _reshape(builder: Builder, inputs: list, attributes: Attributes) -> Value:
    x = inputs[0]
    shape = integers(inputs[1] if len(inputs) > 1 else attributes["shape"])
    if not attributes.get("allowzero"):
        shape = [x.shape[i] if size == 0 else size for i, size in enumerate(shape)]
    if shape.count(-1) == 1:
        shape[shape.index(-1)] = prod(x.shape) // max(1, -prod(shape))
    return builder.view(x, shape)


def _transpose(builder: Builder, inputs: list, attributes: Attributes) -> Value:
    (x,) = inputs
    return builder.permute(x, attributes.get("perm", range(len(x.shape))[::-1]))


def _squeeze(builder: Builder, inputs: list, attributes: Attributes) -> Value:
    x = inputs[0]
    given = inputs[1] if len(inputs) > 1 else attributes.get("axes")
    axes = [i for i, size in enumerate(x.shape) if size == 1] if given is None else _axes(x, integers(given))
    return builder.view(x, [size for i, size in enumerate(x.shape) if i not in axes])


def _unsqueeze(builder: Builder, inputs: list, attributes: Attributes) -> Value:
    x = inputs[0]
    given = integers(inputs[1] if len(inputs) > 1 else attributes["axes"])
    dims = len(x.shape) + len(given)
    axes, rest = {axis % dims for axis in given}, iter(x.shape)
    return builder.view(x, [1 if i in axes else next(rest) for i in range(dims)])


def _slice(builder: Builder, inputs: list, attributes: Attributes) -> Value:
    x = inputs[0]
    if len(inputs) > 1:
        starts, ends, *rest = (None if value is None else integers(value) for value in inputs[1:])
    else:
        starts, ends, rest = list(attributes["starts"]), list(attributes["ends"]), [attributes.get("axes")]
    assert starts is not None
    assert ends is not None
    axes = list(rest[0]) if rest and rest[0] is not None else list(range(len(starts)))
    steps = rest[1] if len(rest) > 1 and rest[1] is not None else [1] * len(starts)
    index = places(x)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        size = index.shape[axis]
        if step < 0:  # numpy takes a negative end for one counted from the back
            end = None if end < -size else end
        window = [slice(None)] * index.ndim
        window[axis] = slice(start, end, step)
        index = index[tuple(window)]
    return builder.select(x, index)


def _gather(builder: Builder, inputs: list, attributes: Attributes) -> Value:
    x, index = inputs
    if not isinstance(x, Value) or isinstance(index, Value):
        raise Refused("its indices depend on the input")
    axis = attributes.get("axis", 0)
    return builder.select(x, np.take(places(x), index.astype(np.int64), axis))


def _concat(builder: Builder, inputs: list, attributes: Attributes) -> Value:
    values = [value for value in inputs if isinstance(value, Value)]
    axis = attributes["axis"] % len(values[0].shape)
    if len(values) == len(inputs):
        parts = values
    else:  # constants are zero times a value, shifted
        parts = []
        for value in inputs:
            if isinstance(value, np.ndarray):
                zeros = builder.select(values[0], np.full(value.shape, -1))
                value = builder.scale(zeros, 1, value)
            parts.append(value)
    sizes = tuple(part.shape[axis] for part in parts)
    shape = list(parts[0].shape)
    shape[axis] = sum(sizes)
    return builder.emit(Concat(axis, sizes), parts, shape)


def _split(builder: Builder, inputs: list, attributes: Attributes, count: int) -> list[Value]:
    x = inputs[0]
    axis = attributes.get("axis", 0) % len(x.shape)
    given = inputs[1] if len(inputs) > 1 else attributes.get("split")
    share = -(-x.shape[axis] // count)
    sizes = integers(given) if given is not None else [share] * (count - 1) + [x.shape[axis] - share * (count - 1)]
    index = np.split(places(x), np.cumsum(sizes)[:-1], axis)
    return [builder.select(x, part) for part in index]


def _pad(builder: Builder, inputs: list, attributes: Attributes) -> Value:
    x = inputs[0]
    pads = integers(inputs[1] if len(inputs) > 1 else attributes["pads"])
    fill = inputs[2] if len(inputs) > 2 and inputs[2] is not None else attributes.get("value", 0.0)
    if attributes.get("mode", b"constant") != b"constant" or np.any(np.asarray(fill)):
        raise Refused("only padding with zeros is covered")
    axes = integers(inputs[3]) if len(inputs) > 3 and inputs[3] is not None else list(range(len(x.shape)))
    before, after = [0] * len(x.shape), [0] * len(x.shape)
    for i, axis in enumerate(axes):
        before[axis], after[axis] = pads[i], pads[i + len(axes)]
    return _padded(builder, x, before, after)


def _same(builder: Builder, inputs: list, attributes: Attributes) -> Value:
    return inputs[0]


def _dropout(builder: Builder, inputs: list, attributes: Attributes) -> Value:
    if len(inputs) > 2 and inputs[2] is not None and np.any(np.asarray(inputs[2])):
        raise Refused("a Dropout in training mode is random")
    return inputs[0]


def _cast(builder: Builder, inputs: list, attributes: Attributes) -> Value:
    if attributes["to"] not in (1, 11):
        raise Refused("a cast of an activation to anything but float32 or float64 rounds, which bounds do not cover")
    return inputs[0]


def _activation(kind: str) -> Callable[[Builder, list, Attributes], Value]:
    return lambda builder, inputs, attributes: builder.activation(kind, inputs[0])


def _leaky(builder: Builder, inputs: list, attributes: Attributes) -> Value:
    return builder.sloped(inputs[0], np.array(attributes.get("alpha", 0.01)))


def _prelu(builder: Builder, inputs: list, attributes: Attributes) -> Value:
    if isinstance(inputs[1], Value):
        raise Refused("its slope depends on the input")
    return builder.sloped(inputs[0], inputs[1].astype(np.float64))


def _abs(builder: Builder, inputs: list, attributes: Attributes) -> Value:
    return builder.sloped(inputs[0], np.array(-1.0))


def _clip(builder: Builder, inputs: list, attributes: Attributes) -> Value:
    x, *limits = inputs
    low = limits[0] if limits else attributes.get("min")
    high = limits[1] if len(limits) > 1 else attributes.get("max")
    if isinstance(low, Value) or isinstance(high, Value):
        raise Refused("its limits depend on the input")
    if low is not None and np.isfinite(low):
        x = builder.maximum(x, np.asarray(low, np.float64))
    if high is not None and np.isfinite(high):
        x = builder.scale(builder.maximum(builder.scale(x, -1, 0), -np.asarray(high, np.float64)), -1, 0)
    return x


def _extreme(sign: int) -> Callable[[Builder, list, Attributes], Value]:
    def lowered(builder: Builder, inputs: list, attributes: Attributes) -> Value:
        constants = [np.asarray(v, np.float64) for v in inputs if not isinstance(v, Value)]
        found, *rest = [_signed(builder, v) for v in inputs if isinstance(v, Value)]
        for other in rest + [sign * c for c in constants]:
            found = builder.maximum(found, other)
        return _signed(builder, found)

    def _signed(builder: Builder, x: Value) -> Value:
        return x if sign > 0 else builder.scale(x, -1, 0)

    return lowered


LOWERED: dict[str, Callable[[Builder, list, Attributes], Value]] = {
    "Abs": _abs,
    "Add": _add(1),
    "AveragePool": _average_pool,
    "BatchNormalization": _normalised,
    "Cast": _cast,
    "Clip": _clip,
    "Concat": _concat,
    "Conv": _conv,
    "Div": _div,
    "Dropout": _dropout,
    "Flatten": _flatten,
    "Gather": _gather,
    "Gemm": _gemm,
    "GlobalAveragePool": _global_average,
    "Identity": _same,
    "LeakyRelu": _leaky,
    "MatMul": _matmul,
    "Max": _extreme(1),
    "MaxPool": _max_pool,
    "Min": _extreme(-1),
    "Mul": _mul,
    "Neg": lambda builder, inputs, attributes: builder.scale(inputs[0], -1, 0),
    "PRelu": _prelu,
    "Pad": _pad,
    "ReduceMean": _reduce(mean=True),
    "ReduceSum": _reduce(mean=False),
    "Relu": _activation("relu"),
    "Reshape": _reshape,
    "Sigmoid": _activation("sigmoid"),
    "Slice": _slice,
    "Squeeze": _squeeze,
    "Sub": _add(-1),
    "Tanh": _activation("tanh"),
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
