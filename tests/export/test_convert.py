"""ONNX files: what they take and give, and that they compute what the model does."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fdml
from fdml.card import KEY, Card
from fdml.models import Frozen

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnxruntime as ort

from fdml.export.convert import convert, opset, raw
from fdml.export.half import halved
from fdml.export.quantise import quantised

X = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def source(noisy: Path) -> Frozen:
    return Frozen(fdml.load(noisy))


@pytest.fixture(scope="module")
def proto(noisy: Path) -> Any:
    return convert(fdml.load(noisy), fdml.read_card(noisy))


def answers(proto: Any, rows: np.ndarray, name: str = "images") -> np.ndarray:
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    assert [entry.name for entry in session.get_inputs()] == [name]
    assert [entry.name for entry in session.get_outputs()] == ["logits"]
    (found,) = session.run(None, {name: rows})
    assert isinstance(found, np.ndarray)
    return found


@pytest.mark.parametrize("size", [1, 7, 64])
def test_the_file_computes_what_the_model_does(proto: Any, source: Frozen, size: int) -> None:
    found = answers(proto, X[:size].numpy())
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, source(X[:size]).numpy(), atol=1e-5)


def test_the_file_says_what_it_is(proto: Any, noisy: Path) -> None:
    card = Card.from_json({entry.key: entry.value for entry in proto.metadata_props}[KEY])
    assert card == fdml.read_card(noisy)
    assert opset(proto) >= 18
    assert [dim.dim_param or dim.dim_value for dim in proto.graph.input[0].type.tensor_type.shape.dim][1:] == [1, 8, 8]
    kinds = {node.op_type for node in proto.graph.node}
    assert "BatchNormalization" not in kinds
    assert {"Sub", "Div"} <= kinds, "the normalisation is inside"
    assert str(Path(__file__).parents[2]).encode() not in proto.SerializeToString(), "no path of the machine"


def test_bytes_give_the_same_answers(proto: Any) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), dtype=np.uint8)
    images = (pixels.astype(np.float32) / 255).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(answers(raw(proto), pixels, "pixels"), answers(proto, images))


def test_features_are_outputs_where_asked(noisy: Path, source: Frozen) -> None:
    tapped = convert(fdml.load(noisy), fdml.read_card(noisy), taps=True)
    session = ort.InferenceSession(tapped.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_outputs()]
    assert names == ["logits", *source.tap_names]
    taps = source.outputs(X[:3]).taps
    for name, found in zip(names[1:], session.run(names[1:], {"images": X[:3].numpy()}), strict=True):
        np.testing.assert_allclose(np.asarray(found), taps[name].numpy(), atol=1e-4)


def test_half_precision_is_inside_only(proto: Any, source: Frozen) -> None:
    before = proto.SerializeToString()
    made = halved(proto, "fp16")
    assert proto.SerializeToString() == before, "the argument is left alone"
    found = answers(made, X.numpy())
    assert found.dtype == np.float32
    assert 0 < np.abs(found - source(X).numpy()).max() < 0.1


def test_eight_bits_quantise_the_middle_by_channel(proto: Any, source: Frozen) -> None:
    from onnx import TensorProto

    made = quantised(proto, [X[:32].numpy(), X[32:].numpy()])
    stored = {entry.name: entry for entry in made.graph.initializer}
    kinds = [node.op_type for node in made.graph.node]
    assert "QuantizeLinear" in kinds
    assert "DequantizeLinear" in kinds
    producers = {output: node for node in made.graph.node for output in node.output}
    convolutions = [node for node in made.graph.node if node.op_type == "Conv"]
    weights = [producers.get(node.input[1]) for node in convolutions]
    assert weights[0] is None, "the first layer stays as it is"
    for node in weights[1:]:
        assert node is not None
        assert stored[node.input[0]].data_type == TensorProto.INT8
        assert len(stored[node.input[1]].dims) == 1, "a scale a channel"
    assert [(entry.key, entry.value) for entry in made.metadata_props] == [
        (entry.key, entry.value) for entry in proto.metadata_props
    ]
    found = answers(made, X.numpy())
    assert 0 < np.abs(found - source(X).numpy()).max() < 2
