"""The tensors of the Open Inference Protocol v2, as JSON and in its binary extension.

The protocol is KServe's (https://kserve.github.io/website/docs/concepts/architecture/data-plane/v2-protocol); the
binary extension and the classification extension are Triton's. A binary body is JSON, as long as the header
``Inference-Header-Content-Length`` says, with the bytes of the tensors after it in the order of the inputs.
"""

import math
import struct
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
import numpy as np

LENGTH = b"inference-header-content-length"
IMAGES = "images"
OUTPUTS = ("logits", "probabilities", "label")
_FLOAT = np.dtype("<f4")
_TYPES = {"FP32": _FLOAT, "FP64": np.dtype("<f8"), "FP16": np.dtype("<f2")}
_DIGITS, _REST = 32, 64 << 10
"""Bytes that a number takes in JSON at most, and what else a request may have."""
_SMALL, _HEADS = 1024, 256
"""Heads of at most so many bytes, and so many of them, are remembered."""
_DEPTH = 5
"""The batch, the three axes of an image, and one that a client may have put around them."""


class WireError(ValueError):
    """A request that is not as the protocol has it: one line for the client."""


class Input(msgspec.Struct):
    """An input of a request. ``data`` stays JSON until its type is known."""

    name: str
    shape: list[Annotated[int, msgspec.Meta(ge=-(1 << 40), le=1 << 40)]]
    datatype: str
    parameters: dict[str, Any] = {}
    data: msgspec.Raw = msgspec.Raw()


class Output(msgspec.Struct):
    """An output that a request asks for."""

    name: str
    parameters: dict[str, Any] = {}


class Head(msgspec.Struct):
    """The JSON of a request."""

    inputs: list[Input]
    id: str = ""
    parameters: dict[str, Any] = {}
    outputs: list[Output] = []


class Want(msgspec.Struct, frozen=True):
    """An output to give: its name, whether as bytes, and of how many classes a classification (0: none)."""

    name: str
    binary: bool
    classes: int = 0


_decode = msgspec.json.Decoder(Head).decode
_encode = msgspec.json.Encoder().encode


class Plan(msgspec.Struct, frozen=True):
    """What a head asks for, as far as it can be told without the bytes that follow it."""

    id: str
    timeout: float | None
    """Seconds to answer in; None for the server's own deadline."""
    wants: tuple[Want, ...]
    dims: tuple[int, ...]
    kind: np.dtype
    binary: bool
    data: msgspec.Raw


