"""The card: what a model file says of itself. Reading one needs the standard library only.

The format (version 1)
----------------------
A model is one ``.safetensors`` file: eight bytes with the length n of the header (unsigned, little-endian), n bytes of
UTF-8 JSON that begin with ``{`` and may end in spaces, then the weights without holes. The header maps the name of
each tensor to ``{"dtype", "shape", "data_offsets": [begin, end]}``, and ``"__metadata__"`` to a table of strings. The
card is the JSON text at ``__metadata__["fdml.card"]``: an object with the fields of ``Card``, tuples written as lists.

===============  =====================================================================================================
architecture     name of the builder of the network: 1 to 200 printable characters
options          the builder's arguments, as JSON values
classes          the names of the classes in the order of the logits; at least two; not necessarily distinct
input            [channels, height, width]; 1 to 64 channels, sides of 1 to 8192 pixels
mean, std        what the model subtracts from, and divides by, pixels in [0, 1]; one number a channel, std above 0
threat           {"norm": "linf" | "l2" | "l1", "eps": pixel units} that it was trained against; null for clean training
role             "teacher", "student" or "model"
recipe           the settings of the training run: names to scalars, or lists of scalars
seed             the seed of the run: 0 to 2^63 - 1
data             {"name", "fingerprint"} of the data set
metrics          names to numbers, or to tables of the same
versions         package names to version strings
format           1
===============  =====================================================================================================

Every number is finite and fits 64 bits; no key occurs twice; every string is valid Unicode. A card has at most 1 MiB, a
header 4 MiB, and both are read within these limits whatever the file claims. A reader refuses fields that it does not
know, so that one which changes the meaning of the weights is never overlooked: a new field means a new format number.
"""

import json
import math
import os
import stat
import struct
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeGuard

from fdml.errors import InputError, unknown

FORMAT = 1
KEY = "fdml.card"
ROLES = ("teacher", "student", "model")
NORMS = ("linf", "l2", "l1")

CARD_LIMIT = 1 << 20
HEADER_LIMIT = 4 << 20

_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E4M3FNUZ": 8, "F8_E5M2": 8, "F8_E5M2FNUZ": 8, "F8_E8M0": 8,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True)
class Card:
    """What a model file says of itself. The module's docstring gives the meaning and the limits of each field.

    The tables are copied, with tuples inside them turned to lists: a card equals the one read back from its JSON.
    Raises ``InputError`` for a field of the wrong type or outside its limits.
    """

    architecture: str
    options: dict[str, Any]
    classes: tuple[str, ...]
    input: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    threat: dict[str, Any] | None
    role: str
    recipe: dict[str, Any]
    seed: int
    data: dict[str, str]
    metrics: dict[str, Any]
    versions: dict[str, str]
    format: int = FORMAT

    def __post_init__(self) -> None:
        _check_format(self.format)
        _label("architecture", self.architecture)
        for name in ("classes", "input", "mean", "std"):
            if not isinstance(getattr(self, name), tuple):
                raise _wrong(name, "a tuple", getattr(self, name))
        if len(self.classes) < 2:
            raise _wrong("classes", "at least two names", list(self.classes))
        for name in self.classes:
            _label("classes", name)
        _check_input(self.input)
        for name in ("mean", "std"):
            value = getattr(self, name)
            if len(value) != self.input[0] or not all(_finite(v) for v in value):
                raise _wrong(name, f"one finite number for each of the {self.input[0]} channels", list(value))
            object.__setattr__(self, name, tuple(float(v) for v in value))
        if min(self.std) <= 0:
            raise _wrong("std", "above 0", list(self.std))
        if self.role not in ROLES:
            raise unknown("role in the card:", _short(self.role), ROLES)
        if not _whole(self.seed) or not 0 <= self.seed < 1 << 63:
            raise _wrong("seed", "a whole number from 0 to 2^63 - 1", self.seed)

        if self.threat is not None:
            object.__setattr__(self, "threat", _table("threat", self.threat))
            _check_threat(self.threat)
        for name in ("options", "recipe", "data", "metrics", "versions"):
            object.__setattr__(self, name, _table(name, getattr(self, name)))
        for key, value in self.recipe.items():
            if not all(_scalar(v) for v in (value if isinstance(value, list) else [value])):
                raise _wrong(f"recipe.{_short(key)}", "a scalar or a list of scalars", value)
        if set(self.data) != {"name", "fingerprint"} or not all(isinstance(v, str) and v for v in self.data.values()):
            raise _wrong("data", "a table of the strings 'name' and 'fingerprint'", self.data)
        _check_metrics("metrics", self.metrics)
        for key, value in self.versions.items():
            _label("versions", key)
            _label(f"versions.{key}", value)

    def to_json(self) -> str:
        """The card as JSON with sorted keys. Raises ``InputError`` when it is larger than a reader accepts (1 MiB)."""
        text = json.dumps(asdict(self), sort_keys=True, allow_nan=False, ensure_ascii=False)
        _check_size(text)
        return text

    @classmethod
    def from_json(cls, text: str) -> "Card":
        """The card that ``to_json`` wrote. Raises ``InputError`` for anything that the format does not allow."""
        _check_size(text)
        found = parse_object(text, "the card")
        # First the format: a newer card may well have fields that this reader does not know.
        if "format" in found:
            _check_format(found["format"])
        known = [field.name for field in fields(cls)]
        for key in found:
            if key not in known:
                raise unknown("field in the card:", _short(key), known)
        for name in known:
            if name not in found:
                raise InputError(f"the card lacks the field {name!r}")
        for name in ("classes", "input", "mean", "std"):
            if not isinstance(found[name], list):
                raise _wrong(name, "a list", found[name])
            found[name] = tuple(found[name])
        return cls(**found)


