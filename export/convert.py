"""A torch model as an ONNX file: normalisation inside, BatchNorm folded, any batch."""

from typing import Any

import torch
from torch import Tensor, nn

from fdml.card import KEY, Card
from fdml.errors import InputError
from fdml.evaluate.session import program
from fdml.models import Frozen, RobustModel

IMAGES, LOGITS, PIXELS = "images", "logits", "pixels"


class _Tapped(nn.Module):
    """Logits, and what the model saw on the way, as one flat tuple."""

    def __init__(self, model: RobustModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        logits, taps = self.model.outputs(images)
        return (logits, *taps.values())


def convert(model: RobustModel, card: Card, *, taps: bool = False) -> Any:
    """The ONNX model (an ``onnx.ModelProto``) of ``model`` in eval mode.

    Input ``images`` (batch, c, h, w), float32 in [0, 1]; output ``logits`` (batch, classes); the card's JSON in the
    metadata under ``fdml.card``. With ``taps`` the intermediate features are outputs as well, under their names.
    Checked by ``onnx.checker`` with full shape inference. Raises ``InputError`` for a network that cannot be exported.
    """
    import onnx

    inner = Frozen(model).model
    assert isinstance(inner, RobustModel)
    names = [LOGITS, *(inner.tap_names if taps else ())]
    form = _Tapped(inner).eval() if taps else inner
    try:
        found = program(form, torch.zeros(1, *card.input), input_names=[IMAGES], output_names=names)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise InputError(f"the model cannot be exported to ONNX: {reason}") from None
    _named(found, card)
    onnx.checker.check_model(found, full_check=True)
    return found


def raw(model: Any) -> Any:
    """The same network for bytes: input ``pixels`` (batch, h, w, c), uint8, as images lie in memory.

    The division by 255 and the move of the channels stand before what was the input.
    """
    import onnx
    from onnx import TensorProto, helper

    found = onnx.ModelProto()
    found.CopyFrom(model)
    graph = found.graph
    batch, c, h, w = graph.input[0].type.tensor_type.shape.dim
    shape = [batch.dim_param or batch.dim_value, h.dim_value, w.dim_value, c.dim_value]
    scale = helper.make_tensor("fdml_255", TensorProto.FLOAT, [], [255.0])
    before = [
        helper.make_node("Cast", [PIXELS], ["fdml_float"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["fdml_float", "fdml_255"], ["fdml_scaled"]),
        helper.make_node("Transpose", ["fdml_scaled"], [graph.input[0].name], perm=[0, 3, 1, 2]),
    ]
    after = list(graph.node)
    del graph.node[:]
    graph.node.extend([*before, *after])
    graph.initializer.append(scale)
    del graph.input[:]
    graph.input.append(helper.make_tensor_value_info(PIXELS, TensorProto.UINT8, shape))
    onnx.checker.check_model(found, full_check=True)
    return found


def opset(model: Any) -> int:
    """The version of ONNX's own operators that the file is written in."""
    return next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))


def _named(model: Any, card: Card) -> None:
    entry = model.metadata_props.add()
    entry.key, entry.value = KEY, card.to_json()
    model.producer_name, model.doc_string = "fdml", ""
    # The exporter notes the lines of the sources in every node, with their paths on this machine.
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in [*model.graph.input, *model.graph.output, *model.graph.value_info]:
        del value.metadata_props[:]
        value.doc_string = ""
