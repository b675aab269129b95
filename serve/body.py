"""Bodies of requests: compressed ones, and the picture that one holds by itself or in a form."""

import zlib
from typing import Any

import numpy as np

from fdml.pixels import Intake
from fdml.serve.http import Problem, Request


def inflated(body: bytes, coding: bytes, limit: int) -> bytes:
    """The body of a compressed request, which may not grow beyond ``limit`` bytes."""
    kinds = {b"gzip": 31, b"deflate": 15, b"identity": 0}
    name = coding.strip().lower()
    if name not in kinds:
        raise Problem(415, "the body can be compressed by gzip or deflate")
    if name == b"identity":
        return body
    reader = zlib.decompressobj(kinds[name])
    try:
        found = reader.decompress(body, limit + 1)
    except zlib.error:
        raise Problem(400, f"the body is not compressed by {name.decode()}") from None
    if len(found) > limit:
        raise Problem(413, f"the body is larger than the {limit} bytes that are taken")
    if not reader.eof:
        raise Problem(400, "the compressed body is cut off")
    return found


def picture(request: Request) -> bytes:
    """The image file in the body, or in the part ``image`` of a form."""
    kind = request.headers.get(b"content-type", b"")
    if request.headers.get(b"content-encoding", b"identity") != b"identity":
        raise Problem(415, "an image is compressed already: send it without a content-encoding")
    form = kind.lower().startswith(b"multipart/form-data")
    content = _part(kind, request.body) if form else request.body
    if not content:
        raise Problem(400, "the body is empty: send a PNG, JPEG, WebP or BMP file, or a form with one called image")
    return content


def _part(kind: bytes, body: bytes) -> bytes:
    from python_multipart.exceptions import FormParserError
    from python_multipart.multipart import MultipartParser, parse_options_header

    boundary = parse_options_header(kind)[1].get(b"boundary")
    if not boundary or len(boundary) > 256:
        raise Problem(400, "the form has no boundary, or one that is too long")
    parts: list[tuple[bytearray, bytearray, bytearray]] = []  # a header's name and value, and the content
    names: list[bytes] = []

    def begin() -> None:
        if len(parts) >= 16:
            raise Problem(400, "the form has more than 16 parts")
        parts.append((bytearray(), bytearray(), bytearray()))
        names.append(b"")

    def end_header() -> None:
        name, value, _ = parts[-1]
        if bytes(name).lower() == b"content-disposition":
            names[-1] = parse_options_header(bytes(value))[1].get(b"name", b"")
        name.clear()
        value.clear()

    def field(place: int) -> Any:
        def add(data: bytes, start: int, end: int) -> None:
            if place < 2 and len(parts[-1][place]) > 4096:
                raise Problem(400, "a part of the form has a head that is too large")
            parts[-1][place].extend(data[start:end])

        return add

    calls: Any = {
        "on_part_begin": begin,
        "on_header_field": field(0),
        "on_header_value": field(1),
        "on_header_end": end_header,
        "on_part_data": field(2),
    }
    try:
        parser = MultipartParser(boundary, calls)
        parser.write(body)
        parser.finalize()
    except FormParserError:
        raise Problem(400, "the form is not as multipart/form-data has it") from None
    found = [bytes(content) for name, (_, _, content) in zip(names, parts, strict=True) if name in (b"image", b"file")]
    if len(found) != 1:
        raise Problem(400, f"the form has {len(found)} parts called image; one is needed")
    return found[0]


def decoded(content: bytes, shape: tuple[int, int, int]) -> np.ndarray:
    """The picture as the model takes it, (1, c, h, w), float32. Raises ``InputError`` for what is none."""
    return Intake([content], shape).pixels(0, 1)
