"""The server as its clients meet it: tritonclient, httpx, a browser's form, and raw sockets."""

import contextlib
import hashlib
import io
import json
import socket
import time
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from live_server import LiveServer
from PIL import Image
from small_bundle import CLASSES, SHAPE, card, make, network

from fdml import RobustClassifier
from fdml.bundle import write_sums

TOKEN = "a-token-of-a-camera"
ADMIN = "a-token-of-an-operator"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("bundles") / "pets")


@pytest.fixture(scope="module")
def live(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """Two versions of one model and a model without noise."""
    plain = make(tmp_path_factory.mktemp("plain") / "plain", card(sigma=0.0))
    with LiveServer(f"pets={bundle}", f"pets:2={bundle}", plain, "--max-samples", "2000", "--queue", "64") as server:
        yield server


@pytest.fixture
def http(live: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=live.address, timeout=20) as client:
        yield client


def picture(seed: int = 0, kind: str = "PNG", size: int = 8) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def triton() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("tritonclient.http")


# tritonclient, unmodified ---------------------------------------------------------------------------------------------


def test_tritonclient_asks_about_the_server_and_its_models(live: LiveServer) -> None:
    client = triton().InferenceServerClient(live.address.removeprefix("http://"))
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("pets")
    assert client.is_model_ready("pets", "2")
    assert not client.is_model_ready("pets", "3")
    assert client.get_server_metadata()["name"] == "fdml"
    found = client.get_model_metadata("pets")
    assert found["versions"] == ["1", "2"]
    assert found["inputs"] == [{"name": "images", "datatype": "FP32", "shape": [-1, *SHAPE]}]
    assert [each["name"] for each in found["outputs"]] == ["logits", "probabilities", "label"]
    assert client.get_model_config("pets")["max_batch_size"] == 64
    assert {each["name"] for each in client.get_inference_statistics()["model_stats"]} == {"pets", "plain"}
    client.close()


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("coding", [None, "gzip", "deflate"])
def test_tritonclient_infers(live: LiveServer, bundle: Path, binary: bool, coding: str | None) -> None:
    module = triton()
    client = module.InferenceServerClient(live.address.removeprefix("http://"))
    images = np.random.default_rng(1).random((5, *SHAPE), np.float32)
    asked = module.InferInput("images", images.shape, "FP32")
    asked.set_data_from_numpy(images, binary_data=binary)
    wish = [module.InferRequestedOutput(name, binary_data=binary) for name in ("logits", "label")]
    found = client.infer("pets", [asked], outputs=wish, request_id="7", request_compression_algorithm=coding)
    wanted = RobustClassifier.load(bundle).logits(images)
    assert np.allclose(found.as_numpy("logits"), wanted, atol=1e-4)
    labels = [CLASSES[index] for index in wanted.argmax(1)]
    assert [
        str(np.char.decode(each)) if isinstance(each, bytes) else each for each in found.as_numpy("label")
    ] == labels
    assert found.get_response()["id"] == "7"
    best = client.infer("pets", [asked], outputs=[module.InferRequestedOutput("logits", class_count=2)])
    assert best.as_numpy("logits").shape == (5, 2)
    client.close()


def test_tritonclient_is_told_what_is_wrong(live: LiveServer) -> None:
    module = triton()
    client = module.InferenceServerClient(live.address.removeprefix("http://"))
    for images, name, message in (
        (np.full((1, *SHAPE), 2.0, np.float32), "pets", r"images\[0\] has the pixel 2"),
        (np.full((2, *SHAPE), np.nan, np.float32), "pets", r"images\[0\] has the pixel nan"),
        (np.zeros((1, 3, 9, 9), np.float32), "pets", r"the shape \[1, 3, 9, 9\]"),
        (np.zeros((1, *SHAPE), np.float32), "pest", "did you mean 'pets'"),
    ):
        asked = module.InferInput("images", images.shape, "FP32")
        asked.set_data_from_numpy(images)
        with pytest.raises(module._utils.InferenceServerException, match=message):
            client.infer(name, [asked])
    client.close()


def test_tritonclient_loads_and_unloads(bundle: Path, tmp_path: Path) -> None:
    config = tmp_path / "serve.toml"
    tokens = "".join(
        f'[[tokens]]\nname = "{name}"\nsha256 = "{hashlib.sha256(token.encode()).hexdigest()}"\nadmin = {admin}\n'
        for name, token, admin in (("camera", TOKEN, "false"), ("operator", ADMIN, "true"))
    )
    config.write_text(f'allow_admin = true\n[[models]]\npath = "{bundle}"\n{tokens}')
    with LiveServer("--config", config) as server:
        module = triton()
        client = module.InferenceServerClient(server.address.removeprefix("http://"))
        admin, camera = ({"Authorization": f"Bearer {token}"} for token in (ADMIN, TOKEN))
        assert client.is_server_ready(), "who watches needs no token"
        for headers, message in (({}, "token is needed"), ({"Authorization": "Bearer x"}, "token is needed")):
            with pytest.raises(module._utils.InferenceServerException, match=message):
                client.get_model_metadata("pets", headers=headers)
        assert client.get_model_metadata("pets", headers=camera)["name"] == "pets"
        with pytest.raises(module._utils.InferenceServerException, match="may not load"):
            client.unload_model("pets", headers=camera)
        index = client.get_model_repository_index(headers=admin)
        assert index == [{"name": "pets", "version": "1", "state": "READY", "reason": ""}]
        client.unload_model("pets", headers=admin)
        assert not client.is_model_ready("pets", headers=admin)
        assert client.get_model_repository_index(headers=admin)[0]["state"] == "UNAVAILABLE"
        client.load_model("pets", headers=admin)
        assert client.is_model_ready("pets", headers=admin)
        with pytest.raises(module._utils.InferenceServerException, match="unknown model 'nets': did you mean 'pets'"):
            client.load_model("nets", headers=admin)
        client.close()


# Pictures -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
def test_a_picture_is_classified(http: httpx.Client, bundle: Path, kind: str) -> None:
    content = picture(kind=kind)
    found = http.post("/v1/models/pets/classify?top_k=2", content=content).json()
    wanted = RobustClassifier.load(bundle).predict(content, top_k=2)
    assert (found["label"], found["index"]) == (wanted.label, wanted.index)
    assert found["probability"] == pytest.approx(wanted.probability, abs=1e-5)
    assert [each["label"] for each in found["top"]] == [name for name, _ in wanted.top]
    assert sum(found["probabilities"]) == pytest.approx(1, abs=1e-5)
    assert (found["model"], found["version"]) == ("pets", "2"), "the highest version answers"
    assert found["weights"] == RobustClassifier.load(bundle).sha256
    assert "certified" not in found
    one = http.post("/v1/models/pets/versions/1/classify", content=content).json()
    assert one["version"] == "1"


def test_a_form_is_taken(http: httpx.Client) -> None:
    alone = http.post("/v1/models/pets/classify", content=picture()).json()
    form = http.post("/v1/models/pets/classify", files={"image": ("a.png", picture(), "image/png")}, data={"note": "x"})
    assert form.json() == alone
    for files, message in (({"picture": picture()}, "0 parts called image"), ({"image": b""}, "is empty")):
        answer = http.post("/v1/models/pets/classify", files=files)
        assert answer.status_code == 400
        assert message in answer.json()["error"]
    broken = http.post("/v1/models/pets/classify", content=b"x", headers={"content-type": "multipart/form-data"})
    assert (broken.status_code, broken.json()) == (400, {"error": "the form has no boundary, or one that is too long"})


def test_a_certificate_comes_with_the_answer(http: httpx.Client) -> None:
    found = http.post("/v1/models/pets/classify?certify=0.01&samples=500", content=picture()).json()["certified"]
    assert (found["norm"], found["asked"], found["sigma"], found["method"]) == ("l2", 0.01, 0.25, "smoothing")
    assert 0 <= found["samples"] <= 500
    assert found["holds"] == (found["radius"] >= 0.01)
    assert found["abstained"] == (found["radius"] == 0)
    huge = http.post("/v1/models/pets/classify?certify=3&samples=500", content=picture()).json()["certified"]
    assert not huge["holds"]


def test_a_certificate_without_time_abstains(http: httpx.Client) -> None:
    """A certificate ends 50 ms before the deadline: with less than that it shows nothing, and the answer comes."""
    address = "/v1/models/pets/classify?certify=0.1&timeout_ms=45"
    answers = (http.post(address, content=picture()) for _ in range(20))
    found = next(answer for answer in answers if answer.status_code == 200)  # a busy machine may be late with it
    certified = found.json()["certified"]
    assert certified["stopped"] == "deadline"
    assert certified["abstained"]
    assert (certified["label"], certified["radius"], certified["samples"]) == (None, 0, 0)
    assert not certified["holds"]


def test_a_proof_and_a_hint_where_the_bundle_has_what_they_need(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    from fdml.export.bounds import bounded

    folder = make(tmp_path / "full", card(sigma=0.0))
    model = onnx.load(folder / "model.onnx")
    hashed = hashlib.sha256((folder / "model.onnx").read_bytes()).hexdigest()
    (folder / "bounds.onnx").write_bytes(bounded(model, hashed).SerializeToString())
    (folder / "teacher.onnx").write_bytes(network(replace(card(), role="teacher"), scale=3.0))
    write_sums(folder)
    clf = RobustClassifier.load(folder)
    content = picture()
    with LiveServer(folder) as server, httpx.Client(base_url=server.address, timeout=20) as client:
        for radius in (1e-4, 1e-4, 0.5):
            found = client.post(f"/v1/models/full/classify?certify={radius}", content=content).json()
            proof = clf.certified_linf(content, radius)[0]
            certified = found["certified"]
            assert (certified["norm"], certified["method"], certified["alpha"]) == ("linf", "bounds", 0)
            assert certified["holds"] == proof.certified == (not certified["abstained"])
            assert certified["label"] == (proof.label if proof.certified else None)
        assert found["suspect"] == pytest.approx(float(clf.suspicion(content)[0]), abs=1e-5)
        found = client.post("/v1/models/full/classify?suspect=false", content=content).json()
        assert "suspect" not in found
        about = client.get("/v1/models/full").json()
        assert (about["certificates"], about["suspect"]) == (["linf"], True)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("pets/classify?top_k=0", "top_k='0': it is a whole number from 1 to 4"),
        ("pets/classify?top_k=1e9", "top_k='1e9'"),
        ("pets/classify?certify=nan", "certify='nan'"),
        ("pets/classify?certify=0.1&norm=l1", "norm='l1'"),
        ("pets/classify?certify=0.1&norm=linf", "no certificates in linf; it has in l2"),
        ("plain/classify?certify=0.1", "plain has no certificates"),
        ("pets/classify?samples=2001", "from 100 to 2000"),
        ("pets/classify?suspect=maybe", "suspect='maybe'"),
        ("pets/classify?topk=3", "unknown option 'topk'"),
        ("pets/classify?top_k=1&top_k=2", "given twice"),
        ("pets/classify?top_k", "are not as in"),
        ("pets/classify?timeout_ms=-1", "timeout_ms='-1'"),
    ],
)
def test_options_that_cannot_be(http: httpx.Client, address: str, message: str) -> None:
    answer = http.post(f"/v1/models/{address}", content=picture())
    assert answer.status_code == 400
    assert message in answer.json()["error"]