class Reader:
    """Reads the requests for one model, whose images have the ``shape`` (c, h, w), at most ``largest`` in each."""

    def __init__(self, shape: tuple[int, int, int], largest: int) -> None:
        self._shape, self._largest = shape, largest
        self.most = largest * math.prod(shape) * _DIGITS + _REST
        """Bytes of a request that is read at all: reading keeps other clients waiting."""
        self._known: dict[bytes, Plan] = {}

    def read(self, body: bytes, length: bytes | None) -> tuple[Plan, np.ndarray]:
        """What the request in ``body`` asks for, and its images (n, c, h, w), float32.

        ``length`` is the value of the header ``LENGTH``. The images may lie in the body, and not be aligned. Pixels are
        not looked at: their range is checked in the batch. Raises ``WireError``.
        """
        size = len(body)
        if size > self.most:
            raise WireError(f"the body has {size} bytes; {self._largest} images take less than {self.most}")
        if length is not None:
            if not length.isdigit() or len(length) > 12 or not 0 < int(length) <= size:
                raise WireError(f"Inference-Header-Content-Length is {_shown(length)}, but the body has {size} bytes")
            size = int(length)
        # A client that sends bytes sends the same head again and again.
        if size > _SMALL:
            plan = self._plan(body[:size])
        else:
            head = body[:size]
            known = self._known.get(head)
            if known is None:
                plan = self._plan(head)
                if len(self._known) >= _HEADS:
                    self._known.clear()
                self._known[head] = plan
            else:
                plan = known
        count = math.prod(plan.dims)
        end = size + count * plan.kind.itemsize if plan.binary else size
        if end != len(body):
            raise WireError(f"the body has {len(body)} bytes, but its inputs end after {end}")
        rows = np.frombuffer(body, plan.kind, count, size) if plan.binary else _numbers(plan.data, count)
        if rows.dtype != _FLOAT:
            with np.errstate(over="ignore"):  # what is too large becomes inf, and is refused as a pixel
                rows = rows.astype(np.float32)
        return plan, rows.reshape(plan.dims)

    def _plan(self, content: bytes) -> Plan:
        try:
            head = _decode(content)
        except msgspec.ValidationError as error:
            raise WireError(f"the request is not as the protocol has it: {error}") from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise WireError(f"the request is no JSON: {str(error)[:200]}") from None
        if len(head.inputs) != 1 or head.inputs[0].name != IMAGES:
            names = ", ".join(repr(each.name[:40]) for each in head.inputs[:5]) or "none"
            raise WireError(f"the inputs are {names}; one is needed, {IMAGES!r}")
        given = head.inputs[0]
        dims = given.shape
        if len(dims) != 4 or tuple(dims[1:]) != self._shape:
            shown = str(dims[:8])[1:-1]
            raise WireError(f"images has the shape [{shown}]; [n, {', '.join(map(str, self._shape))}] is needed")
        if not 1 <= dims[0] <= self._largest:
            raise WireError(f"images has a batch of {dims[0]}; 1 to {self._largest} are taken in one request")
        kind = _TYPES.get(given.datatype)
        if kind is None:
            raise WireError(f"images is of type {given.datatype[:20]!r}; FP32 is needed, with pixels in [0, 1]")
        told = given.parameters.get("binary_data_size")
        data = bytes(given.data)
        if (told is None) == (not data):
            raise WireError("images needs either data or the parameter binary_data_size")
        whole = math.prod(dims) * kind.itemsize
        if told is not None and (isinstance(told, bool) or told != whole):
            raise WireError(f"binary_data_size is {_brief(told)}; {dims} of {given.datatype} take {whole}")
        return Plan(head.id, _timeout(head), _wants(head), tuple(dims), kind, told is not None, msgspec.Raw(data))


def _timeout(head: Head) -> float | None:
    given = head.parameters.get("timeout")
    if given is None:
        return None
    if isinstance(given, bool) or not isinstance(given, int) or not 1 <= given < 1 << 63:
        raise WireError(f"timeout is {_brief(given)}; it is a number of microseconds")
    return given / 1e6