def threat_words(norm: str, eps: float) -> str:
    """A threat as people write it: ``linf 8/255`` where eps is a whole number of grey levels, else ``linf 0.2``."""
    levels = eps * 255
    in_levels = norm == "linf" and eps > 0 and abs(levels - round(levels)) < 1e-6 and len(f"{eps:g}") > 5
    return f"{norm} {round(levels)}/255" if in_levels else f"{norm} {eps:g}"


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as the header describes it; ``dtype`` is the format's name for it, such as F32."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Header:
    """All that a ``.safetensors`` file says before its weights."""

    metadata: dict[str, str]
    tensors: dict[str, TensorInfo]


def header(path: str | os.PathLike[str]) -> Header:
    """The header of a ``.safetensors`` file, proved to describe the file exactly; the weights are not read.

    Reads at most 4 MiB + 8 bytes, and never follows a length that the file cannot hold. Raises ``InputError``, in one
    line that names the file, for a path that is no regular file and for any breach of the format: a header that is cut
    off, too long, not UTF-8 JSON or with a key twice; a dtype, shape or offset that makes no sense; tensors that
    overlap, leave holes, or end before or after the file does.
    """
    try:
        return _header(Path(path))
    except InputError as error:
        raise InputError(f"{os.fspath(path)}: {error}") from None


def read_card(path: str | os.PathLike[str]) -> Card:
    """The card of a model file. Raises ``InputError``, in one line that names the file, when there is no valid one."""
    metadata = header(path).metadata
    if KEY not in metadata:
        raise InputError(f"{os.fspath(path)}: has no fdml card; is it a file of `fdml train`?")
    try:
        return Card.from_json(metadata[KEY])
    except InputError as error:
        raise InputError(f"{os.fspath(path)}: {error}") from None


def _header(path: Path) -> Header:
    try:
        # Asked before opening: opening a named pipe would wait for a writer.
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise InputError("is a folder; name the .safetensors file inside it")
        if not stat.S_ISREG(mode):
            raise InputError("is not a regular file")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(9)
            if len(start) < 9 or start[8:] != b"{":
                raise InputError("is not a safetensors file")
            (length,) = struct.unpack("<Q", start[:8])
            if length > HEADER_LIMIT:
                raise InputError(f"claims a header of {length} bytes, more than the {HEADER_LIMIT} allowed")
            if size < 8 + length:
                raise InputError(f"is cut off: its header should have {length} bytes, the file has {size - 8} for it")
            raw = start[8:] + file.read(length - 1) if length else b""
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError("no such file") from None
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise InputError(f"is not a file name: {error}") from None  # a NUL byte in the path
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise InputError("is not a safetensors file: its header is not UTF-8") from None

    found = parse_object(text, "its header")
    metadata = found.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputError("its header's __metadata__ is not a table of strings")
    spans = []
    tensors = {}
    for name, entry in found.items():
        tensors[name], span = _tensor(name, entry)
        spans.append(span)
    _check_cover(spans, size - 8 - length)
    return Header(metadata, tensors)


def _tensor(name: str, entry: object) -> tuple[TensorInfo, tuple[int, int]]:
    what = f"its header's entry for the tensor {_short(name)!r}"
    if not name.isprintable():
        raise InputError(f"{what} has a name that cannot be printed")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise InputError(f"{what} is not dtype, shape and data_offsets")
    dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise InputError(f"{what} has the unknown dtype {_short(dtype)!r}")
    if not isinstance(shape, list) or len(shape) > 64 or not all(_whole(d) and 0 <= d < 1 << 63 for d in shape):
        raise InputError(f"{what} has the impossible shape {_short(shape)}")
    if not isinstance(span, list) or len(span) != 2 or not all(_whole(o) and 0 <= o < 1 << 63 for o in span):
        raise InputError(f"{what} has the impossible data_offsets {_short(span)}")
    bits = math.prod(shape) * _BITS[dtype]
    if (span[1] - span[0]) * 8 != bits:
        raise InputError(f"{what} gives {span[1] - span[0]} bytes to {_short(shape)} of {dtype}")
    return TensorInfo(dtype, tuple(shape)), (span[0], span[1])