@pytest.mark.parametrize(
    "content",
    [b"", b"GIF89a", picture()[:60], b"\x89PNG\r\n\x1a\n" + b"\0" * 100, b"\xff\xd8\xff" + b"\0" * 50, b"<svg/>" * 99],
)
def test_what_is_no_picture(http: httpx.Client, content: bytes, tmp_path: Path) -> None:
    answer = http.post("/v1/models/pets/classify", content=content)
    assert answer.status_code == 400
    assert list(answer.json()) == ["error"]
    assert "/" not in answer.json()["error"].replace("and/or", ""), "no path of the server"


def test_a_bomb_is_refused(http: httpx.Client) -> None:
    stream = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(stream, "PNG")
    began = time.monotonic()
    answer = http.post("/v1/models/pets/classify", content=stream.getvalue())
    assert answer.status_code == 400
    assert time.monotonic() - began < 5
    stream = io.BytesIO()
    Image.new("L", (6000, 5000)).save(stream, "PNG")
    answer = http.post("/v1/models/pets/classify", content=stream.getvalue())
    assert answer.status_code == 400
    assert "25000000" in answer.json()["error"], "a picture of 30 million pixels is not decoded"
    squeezed = zlib.compress(bytes(64 << 20), 9)
    answer = http.post("/v2/models/pets/infer", content=squeezed, headers={"content-encoding": "deflate"})
    assert answer.status_code == 413