def _numbers(data: msgspec.Raw, count: int) -> np.ndarray:
    """The numbers of JSON lists, flat or nested, in their order."""
    try:
        try:
            numbers: list[float] = msgspec.json.decode(data, type=list[float])
        except msgspec.ValidationError:
            level: list[Any] = msgspec.json.decode(data, type=list[Any])
            for _ in range(_DEPTH):
                if not (level and isinstance(level[0], list)):
                    break
                if not all(isinstance(each, list) for each in level):
                    raise WireError("the data of images is nested unevenly") from None
                level = [each for inner in level for each in inner]
            numbers = msgspec.convert(level, list[float])
    except (msgspec.ValidationError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise WireError("the data of images are not numbers, in a list or in lists of lists") from None
    if len(numbers) != count:
        raise WireError(f"images has {len(numbers)} numbers; its shape asks for {count}")
    return np.array(numbers, np.float64)


def _wants(head: Head) -> tuple[Want, ...]:
    usual = head.parameters.get("binary_data_output", False) is True
    if not head.outputs:
        return tuple(Want(name, usual) for name in OUTPUTS)
    wants = []
    for each in head.outputs[: len(OUTPUTS) + 1]:
        classes = each.parameters.get("classification", 0)
        if each.name not in OUTPUTS or any(each.name == want.name for want in wants):
            raise WireError(f"output {each.name[:40]!r}: each of {', '.join(OUTPUTS)} can be asked for once")
        if isinstance(classes, bool) or not isinstance(classes, int) or classes < 0:
            raise WireError(f"output {each.name}: classification is {_brief(classes)}; it is a number of classes")
        if classes and each.name == "label":
            raise WireError("output label: a classification is of logits or probabilities")
        wants.append(Want(each.name, each.parameters.get("binary_data", usual) is True, classes))
    return tuple(wants)


class Writer:
    """The answers of one model, named and versioned, whose class names are ``labels``."""

    def __init__(self, name: str, version: str, labels: Sequence[str]) -> None:
        self._name, self._version, self._labels = name, version, list(labels)
        self._known: dict[tuple[int, tuple[Want, ...]], bytes] = {}

    def write(
        self, id: str, wants: tuple[Want, ...], logits: np.ndarray, probabilities: np.ndarray
    ) -> tuple[bytes, bytes]:
        """The body for logits and probabilities (n, classes), float32, and the header line that it needs, if any."""
        count = len(logits)
        # An answer all of bytes is the same JSON for the same number of images; texts differ in length.
        fixed = not id and all(want.binary and not want.classes and want.name != "label" for want in wants)
        known = self._known.get((count, wants)) if fixed else None
        parts: list[bytes] = []
        described: list[dict[str, Any]] = []
        for want in wants:
            rows = logits if want.name == "logits" else probabilities
            if known is not None:
                parts.append(rows.tobytes())
                continue
            described.append(self._output(want, rows, parts))
        if known is None:
            answer: dict[str, Any] = {"id": id} if id else {}
            answer |= {"model_name": self._name, "model_version": self._version, "outputs": described}
            head = _encode(answer)
            if not parts:
                return head, b""
            known = head
            if fixed and len(self._known) < 1024:
                self._known[count, wants] = head
        return b"".join([known, *parts]), b"inference-header-content-length: %d\r\n" % len(known)

    def _output(self, want: Want, rows: np.ndarray, parts: list[bytes]) -> dict[str, Any]:
        """One output as JSON; its bytes, if that is what is wanted, are added to ``parts``."""
        if want.name == "label":
            return self._texts(want, [[self._labels[index]] for index in rows.argmax(1).tolist()], parts, flat=True)
        if want.classes:
            best = np.argsort(-rows, axis=1, kind="stable")[:, : want.classes]
            texts = [
                [f"{rows[row, index]:f}:{index}:{self._labels[index]}" for index in order]
                for row, order in enumerate(best.tolist())
            ]
            return self._texts(want, texts, parts, flat=False)
        found: dict[str, Any] = {"name": want.name, "datatype": "FP32", "shape": list(rows.shape)}
        if want.binary:
            parts.append(rows.tobytes())
            return found | {"parameters": {"binary_data_size": rows.nbytes}}
        return found | {"data": rows.ravel().tolist()}

    def _texts(self, want: Want, texts: list[list[str]], parts: list[bytes], *, flat: bool) -> dict[str, Any]:
        shape = [len(texts)] if flat else [len(texts), len(texts[0])]
        found: dict[str, Any] = {"name": want.name, "datatype": "BYTES", "shape": shape}
        each = [text for row in texts for text in row]
        if not want.binary:
            return found | {"data": each}
        raw = b"".join(struct.pack("<I", len(text.encode())) + text.encode() for text in each)
        parts.append(raw)
        return found | {"parameters": {"binary_data_size": len(raw)}}


def _brief(value: object) -> str:
    try:
        return str(value)[:20]
    except ValueError:  # a number of more digits than Python writes
        return "a huge number"


def _shown(value: bytes) -> str:
    return repr(value[:40].decode("latin-1"))
