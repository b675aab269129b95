"""Requests to infer as they should be, and malformed ones of every kind, for `benchmarks/serve_load.py`."""

import contextlib
import io
import json
import re
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image

INFER, CLASSIFY = "/v2/models/m/infer", "/v1/models/m/classify"


def message(path: str, body: bytes, headers: str = "", method: str = "POST") -> bytes:
    return (
        f"{method} {path} HTTP/1.1\r\nhost: m\r\ncontent-length: {len(body)}\r\n{headers}\r\n".encode("latin-1") + body
    )


def infer(images: np.ndarray) -> tuple[bytes, str]:
    """The body that asks for the logits of images (n, c, h, w), float32, all of it in bytes; and its header line."""
    head = {
        "inputs": [
            {
                "name": "images",
                "shape": list(images.shape),
                "datatype": "FP32",
                "parameters": {"binary_data_size": images.nbytes},
            }
        ],
        "outputs": [{"name": "logits", "parameters": {"binary_data": True}}],
    }
    text = json.dumps(head).encode()
    return text + images.tobytes(), f"inference-header-content-length: {len(text)}\r\n"


NASTY = (
    *(
        "null",
        "true",
        "-1",
        "0",
        "1.5",
        "1e999",
        "9" * 30,
        "9" * 400,
        "9" * 6000,
        "-" + "9" * 400,
        "NaN",
        '"\xb0"',
        '["\xb0"]',
        '{"timeout":' + "9" * 400 + "}",
        '""',
        '"FP32"',
    ),
    *(
        "[]",
        "{}",
        "[" * 400,
        "[" * 400 + "]" * 400,
        "[" * 50_000,
        '{"a":' * 30_000,
        '"' + "x" * 5000 + '"',
        '"\\ud800"',
    ),
    *(
        '"\\u0000"',
        "[null]",
        "[[[[[[0]]]]]]",
        '{"binary_data_size":-1}',
        '{"timeout":0}',
        '{"classification":-3}',
        "\xff",
    ),
)
"""JSON, or nearly, that takes the place of a value."""
_VALUE = re.compile(rb'[:\[,] ?("[^"]*"|[0-9.]+|\[[^\[\]]*\]|\{[^{}]*\})')
_NUMBER = re.compile(rb"([0-9.]+)")
_MORE = b'{"id": "a", "parameters": {"timeout": 1000000, "binary_data_output": true}, '
_METHODS = ("GET", "POST", "PUT", "DELETE", "OPTIONS", "PATCH")
_PATHS = (
    *("/", "/v2", "/v2/models/m", "/v2/models/%6d/infer", "/v2/models/none/infer", "/v2/models/m/versions/9/infer"),
    *(
        "/v2/models/m/versions//ready",
        "/v2/models/" + "m" * 3000,
        "/v1/models/../m",
        "/v2/models/m%00/ready",
        "/%ff%fe",
    ),
    *("/v2/repository/models/m/unload", "/v2/repository/index", "/v2/health/ready/", "//", "/v2/models/m/stats?x", "*"),
)
_OPTIONS = (
    *("", "?top_k=0", "?top_k=1e3", "?top_k=" + "9" * 5000, "?certify=nan", "?certify=-1", "?certify=inf", "?norm=l1"),
    *(
        "?samples=1",
        "?timeout_ms=0",
        "?a=1&a=2",
        "?suspect=maybe",
        "?%ff=%fe",
        "?=",
        "?" + "a=1&" * 50,
        "?timeout_ms=1",
    ),
)
_HEADERS = (
    *("content-type: \x00", "content-type: multipart/form-data; boundary=", "expect: 200-ok", "authorization: Basic x"),
    *(
        "content-encoding: br",
        "inference-header-content-length: -1",
        "x-request-id: " + "\xff" * 40,
        "a: " + "b" * 7000,
    ),
    *(
        "content-type: multipart/form-data; boundary*0*=x''%ff; boundary*1=b",
        "cookie: " + "a=b; " * 900,
        "te: trailers",
    ),
)