# The rest -------------------------------------------------------------------------------------------------------------


def test_the_models_are_listed(http: httpx.Client) -> None:
    found = http.get("/v1/models").json()["models"]
    assert [(each["name"], each["version"]) for each in found] == [("pets", "1"), ("pets", "2"), ("plain", "1")]
    assert found[0]["certificates"] == ["l2"]
    assert found[2]["certificates"] == []
    assert found[0]["classes"] == list(CLASSES)
    assert http.get("/v1/models/pets").json()["version"] == "2"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/v1/models/nobody", 404),
        ("POST", "/v1/models/nobody/classify", 404),
        ("GET", "/v1/models/pets/versions/9/classify", 405),
        ("POST", "/v1/models/pets/versions/9/classify", 404),
        ("GET", "/v2/models/pets/infer", 405),
        ("POST", "/v2", 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/v2/repository/index", 403),
        ("GET", "/v2/models/nobody/ready", 404),
        ("GET", "/v1/models/..%2f..%2fetc%2fpasswd", 404),
        ("HEAD", "/v1/models", 200),
    ],
)
def test_addresses(http: httpx.Client, method: str, path: str, status: int) -> None:
    answer = http.request(method, path)
    assert answer.status_code == status
    if status == 405:
        assert answer.headers["allow"] in ("GET", "POST")
    if method == "HEAD":
        assert answer.content == b""
        assert int(answer.headers["content-length"]) > 0
    elif status != 200 and "ready" not in path:
        assert list(answer.json()) == ["error"]


