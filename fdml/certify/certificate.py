"""Certificates: what was proved about each image, and the file that keeps them (docs/certificates.md)."""

import base64
import binascii
import dataclasses
import json
import math
import typing
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fdml.errors import InputError

FORMAT = "fdml-certificates"
VERSION = 1

_FILE_LIMIT = 1 << 31
_LINE_LIMIT = 1 << 24

Status = Literal["certified", "abstain", "falsified", "unknown"]


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """What was proved about one image.

    ``certified``: the answer is ``answer`` everywhere within ``radius`` in ``norm`` (pixel units), inclusive for
    bounds, strictly within for smoothing. ``abstain``: smoothing could not tell the class; ``answer`` is −1.
    ``falsified``: the image ``counterexample`` lies within ``eps`` and is answered otherwise. ``unknown``: neither was
    found in the time.

    ``index`` is the image's place in the data and ``label`` its class, None where there is none. ``fooled_at`` is the
    smallest radius at which an attack was seen to change the answer: the other side of the truth. A certificate by
    smoothing has ``sigma``, ``alpha`` (the chance that it errs), the ``hits`` of ``n`` samples for the class that
    ``n0`` others had chosen; ``shift`` is the distance by which the image was off the grid of pixel values. One by
    bounds has ``eps``, the proved lower ``bound`` on the margin of the answer's logit over every other (None where
    there is none), and the ``domains`` that were bounded.
    """

    index: int
    label: int | None
    answer: int
    status: Status
    radius: float
    norm: str
    method: str
    seconds: float
    seed: int
    sigma: float | None = None
    alpha: float | None = None
    n0: int | None = None
    n: int | None = None
    hits: int | None = None
    shift: float | None = None
    eps: float | None = None
    bound: float | None = None
    domains: int | None = None
    counterexample: str | None = None
    fooled_at: float | None = None

    @property
    def correct(self) -> bool:
        """Whether the answer is the label."""
        return self.label is not None and self.answer == self.label

    def holds(self, radius: float) -> bool:
        """Whether the image is answered rightly, for certain, up to ``radius``; at 0, whether the answer is right."""
        if radius == 0:
            return self.correct
        return self.correct and self.status == "certified" and self.radius >= radius

    def stands(self, radius: float) -> bool:
        """Whether the image is answered rightly and no attack changed that within ``radius``."""
        return self.correct and (self.fooled_at is None or self.fooled_at > radius)

    def to_json(self) -> str:
        """One line; what does not apply is left out."""
        found = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        return json.dumps(found, allow_nan=False)


def pack(x: np.ndarray) -> str:
    """A counter-example as text: float32, compressed, base64."""
    return base64.b64encode(zlib.compress(np.ascontiguousarray(x, dtype="<f4").tobytes(), 9)).decode()


def unpack(text: str, count: int) -> np.ndarray:
    """The ``count`` numbers that ``pack`` wrote; raises ``InputError`` for anything else."""
    try:
        inflated = zlib.decompressobj().decompress(base64.b64decode(text, validate=True), 4 * count + 1)
    except (binascii.Error, zlib.error):
        inflated = b""
    if len(inflated) != 4 * count:
        raise InputError(f"a counter-example is not {count} packed numbers")
    return np.frombuffer(inflated, dtype="<f4").copy()


def dump(header: Mapping[str, Any], certificates: Iterable[Certificate]) -> str:
    """The text of a certificates file."""
    first = json.dumps({"format": FORMAT, "version": VERSION, **header}, allow_nan=False)
    return "\n".join([first, *(certificate.to_json() for certificate in certificates)]) + "\n"


def read(path: Path) -> tuple[dict[str, Any], list[Certificate]]:
    """The header and the certificates of a file; raises ``InputError``, with the line, for what is neither."""
    try:
        if path.stat().st_size > _FILE_LIMIT:
            raise InputError(f"{path} has {path.stat().st_size:,} bytes: certificates have at most {_FILE_LIMIT:,}")
        with path.open(encoding="utf-8") as stream:
            header = _object(stream.readline(_LINE_LIMIT), f"{path}:1")
            if header.pop("format", None) != FORMAT or header.pop("version", None) != VERSION:
                raise InputError(f"{path} is not a certificates file of version {VERSION}: fdml certify writes them")
            found = []
            while line := stream.readline(_LINE_LIMIT):
                found.append(parse(line, f"{path}:{len(found) + 2}"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError:
        raise InputError(f"{path} is not a certificates file: it is not UTF-8") from None
    return header, found


def parse(line: str, where: str) -> Certificate:
    """The certificate of one line; raises ``InputError`` that begins with ``where``."""
    values = _object(line, where)
    for name in values:
        if name not in _KINDS:
            raise InputError(f"{where}: {name[:40]!r} is not a field of a certificate")
    for name, kind in _KINDS.items():
        value = values.setdefault(name, None)
        if not _fits(value, kind):
            raise InputError(f"{where}: {name}={str(value)[:40]!r} is not what a certificate has there")
    return Certificate(**values)


_KINDS = typing.get_type_hints(Certificate)


def _fits(value: object, kind: Any) -> bool:
    if typing.get_origin(kind) is Literal:
        return value in typing.get_args(kind)
    allowed = typing.get_args(kind) or (kind,)
    if isinstance(value, bool):
        return False
    if isinstance(value, float):
        return float in allowed and math.isfinite(value)
    if isinstance(value, int):
        return (int in allowed or float in allowed) and abs(value) < 1 << 63
    return isinstance(value, allowed)


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise InputError(f"{where} is not a line of a certificates file: {line[:40]!r}")
    return found
