"""The tensors of the protocol, read and written without a server."""

import json
import struct
from typing import Any

import numpy as np
import pytest

from fdml.serve.wire import Reader, Want, WireError, Writer

SHAPE = (1, 2, 2)


def body(head: dict[str, Any] | None = None, rows: np.ndarray | None = None, **extra: Any) -> tuple[bytes, bytes]:
    """A request in the binary form and its length, with ``extra`` in the input."""
    images = np.zeros((1, *SHAPE), np.float32) if rows is None else rows
    given = {
        "name": "images",
        "shape": list(images.shape),
        "datatype": "FP32",
        "parameters": {"binary_data_size": images.nbytes},
    }
    content = json.dumps({"inputs": [given | extra], **(head or {})}).encode()
    return content + images.tobytes(), str(len(content)).encode()


def test_bytes_and_numbers_are_the_same_images() -> None:
    reader = Reader(SHAPE, 8)
    images = np.random.default_rng(0).random((3, *SHAPE), np.float32)
    for dtype, name in ((np.float32, "FP32"), (np.float64, "FP64")):
        rows = images.astype(dtype)
        _, found = reader.read(*body(rows=rows, datatype=name))
        assert found.dtype == np.float32
        assert np.array_equal(found, images)
    for data in (images.tolist(), images.ravel().tolist(), images.reshape(3, 4).tolist()):
        content = json.dumps(
            {"inputs": [{"name": "images", "shape": [3, *SHAPE], "datatype": "FP32", "data": data}]}
        ).encode()
        plan, found = reader.read(content, None)
        assert np.array_equal(found, images)
        assert not plan.wants[0].binary


def test_a_head_that_was_seen_before_is_read_alike() -> None:
    reader = Reader(SHAPE, 8)
    first, second = np.zeros((1, *SHAPE), np.float32), np.ones((1, *SHAPE), np.float32)
    assert np.array_equal(reader.read(*body(rows=first))[1], first)
    assert np.array_equal(reader.read(*body(rows=second))[1], second)
    content, length = body(rows=second)
    with pytest.raises(WireError, match="its inputs end after"):
        reader.read(content[:-1], length)


def test_what_is_asked_for_is_told() -> None:
    wish = [
        {"name": "logits", "parameters": {"binary_data": True, "classification": 2}},
        {"name": "label", "parameters": {"binary_data": False}},
    ]
    plan, _ = Reader(SHAPE, 8).read(*body({"id": "a", "outputs": wish, "parameters": {"timeout": 2_000_000}}))
    assert (plan.id, plan.timeout) == ("a", 2.0)
    assert plan.wants == (Want("logits", True, 2), Want("label", False))
    plan, _ = Reader(SHAPE, 8).read(*body({"parameters": {"binary_data_output": True}}))
    assert [(want.name, want.binary) for want in plan.wants] == [
        ("logits", True),
        ("probabilities", True),
        ("label", True),
    ]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"name": "input"}, "the inputs are 'input'; one is needed, 'images'"),
        ({"shape": [1, 2, 2]}, r"the shape \[1, 2, 2\]; \[n, 1, 2, 2\] is needed"),
        ({"shape": [0, 1, 2, 2]}, "a batch of 0; 1 to 8"),
        ({"shape": [9, 1, 2, 2]}, "a batch of 9; 1 to 8"),
        ({"shape": [10**30, 1, 2, 2]}, "not as the protocol has it|a batch of"),
        ({"shape": [-1, 1, 2, 2]}, "a batch of -1"),
        ({"shape": "1,1,2,2"}, "Expected `array`, got `str`"),
        ({"datatype": "INT64"}, "type 'INT64'; FP32 is needed"),
        ({"datatype": "FP64"}, "binary_data_size is 16; .* take 32"),
        ({"parameters": {"binary_data_size": True}}, "binary_data_size is True"),
        ({"parameters": {"binary_data_size": -16}}, "binary_data_size is -16"),
        ({"parameters": {}}, "needs either data or"),
        ({"data": [0, 0, 0, 0]}, "needs either data or"),
        ({"data": [0, 0, 0], "parameters": {}}, "inputs end after|3 numbers"),
    ],
)
def test_what_is_wrong_is_said(extra: dict[str, Any], message: str) -> None:
    with pytest.raises(WireError, match=message) as caught:
        Reader(SHAPE, 8).read(*body(**extra))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ({"outputs": [{"name": "features"}]}, "output 'features'"),
        ({"outputs": [{"name": "logits"}, {"name": "logits"}]}, "can be asked for once"),
        ({"outputs": [{"name": "logits", "parameters": {"classification": "2"}}]}, "is a number of classes"),
        ({"outputs": [{"name": "label", "parameters": {"classification": 1}}]}, "is of logits or probabilities"),
        ({"parameters": {"timeout": 0}}, "a number of microseconds"),
        ({"id": 7}, "Expected `str`, got `int`"),
        ({"inputs": []}, "the inputs are none"),
    ],
)
def test_wishes_that_cannot_be_met(head: dict[str, Any], message: str) -> None:
    with pytest.raises(WireError, match=message):
        Reader(SHAPE, 8).read(*body(head))