def test_the_interface_is_described(http: httpx.Client) -> None:
    found = http.get("/openapi.json").json()
    assert found["openapi"] == "3.1.0"
    assert "/v1/models/{model}/classify" in found["paths"]
    page = http.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "pets" in page.text
    for outside in ("<script", "http://", "https://"):
        assert outside not in page.text.replace("http://127.0.0.1:8000", "")


def test_what_is_counted(http: httpx.Client, live: LiveServer) -> None:
    def counted() -> dict[str, float]:
        lines = [line for line in http.get("/metrics").text.splitlines() if not line.startswith("#")]
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}

    before = counted()
    http.post("/v1/models/plain/classify", content=picture())
    http.post("/v1/models/pets/classify?certify=0.01&samples=200", content=picture())
    after = counted()
    key = 'fdml_requests_total{model="plain",route="classify",status="200"}'
    assert after[key] == before.get(key, 0) + 1
    key = 'fdml_request_seconds_count{model="plain",route="classify"}'
    assert after[key] == before.get(key, 0) + 1
    assert after['fdml_batch_images_sum{model="plain"}'] == before.get('fdml_batch_images_sum{model="plain"}', 0) + 1
    certificates = [value for name, value in after.items() if name.startswith("fdml_certificates_total")]
    assert sum(certificates) >= 1
    raw_answer(live, b"nonsense\r\n\r\n")
    key = 'fdml_requests_total{model="",route="refused",status="400"}'
    assert counted()[key] == after.get(key, 0) + 1
    assert after["process_resident_memory_bytes"] > 1e6


def test_a_request_is_known_by_its_id(http: httpx.Client, live: LiveServer) -> None:
    answer = http.get("/v1/models", headers={"x-request-id": "abc-123"})
    assert answer.headers["x-request-id"] == "abc-123"
    for bad in ("a b", "x" * 200, "é"):
        given = http.get("/v1/models", headers=[(b"x-request-id", bad.encode())]).headers["x-request-id"]
        assert given != bad
    time.sleep(0.3)
    (line,) = [line for line in live.events("request") if line["id"] == "abc-123"]
    assert (line["status"], line["path"], line["method"]) == (200, "/v1/models", "GET")


def test_no_answer_waits_for_another_connection(live: LiveServer) -> None:
    """Requests sent at once on one connection are answered in their order."""
    with socket.create_connection(("127.0.0.1", live.port)) as raw:
        raw.settimeout(10)
        raw.sendall(b"".join(b"GET /v2 HTTP/1.1\r\nhost: a\r\nx-request-id: r%d\r\n\r\n" % n for n in range(5)))
        seen = b""
        while seen.count(b"HTTP/1.1 200") < 5 or not seen.endswith(b"}"):
            seen += raw.recv(65536)
    places = [seen.index(b"x-request-id: r%d\r\n" % number) for number in range(5)]
    assert places == sorted(places)


def test_many_requests_at_once_on_one_connection(live: LiveServer) -> None:
    with socket.create_connection(("127.0.0.1", live.port)) as raw:
        raw.settimeout(20)
        raw.sendall(b"GET /v2 HTTP/1.1\r\nhost: a\r\n\r\n" * 3000)
        seen = 0
        tail = b""
        while seen < 3000:
            more = raw.recv(1 << 20)
            assert more
            tail += more
            seen += tail.count(b"HTTP/1.1 200")
            assert b"HTTP/1.1 5" not in tail
            tail = tail[-11:]