def _check_cover(spans: list[tuple[int, int]], size: int) -> None:
    end = 0
    for begin, after in sorted(spans):
        if begin != end:
            raise InputError(f"its tensors {'overlap' if begin < end else 'leave a hole'} at byte {min(begin, end)}")
        end = after
    if end > size:
        raise InputError(f"is cut off: its weights should have {end} bytes, the file has {size}")
    if end < size:
        raise InputError(f"has {size - end} bytes after its last tensor")


def _check_size(text: str) -> None:
    try:
        size = len(text.encode("utf-8"))
    except UnicodeEncodeError:
        raise InputError("the card has a string that is not valid Unicode") from None
    if size > CARD_LIMIT:
        raise InputError(f"the card has {size} bytes, more than the {CARD_LIMIT} allowed")


def _check_format(value: object) -> None:
    if not _whole(value) or value < 1:
        raise _wrong("format", f"the whole number {FORMAT}", value)
    if value > FORMAT:
        raise InputError(
            f"made by a newer fdml (card format {_short(value)}, this one reads {FORMAT}): "
            "upgrade with pip install -U fdml"
        )


def _check_input(value: tuple[int, ...]) -> None:
    if (
        len(value) != 3
        or not all(_whole(v) for v in value)
        or not 1 <= value[0] <= 64
        or not all(1 <= side <= 8192 for side in value[1:])
    ):
        raise _wrong("input", "(channels, height, width), 1 to 64 channels and sides of 1 to 8192", list(value))


def _check_threat(value: dict[str, Any]) -> None:
    if set(value) != {"norm", "eps"}:
        raise _wrong("threat", "a table of 'norm' and 'eps', or nothing", value)
    norm, eps = value["norm"], value["eps"]
    if norm not in NORMS:
        raise unknown("norm in the card's threat:", _short(norm), NORMS)
    if not _finite(eps) or eps < 0 or (norm == "linf" and eps > 1):
        raise _wrong("threat.eps", "in pixel units, from 0 to 1 for linf, such as 8/255", eps)


def _check_metrics(name: str, table: dict[str, Any]) -> None:
    for key, value in table.items():
        if isinstance(value, dict):
            _check_metrics(f"{name}.{_short(key)}", value)
        elif not _finite(value):
            raise _wrong(f"{name}.{_short(key)}", "a number or a table of numbers", value)


def parse_object(text: str, what: str) -> dict[str, Any]:
    """The object that ``text`` is in strict JSON: no NaN, no key twice."""
    try:
        found = json.loads(text, object_pairs_hook=_distinct, parse_constant=_no_constant)
    except InputError as error:
        raise InputError(f"{what} {error}") from None
    except (ValueError, RecursionError) as error:
        why = error.msg if isinstance(error, json.JSONDecodeError) else "a number or the nesting is absurd"
        raise InputError(f"{what} is not JSON: {why}") from None
    if not isinstance(found, dict):
        raise InputError(f"{what} is not a JSON object")
    return found


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise InputError("has a key twice")
    return table


def _no_constant(name: str) -> None:
    raise InputError(f"has the number {name}, which JSON does not know")


def _table(name: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(name, "a table", value)
    return {key: _json(f"{name}.{_short(key)}", item, 1) for key, item in _string_keys(name, value)}


def _json(name: str, value: object, depth: int) -> Any:
    """A copy of ``value`` as JSON would give it back."""
    if depth > 16:
        raise InputError(f"the card's {name[:60]}… is nested too deeply")
    if isinstance(value, dict):
        return {key: _json(f"{name}.{_short(key)}", item, depth + 1) for key, item in _string_keys(name, value)}
    if isinstance(value, list | tuple):
        return [_json(name, item, depth + 1) for item in value]
    if not _scalar(value):
        raise _wrong(name, "a value that JSON can hold, numbers finite and of 64 bits", value)
    return value


def _string_keys(name: str, value: dict[Any, Any]) -> list[tuple[str, Any]]:
    for key in value:
        if not isinstance(key, str):
            raise _wrong(name, "a table whose keys are strings", key)
        _unicode(name, key)
    return list(value.items())


def _scalar(value: object) -> bool:
    if isinstance(value, str):
        _unicode("text", value)
        return True
    return value is None or isinstance(value, bool) or _finite(value)


def _whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _finite(value: object) -> TypeGuard[float]:
    """Whether it is a number that every JSON reader gives back as it was."""
    if isinstance(value, float):
        return math.isfinite(value)
    return _whole(value) and -(1 << 63) <= value < 1 << 63


def _label(name: str, value: object) -> None:
    """Names are printed on terminals and in pages: no control characters in them."""
    if not isinstance(value, str) or not 1 <= len(value) <= 200 or not value.isprintable():
        raise _wrong(name, "text of 1 to 200 printable characters", value)


def _unicode(name: str, value: str) -> None:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise _wrong(name, "valid Unicode", value) from None


def _wrong(name: str, right: str, value: object) -> InputError:
    return InputError(f"the card's {name} must be {right}, got {_short(repr(value))}")


def _short(value: object) -> str:
    """At most 60 characters, on one line, whatever a hostile file says."""
    text = str(value)
    text = text if len(text) <= 60 else text[:57] + "…"
    return text if text.isprintable() else ascii(text)[1:-1]