@pytest.mark.parametrize("length", [b"0", b"-1", b"1e3", b"999999", b"9" * 400, b"", b" 5"])
def test_a_length_that_cannot_be(length: bytes) -> None:
    with pytest.raises(WireError, match="Inference-Header-Content-Length is"):
        Reader(SHAPE, 8).read(body()[0], length)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 60_000, b'{"inputs":' + b"[" * 5000, b"null"])
def test_what_is_no_json(content: bytes) -> None:
    with pytest.raises(WireError, match=r"is no JSON|not as the protocol has it"):
        Reader(SHAPE, 8).read(content, None)


def test_what_no_request_needs_is_not_read() -> None:
    reader = Reader(SHAPE, 8)
    with pytest.raises(WireError, match="8 images take less than"):
        reader.read(b" " * (reader.most + 1), None)


@pytest.mark.parametrize("data", ['"abc"', "[[0,0],[0]]", '[0,0,0,"1"]', "[[[[[[[0,0,0,0]]]]]]]", "[null,0,0,0]", "{}"])
def test_data_that_are_no_numbers(data: str) -> None:
    content = '{"inputs":[{"name":"images","shape":[1,1,2,2],"datatype":"FP32","data":' + data + "}]}"
    with pytest.raises(WireError, match=r"numbers|unevenly"):
        Reader(SHAPE, 8).read(content.encode(), None)


def test_data_that_are_no_text() -> None:
    content = b'{"inputs":[{"name":"images","shape":[1,1,2,2],"datatype":"FP32","data":[[0,"\xb0"]]}]}'
    with pytest.raises(WireError):
        Reader(SHAPE, 8).read(content, None)


def test_numbers_beyond_float32_become_what_the_batch_refuses() -> None:
    content = b'{"inputs":[{"name":"images","shape":[1,1,2,2],"datatype":"FP32","data":[1e300,0,0,0]}]}'
    assert np.isinf(Reader(SHAPE, 8).read(content, None)[1][0, 0, 0, 0])


def test_answers_as_bytes_and_as_json() -> None:
    writer = Writer("m", "3", ["cat", "dög"])
    logits = np.array([[0.5, 1.5], [2.0, -1.0]], np.float32)
    chances = np.array([[0.25, 0.75], [0.9, 0.1]], np.float32)
    for id in ("", "x"):
        for _ in range(2):  # the second time from memory
            content, line = writer.write(id, (Want("logits", True), Want("probabilities", True)), logits, chances)
            size = int(line.split(b":")[1])
            head = json.loads(content[:size])
            assert head.get("id", "") == id
            assert [each["name"] for each in head["outputs"]] == ["logits", "probabilities"]
            assert np.array_equal(np.frombuffer(content, np.float32, 8, size), np.r_[logits.ravel(), chances.ravel()])
    content, line = writer.write("", (Want("label", True),), logits, chances)
    raw = content[int(line.split(b":")[1]) :]
    assert raw == struct.pack("<I", 4) + "dög".encode() + struct.pack("<I", 3) + b"cat"
    content, line = writer.write("", (Want("label", False), Want("logits", False, 1)), logits, chances)
    assert line == b""
    label, best = json.loads(content)["outputs"]
    assert label == {"name": "label", "datatype": "BYTES", "shape": [2], "data": ["dög", "cat"]}
    assert best["data"] == ["1.500000:1:dög", "2.000000:0:cat"]
