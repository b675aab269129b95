"""What no server may do whatever it is sent: fail, answer otherwise than its own document says, or lose its way.

`benchmarks/serve.py --part malformed` sends hundreds of thousands of such requests.
"""

import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from live_server import LiveServer
from schemathesis import GenerationMode
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from small_bundle import make

from fdml.serve.wire import Reader, WireError

# A 5xx that the document does not name is none of its statuses.
CHECKS = [
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
SHAPE = (1, 2, 2)
RIGHT = {"inputs": [{"name": "images", "shape": [1, *SHAPE], "datatype": "FP32", "data": [0, 0, 0, 0]}]}
SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
NAMES = ("pets", "pets", "pets", "none")

# The binary form ------------------------------------------------------------------------------------------------------

_NUMBERS = st.sampled_from([-1, 0, 1, 2, 16, 1.5, 2**31, 2**63, 2**64, 10**30, 10**400]) | st.integers() | st.floats()
_SCALARS = st.none() | st.booleans() | _NUMBERS | st.text(max_size=20)
_JSON = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=5,
)
_PARAMETERS = st.dictionaries(
    st.sampled_from(["binary_data_size", "binary_data", "binary_data_output", "classification", "timeout"]),
    _NUMBERS | st.booleans() | st.none(),
    min_size=1,
)


_WRONG: dict[str, st.SearchStrategy] = {
    "id": _JSON,
    "inputs": _JSON,
    "name": _JSON,
    "shape": st.lists(_NUMBERS, max_size=5) | _JSON,
    "datatype": st.sampled_from(["FP16", "FP64", "UINT8"]) | _JSON,
    "data": st.lists(_NUMBERS, min_size=4, max_size=4) | _JSON,
    "told": _PARAMETERS,
    "parameters": _PARAMETERS,
    "outputs": _JSON,
    "output": st.sampled_from(["label", "probabilities"]) | _JSON,
    "wish": _PARAMETERS,
    "raw": st.binary(max_size=40),
    "length": st.none() | st.binary(max_size=30) | st.integers().map(lambda n: b"%d" % n),
    "text": st.binary(max_size=3),
}


@st.composite
def requests(draw: st.DrawFn) -> tuple[bytes, bytes | None]:
    """A body and the length of its JSON, as they should be but for one or two parts."""
    wrong = draw(st.sets(st.sampled_from(sorted(_WRONG)), max_size=2))

    def part(name: str, usual: Any) -> Any:
        return draw(_WRONG[name]) if name in wrong else usual

    count, binary = draw(st.integers(1, 2)), draw(st.booleans())
    tensor = {"name": part("name", "images"), "shape": part("shape", [count, *SHAPE])}
    tensor["datatype"] = part("datatype", "FP32")
    if binary:
        tensor["parameters"] = part("told", {"binary_data_size": 16 * count})
    else:
        tensor["data"] = part("data", np.zeros((count, *SHAPE)).tolist())
    wish = {"name": part("output", "logits"), "parameters": part("wish", {"binary_data": binary})}
    head = {"id": part("id", "a"), "inputs": part("inputs", [tensor]), "outputs": part("outputs", [wish])}
    text = json.dumps(head | {"parameters": part("parameters", {})}).encode()
    if "text" in wrong:
        place = draw(st.integers(0, len(text) - 1))
        text = text[:place] + draw(_WRONG["text"]) + text[place + draw(st.integers(0, 3)) :]
    return text + part("raw", bytes(16 * count * binary)), part("length", str(len(text)).encode())


@settings(max_examples=250, suppress_health_check=SLOW)
@given(requests())
@example((json.dumps(RIGHT | {"parameters": {"timeout": 10**400}}).encode(), None))
@example((json.dumps(RIGHT).encode().replace(b"[0, 0, 0, 0]", b'[["\xb0"]]'), None))
def test_a_request_is_read_or_refused_in_a_line(request: tuple[bytes, bytes | None]) -> None:
    reader, message = Reader(SHAPE, 2), ""
    for _ in range(2):  # the second time from what is remembered
        try:
            plan, images = reader.read(*request)
        except WireError as error:
            message = str(error)
            continue
        assert images.dtype == np.float32
        assert images.shape in {(1, *SHAPE), (2, *SHAPE)}
        assert plan.timeout is None or plan.timeout > 0
        assert plan.wants
    assert "\n" not in message
    assert len(message) < 1000


@given(st.binary(max_size=200), st.none() | st.binary(max_size=6))
def test_bytes_are_read_or_refused(body: bytes, length: bytes | None) -> None:
    with pytest.raises(WireError):
        Reader(SHAPE, 2).read(body, length)


# A server -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with LiveServer(f"pets={make(tmp_path_factory.mktemp('bundles') / 'pets')}", "--log", "errors") as live:
        yield live
        assert httpx.get(f"{live.address}/v2/health/live").status_code == 200
        assert live.end() == 0
        assert not live.events("defect")


def test_every_answer_is_as_the_document_has_it(server: LiveServer) -> None:
    document = httpx.get(f"{server.address}/openapi.json").raise_for_status().json()
    schema = schemathesis.openapi.from_dict(document)
    for result in schema.get_all_operations():
        assert isinstance(result, Ok)
        for mode in GenerationMode:
            check(result.ok(), mode, server.address)


def check(operation: Any, mode: GenerationMode, address: str) -> None:
    """Requests to one operation, such as its document allows or such as it does not."""

    @settings(max_examples=3, suppress_health_check=SLOW)
    @given(operation.as_strategy(generation_mode=mode), st.sampled_from(NAMES), st.sampled_from(["1", "2"]))
    def ask(case: Any, model: str, version: str) -> None:
        case.path_parameters.update({"model": model, "version": version})
        case.call_and_validate(base_url=address, checks=CHECKS)

    try:
        ask()
    except Unsatisfiable:  # nothing is wrong for an operation that takes anything
        assert mode is GenerationMode.NEGATIVE


@settings(max_examples=150)
@given(st.lists(st.binary(min_size=1, max_size=200), max_size=4), st.booleans())
def test_no_bytes_on_a_connection_break_the_server(server: LiveServer, pieces: list[bytes], after: bool) -> None:
    good = b"GET /v2/health/live HTTP/1.1\r\nhost: a\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        raw.settimeout(10)
        if after:
            raw.sendall(good)
            assert raw.recv(4096).startswith(b"HTTP/1.1 200 ")
        for piece in pieces:
            try:
                raw.sendall(piece)
            except OSError:
                break  # it was refused and closed
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        raw.settimeout(10)
        raw.sendall(good)
        assert raw.recv(4096).startswith(b"HTTP/1.1 200 ")