class Messages:
    """Malformed requests, drawn with a seed. The kinds of ``whole`` are HTTP, and wrong in what HTTP carries; those of
    ``torn`` are not even that, or end too early."""

    def __init__(self, shape: tuple[int, ...], seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.shape = shape
        self.images = self.random.random((4, *shape), np.float32)
        self.bodies = {}
        for count in range(1, 4):
            body, line = infer(self.images[:count])
            self.bodies[count] = body, int(line.split()[1])
        pixels = self.images[:1].astype(np.float64).round(2)
        self.texts = []
        for data in (pixels.tolist(), pixels.ravel().tolist()):
            given = {"name": "images", "shape": [1, *shape], "datatype": "FP32", "data": data}
            self.texts.append(json.dumps({"inputs": [given]}).encode())
        small = self.random.integers(0, 256, (*shape[1:], 3), dtype=np.uint8)
        self.pictures = []
        for kind in ("PNG", "JPEG", "WEBP", "BMP"):
            file = io.BytesIO()
            Image.fromarray(small).save(file, kind)
            self.pictures.append(file.getvalue())
        self.bombs = list(_bombs())
        self.whole: dict[str, tuple[float, Callable[[], bytes]]] = {
            "length": (10, self.length),
            "shape": (10, self.shaped),
            "pixels": (14, self.pixels),
            "cut": (10, self.cut),
            "bits": (14, self.bits),
            "value": (14, self.value),
            "numbers": (6, self.numbers),
            "picture": (10, self.picture),
            "form": (4, self.form),
            "address": (4, self.address),
            "header": (3, self.header),
            "coding": (1, self.coding),
            "bomb": (0.01, self.bomb),
        }
        self.torn: dict[str, tuple[float, Callable[[], bytes]]] = {
            "garbage": (3, self.garbage),
            "head": (3, self.head),
            "short": (2, self.short),
            "chunks": (2, self.chunks),
            "trailers": (0.1, self.trailers),
        }

    def pick(self, kinds: dict[str, tuple[float, Callable[[], bytes]]], count: int) -> list[str]:
        weights = np.array([weight for weight, _ in kinds.values()])
        return [str(name) for name in self.random.choice(list(kinds), count, p=weights / weights.sum())]

    def one(self, of: "tuple[str, ...]") -> str:
        return of[int(self.random.integers(len(of)))]

    def flipped(self, content: bytes, first: int = 0, last: int | None = None) -> bytes:
        found = bytearray(content)
        for place in self.random.integers(first, last or len(found), int(self.random.integers(1, 9))):
            found[place] ^= 1 << int(self.random.integers(8))
        return bytes(found)

    def binary(self, count: int | None = None) -> tuple[bytes, int]:
        """A body as it should be, and the length of its JSON."""
        return self.bodies[count or int(self.random.integers(1, 4))]

    def asked(self, body: bytes, length: object) -> bytes:
        return message(INFER, body, f"inference-header-content-length: {length}\r\n")

    def length(self) -> bytes:
        body, size = self.binary(1)
        wrong = (
            size - 1,
            size + 1,
            0,
            -size,
            len(body),
            len(body) + 1,
            10**11,
            "9" * 40,
            f"+{size}",
            f"{size}.0",
            "",
            "x",
        )
        return self.asked(body, wrong[int(self.random.integers(len(wrong)))])

    def shaped(self) -> bytes:
        body, size = self.binary(1)
        head = json.loads(body[:size])
        dims = list(head["inputs"][0]["shape"])
        wrong = (0, -1, 2, 65, 2**31, 2**63, 2**64 + 1, 10**40, 1)
        for _ in range(int(self.random.integers(1, 3))):
            dims[int(self.random.integers(len(dims)))] = wrong[int(self.random.integers(len(wrong)))]
        if self.random.random() < 0.3:
            dims = dims[: int(self.random.integers(5))] + [1] * int(self.random.integers(3))
        head["inputs"][0]["shape"] = dims
        if self.random.random() < 0.3:
            head["inputs"][0]["datatype"] = self.one(("UINT8", "FP16", "FP64", "BYTES", "INT64", "", "fp32"))
        if self.random.random() < 0.3:
            head["inputs"][0]["parameters"]["binary_data_size"] = wrong[int(self.random.integers(len(wrong)))]
        text = json.dumps(head).encode()
        return self.asked(text + body[size:], len(text))

    def pixels(self) -> bytes:
        images = self.images[: int(self.random.integers(1, 4))].copy()
        flat = images.reshape(-1)
        wrong = (np.nan, np.inf, -np.inf, -0.0, -1e-7, 1.0000001, 3e38, 1e-45)
        flat[self.random.integers(0, flat.size, 3)] = wrong[int(self.random.integers(len(wrong)))]
        body, line = infer(images)
        size = int(line.split()[1])
        return self.asked(self.flipped(body, size) if self.random.random() < 0.3 else body, size)

    def cut(self) -> bytes:
        body, size = self.binary()
        if self.random.random() < 0.3:
            return self.asked(body + self.random.bytes(int(self.random.integers(1, 9))), size)
        return self.asked(body[: int(self.random.integers(len(body)))], size)

    def bits(self) -> bytes:
        body, size = self.binary(1)
        return self.asked(self.flipped(body, 0, size), size)

    def value(self) -> bytes:
        body, size = self.binary(1)
        body, size = _MORE + body[1:], size + len(_MORE) - 1
        places = list(_VALUE.finditer(body[:size]))
        place = places[int(self.random.integers(len(places)))]
        text = body[: place.start(1)] + self.one(NASTY).encode("latin-1") + body[place.end(1) : size]
        if self.random.random() < 0.5:
            return message(INFER, text)
        return self.asked(text + body[size:], len(text))

    def numbers(self) -> bytes:
        text = self.texts[int(self.random.integers(2))]
        if self.random.random() < 0.5:
            places = list(_NUMBER.finditer(text, text.index(b'"data"')))
            place = places[int(self.random.integers(len(places)))]
            text = text[: place.start(1)] + self.one(NASTY).encode("latin-1") + text[place.end(1) :]
        elif self.random.random() < 0.5:
            text = self.flipped(text)
        else:
            text = text[: int(self.random.integers(len(text)))]
        return message(INFER, text)

    def picture(self) -> bytes:
        content = self.pictures[int(self.random.integers(len(self.pictures)))]
        if self.random.random() < 0.5:
            content = self.flipped(content)
        if self.random.random() < 0.5:
            content = content[: int(self.random.integers(len(content)))]
        return message(CLASSIFY + self.one(_OPTIONS), content, "content-type: image/png\r\n")

    def form(self) -> bytes:
        picture = self.pictures[0]
        names = (
            'form-data; name="image"; filename="a.png"',
            "form-data",
            'form-data; name="other"',
            "x" * 5000,
            "; name*=x",
        )
        disposition = self.one(names)
        part = f"--b\r\ncontent-disposition: {disposition}\r\n\r\n".encode() + picture + b"\r\n"
        body = part * int(self.random.integers(0, 20)) + b"--b--\r\n"
        if self.random.random() < 0.5:
            body = self.flipped(body, 0, min(len(body), 200))
        boundary = self.one(("b", "b", "b", '"b', "b" * 300, "", "c", "b; charset=\xff"))
        return message(CLASSIFY, body, f"content-type: multipart/form-data; boundary={boundary}\r\n")

    def address(self) -> bytes:
        return message(self.one(_PATHS), self.random.bytes(4), method=self.one(_METHODS))

    def header(self) -> bytes:
        body, _ = self.binary(1)
        return message(self.one((INFER, CLASSIFY)), body, self.one(_HEADERS) + "\r\n")

    def coding(self) -> bytes:
        body, size = self.binary(1)
        packed = zlib.compress(body)
        packed = (
            self.flipped(packed) if self.random.random() < 0.5 else packed[: int(self.random.integers(len(packed)))]
        )
        coding = self.one(("gzip", "deflate", "gzip, deflate", "zstd"))
        return message(INFER, packed, f"content-encoding: {coding}\r\ninference-header-content-length: {size}\r\n")

    def trailers(self) -> bytes:
        head = f"POST {INFER} HTTP/1.1\r\nhost: m\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\n".encode()
        return head + b"".join(b"x%d: %s\r\n" % (number, b"y" * 1000) for number in range(1000)) + b"\r\n"

    def bomb(self) -> bytes:
        return self.bombs[int(self.random.integers(len(self.bombs)))]

    def garbage(self) -> bytes:
        return self.random.bytes(int(self.random.integers(1, 300))) + b"\r\n\r\n"

    def head(self) -> bytes:
        body, size = self.binary(1)
        whole = self.asked(body, size)
        if self.random.random() < 0.7:
            return self.flipped(whole, 0, whole.index(b"\r\n\r\n"))
        wrong = (
            "content-length: 5\r\n",
            "transfer-encoding: chunked\r\n",
            "a" * 20_000 + ": b\r\n",
            "a: b\r\n" * 200,
            ": no name\r\n",
            "no colon\r\n",
            " folded\r\n",
            "connection: upgrade\r\nupgrade: h2c\r\n",
        )
        return message(INFER, body, self.one(wrong))

    def short(self) -> bytes:
        body, size = self.binary()
        whole = self.asked(body, size)
        return whole[: int(self.random.integers(1, len(whole)))]

    def chunks(self) -> bytes:
        head = f"POST {INFER} HTTP/1.1\r\nhost: m\r\ntransfer-encoding: chunked\r\n\r\n".encode()
        wrong = (
            "zz\r\n",
            "-1\r\n",
            "f" * 20 + "\r\n",
            "5\r\nabc",
            "1\r\nab\r\n",
            "0\r\nx: y\r\n\r\n",
            "3;" + "e" * 9000 + "\r\n",
        )
        return head + self.one(wrong).encode() + b"\r\n\r\n"


def _bombs() -> list[bytes]:
    """Requests that are small, and large once they are unpacked."""
    found = []
    for size, kind in (((9000, 9000), "PNG"), ((9000, 9000), "JPEG"), ((16_000, 16_000), "PNG")):
        file = io.BytesIO()
        with contextlib.suppress(Image.DecompressionBombWarning):
            Image.new("L", size).save(file, kind)
        found.append(message(CLASSIFY, file.getvalue(), "content-type: image/png\r\n"))
    head = b'{"inputs":[{"name":"images","shape":[1,1,8,8],"datatype":"FP32","data":['
    for body in (head + b"0," * (12 << 20) + b"0]}]}", head + b"[0]," * (6 << 20) + b"[0]]}]}", b"0" * (64 << 20)):
        found.append(message(INFER, zlib.compress(body), "content-encoding: deflate\r\n"))
    return found