def memory(live: LiveServer) -> int:
    """Resident memory of the server, in KiB."""
    text = Path(f"/proc/{live.process.pid}/status").read_text()
    return int(text.partition("VmRSS:")[2].split()[0])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_a_client_that_does_not_read_costs_no_memory(live: LiveServer, http: httpx.Client) -> None:
    http.get("/docs")
    before = memory(live)
    with socket.create_connection(("127.0.0.1", live.port)) as raw:
        raw.settimeout(1)
        block = b"GET /docs HTTP/1.1\r\nhost: a\r\n\r\n" * 500
        with contextlib.suppress(TimeoutError):
            for _ in range(200):
                raw.sendall(block)
        assert http.get("/v2/health/live").status_code == 200
        assert memory(live) - before < 30_000


@pytest.mark.parametrize("trailer", [b"x: " + b"v" * 65_536, b"".join(b"x%d: y\r\n" % n for n in range(9000))])
def test_trailers_are_bounded_and_say_nothing(live: LiveServer, http: httpx.Client, trailer: bytes) -> None:
    head = b"POST /v2/models/pets/infer HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\n"
    for pieces in ((head, trailer), (head + trailer,)):
        assert raw_answer(live, *pieces, pause=0.05).startswith(b"HTTP/1.1 431 ")
    seen = raw_answer(live, head.replace(b"host", b"connection: close\r\nhost"), b"x-request-id: trailing\r\n\r\n")
    assert seen.startswith(b"HTTP/1.1 400 ")
    assert b"trailing" not in seen


def raw_answer(live: LiveServer, *pieces: bytes, pause: float = 0.0) -> bytes:
    with socket.create_connection(("127.0.0.1", live.port)) as raw:
        raw.settimeout(15)
        try:
            for piece in pieces:
                raw.sendall(piece)
                time.sleep(pause)
        except OSError:
            pass  # refused while it was sending
        seen = b""
        try:
            while more := raw.recv(65536):
                seen += more
        except ConnectionResetError:
            pass
        return seen


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nhost: a\r\nx: " + b"y" * 70_000, 431),
        (b"GET / HTTP/1.1\r\n" + b"".join(b"h%d: x\r\n" % n for n in range(200)) + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\nhost: a\r\nx: " + b"y" * 20_000 + b"\r\n\r\n", 431),
        (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n", 431),
        (b"POST /v2/models/pets/infer HTTP/1.1\r\ncontent-length: 99999999999\r\n\r\n", 413),
        (b"POST /v2 HTTP/1.1\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"POST /v2 HTTP/1.1\r\ncontent-length: -5\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nconnection: upgrade\r\nupgrade: h2c\r\ncontent-length: 1\r\n\r\n0", 501),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    ],
)
def test_what_is_no_request_is_answered_and_ended(live: LiveServer, request_bytes: bytes, status: int) -> None:
    seen = raw_answer(live, request_bytes)
    assert seen.startswith(b"HTTP/1.1 %d " % status)
    assert b"connection: close" in seen
    body = seen.partition(b"\r\n\r\n")[2]
    assert list(json.loads(body)) == ["error"]


def test_a_body_in_chunks_and_in_pieces(live: LiveServer) -> None:
    content = picture()
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (content[:10], content[10:])) + b"0\r\n\r\n"
    head = b"POST /v1/models/pets/classify HTTP/1.1\r\nhost: a\r\nconnection: close\r\n"
    seen = raw_answer(live, head, b"transfer-encoding: chunked\r\n\r\n", chunks[:30], chunks[30:], pause=0.02)
    assert seen.startswith(b"HTTP/1.1 200 ")
    tiny = b"".join(b"1\r\n%c\r\n" % byte for byte in content) + b"0\r\n\r\n"
    seen = raw_answer(live, head, b"transfer-encoding: chunked\r\n\r\n", tiny)
    assert seen.startswith(b"HTTP/1.1 200 "), "a byte a chunk is no attack"
    expecting = head + b"content-length: %d\r\nexpect: 100-continue\r\n\r\n" % len(content)
    seen = raw_answer(live, expecting, content, pause=0.1)
    assert seen.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 ")


def test_an_offer_of_another_protocol_is_not_taken_up(live: LiveServer) -> None:
    seen = raw_answer(live, b"GET /v2 HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n")
    assert seen.startswith(b"HTTP/1.1 200 ")
    assert seen.count(b"HTTP/1.1") == 1


def test_old_clients_are_answered(live: LiveServer) -> None:
    seen = raw_answer(live, b"GET /v2 HTTP/1.0\r\n\r\n")
    assert seen.startswith(b"HTTP/1.1 200")
    assert b"connection: close" in seen
