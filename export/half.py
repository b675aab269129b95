"""An ONNX network in half precision, for engines that compute in the types that the file has."""

from typing import TYPE_CHECKING

from fdml.errors import InputError

if TYPE_CHECKING:
    from onnx import ModelProto, TensorProto


def halved(network: "ModelProto", precision: str) -> "ModelProto":
    """A copy of the network that computes in ``precision``, "fp16" or "bf16"; its input and output stay float32.

    Every float32 inside becomes half: weights, constants and casts. Raises ``InputError`` for a weight that is finite
    and too large for the precision. Networks with branches or loops, which hold further graphs, are not meant.
    """
    import numpy as np
    from onnx import ModelProto, TensorProto, helper, numpy_helper

    kind = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}[precision]
    dtype = helper.tensor_dtype_to_np_dtype(kind)

    def halve(tensor: "TensorProto") -> None:
        if tensor.data_type == TensorProto.FLOAT:
            found = numpy_helper.to_array(tensor)
            with np.errstate(over="ignore"):
                half = found.astype(dtype)
            if np.isfinite(found).all() and not np.isfinite(half.astype(np.float32)).all():
                raise InputError(f"{tensor.name} reaches {np.abs(found).max():g}, too large for {precision}")
            tensor.CopyFrom(numpy_helper.from_array(half, tensor.name))

    copy = ModelProto()
    copy.CopyFrom(network)
    graph = copy.graph
    for tensor in graph.initializer:
        halve(tensor)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name == "value" and attribute.HasField("t"):
                halve(attribute.t)
            elif node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
                attribute.i = kind
    del graph.value_info[:]  # they name the types from before

    images, logits = graph.input[0].name, graph.output[0].name
    taken = {name for node in graph.node for name in node.output}
    inside = {name: _free(f"{name}_{precision}", taken) for name in (images, logits)}
    for node in graph.node:
        node.input[:] = [inside.get(name, name) for name in node.input]
        node.output[:] = [inside.get(name, name) for name in node.output]
    graph.node.insert(0, helper.make_node("Cast", [images], [inside[images]], to=kind))
    graph.node.append(helper.make_node("Cast", [inside[logits]], [logits], to=TensorProto.FLOAT))
    return copy


def _free(name: str, taken: set[str]) -> str:
    return name if name not in taken else _free(f"{name}_", taken)
