"""The server's life: start, slow clients, overload, reload, and an end that loses nothing."""

import contextlib
import gzip
import json
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import numpy as np
import pytest
from command_line import call
from live_server import LiveServer
from small_bundle import SHAPE, card, make
from test_routes import picture

from fdml import RobustClassifier


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("bundles") / "pets")


def until(condition, seconds: float = 10.0) -> None:
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, "it did not happen"
        time.sleep(0.05)


def test_no_torch_and_no_accepted_request_lost(bundle: Path) -> None:
    """SIGTERM while eight clients ask on connections that they keep."""
    with LiveServer(bundle) as server:
        maps = Path(f"/proc/{server.process.pid}/maps")
        if maps.exists():
            assert "libtorch" not in maps.read_text()
        lost, answered = [], []
        content = picture()

        def ask() -> None:
            with httpx.Client(base_url=server.address, timeout=20) as client:
                while True:
                    try:
                        answer = client.post("/v1/models/pets/classify", content=content)
                    except httpx.ConnectError:
                        return  # it listens no longer
                    except httpx.HTTPError as error:
                        lost.append(error)
                        return
                    answered.append(answer.status_code)

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        until(lambda: len(answered) > 50)
        assert server.end(signal.SIGTERM) == 0
        for thread in threads:
            thread.join(20)
        assert lost == []
        assert set(answered) == {200}
        assert server.events("draining")
        assert server.events("ended")


def test_a_bundle_written_anew_is_served_once_it_passes(tmp_path: Path) -> None:
    folder = make(tmp_path / "pets")
    other = make(tmp_path / "other", scale=4.0)
    broken = make(tmp_path / "broken", scale=float("nan"))
    config = tmp_path / "serve.toml"
    config.write_text(f'reload_seconds = 0.1\n[[models]]\npath = "{folder}"\n')
    with LiveServer("--config", config) as server, httpx.Client(base_url=server.address) as client:
        first = client.get("/v1/models/pets").json()["weights"]

        def replace(source: Path) -> None:
            for file in sorted(source.iterdir(), key=lambda path: path.name == "SHA256SUMS"):
                shutil.copy(file, folder / f"{file.name}.new")
            for file in sorted(source.iterdir(), key=lambda path: path.name == "SHA256SUMS"):
                (folder / f"{file.name}.new").replace(folder / file.name)

        replace(other)
        until(lambda: client.get("/v1/models/pets").json()["weights"] != first)
        second = client.get("/v1/models/pets").json()["weights"]
        assert second == RobustClassifier.load(other).sha256
        replace(broken)
        until(lambda: any("self-test failed" in each["reason"] for each in server.events("reload refused")))
        assert client.get("/v1/models/pets").json()["weights"] == second, "the old one serves on"
        assert client.post("/v1/models/pets/classify", content=picture()).status_code == 200
        assert 'fdml_reloads_total{model="pets",outcome="done"} 1.0' in client.get("/metrics").text


def cut_off(raw: socket.socket) -> bool:
    raw.setblocking(False)
    try:
        for _ in range(3):
            raw.send(b"GET /")
            time.sleep(0.1)
    except BlockingIOError:  # open, and full
        return False
    except OSError:
        return True
    return False


def test_slow_clients_are_ended(bundle: Path, tmp_path: Path) -> None:
    config = tmp_path / "serve.toml"
    config.write_text(
        f"""
        [[models]]
        path = "{bundle}"
        [limits]
        head_seconds = 0.5
        body_seconds = 0.5
        idle_seconds = 1.0
        write_seconds = 1.0
        connections = 4
        """
    )
    with LiveServer("--config", config) as server:
        for begun in (b"GET /v2 HT", b"POST /v2 HTTP/1.1\r\ncontent-length: 10\r\n\r\nabc"):
            with socket.create_connection(("127.0.0.1", server.port)) as raw:
                raw.settimeout(10)
                raw.sendall(begun)
                assert raw.recv(4096).startswith(b"HTTP/1.1 408 ")
        with socket.create_connection(("127.0.0.1", server.port)) as raw:
            raw.settimeout(10)
            raw.sendall(b"GET /v2 HTTP/1.1\r\nhost: a\r\n\r\n")
            assert raw.recv(4096).startswith(b"HTTP/1.1 200 ")
            assert raw.recv(4096) == b"", "idle for too long"
        with socket.create_connection(("127.0.0.1", server.port)) as raw:
            raw.settimeout(10)
            raw.sendall(b"GET /v2 HTTP/1.1\r\nhost: a\r\n\r\nGET /v2 HT")
            seen = b""
            while more := raw.recv(4096):
                seen += more
            assert seen.count(b"HTTP/1.1 200 ") == seen.count(b"HTTP/1.1 408 ") == 1, (
                "a second one that stays half sent"
            )
        with socket.create_connection(("127.0.0.1", server.port)) as raw:
            raw.settimeout(1)
            with contextlib.suppress(TimeoutError):
                for _ in range(200):
                    raw.sendall(b"GET /openapi.json HTTP/1.1\r\nhost: a\r\n\r\n" * 500)
            time.sleep(3)  # beyond write_seconds and the second between two looks
            assert cut_off(raw), "who does not read"
        time.sleep(1.5)
        crowd = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(5)]
        try:
            crowd[4].settimeout(10)
            assert crowd[4].recv(4096).startswith(b"HTTP/1.1 503 ")
        finally:
            for each in crowd:
                each.close()


def test_overload_is_refused_and_passes(tmp_path: Path) -> None:
    large = make(tmp_path / "large", card(shape=(3, 96, 96)))
    with LiveServer(large, "--queue", "8", "--max-batch", "8", "--threads", "1", "--log", "errors") as server:
        statuses: list[int] = []
        images = np.zeros((4, 3, 96, 96), np.float32)
        given = {"name": "images", "shape": images.shape, "datatype": "FP32"}
        given["parameters"] = {"binary_data_size": images.nbytes}
        body = json.dumps({"inputs": [given]}).encode()
        content = body + images.tobytes()
        ends = time.monotonic() + 3

        def ask() -> None:
            headers = {"inference-header-content-length": str(len(body))}
            with httpx.Client(base_url=server.address, timeout=20) as client:
                while time.monotonic() < ends:
                    answer = client.post("/v2/models/large/infer", content=content, headers=headers)
                    statuses.append(answer.status_code)
                    if answer.status_code == 503:
                        assert int(answer.headers["retry-after"]) >= 1

        threads = [threading.Thread(target=ask) for _ in range(24)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(statuses) == {200, 503}
        with httpx.Client(base_url=server.address) as client:
            assert client.post("/v1/models/large/classify", content=picture()).status_code == 200


def test_a_deadline_of_the_client(bundle: Path) -> None:
    with LiveServer(bundle, "--delay-ms", "500") as server:
        content = (
            b'{"parameters":{"timeout":50000},"inputs":[{"name":"images","shape":[1,3,8,8],"datatype":"FP32","data":['
            + b",".join([b"0"] * int(np.prod(SHAPE)))
            + b"]}]}"
        )
        answer = httpx.post(f"{server.address}/v2/models/pets/infer", content=content, timeout=20)
        assert answer.status_code == 504
        assert "deadline" in answer.json()["error"]


def test_spans_are_sent_and_go_on_where_the_client_began(bundle: Path) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    received: list[bytes] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            received.append(gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body)
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        where = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.server_port}"}
        trace = "4bf92f3577b34da6a3ce929d0e0e4736"
        with LiveServer(bundle, "--trace", env=where) as server:
            headers = {"traceparent": f"00-{trace}-00f067aa0ba902b7-01"}
            httpx.post(f"{server.address}/v1/models/pets/classify", content=picture(), headers=headers)
            assert server.end() == 0
        collector.shutdown()
    sent = b"".join(received)
    assert b"POST classify" in sent
    assert bytes.fromhex(trace) in sent
    assert b"pets" in sent


def test_tls(bundle: Path, tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    words = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "1",
    ]
    words += ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", cert]
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    subprocess.run(list(map(str, words)), check=True, capture_output=True)
    with LiveServer(bundle, "--tls-cert", cert, "--tls-key", key) as server:
        assert server.address.startswith("https://")
        trust = ssl.create_default_context(cafile=str(cert))
        answer = httpx.post(f"{server.address}/v1/models/pets/classify", content=picture(), verify=trust)
        assert answer.status_code == 200
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"{server.address}/v2".replace("https", "http"))


def test_mistakes_are_one_line(bundle: Path, tmp_path: Path) -> None:
    config = tmp_path / "serve.toml"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for words, message in (
            ([], "no model to serve"),
            ([tmp_path / "none"], "no such f"),
            ([bundle, f"pets={bundle}"], "version 1 of 'pets' is named twice"),
            ([f"a/b={bundle}"], "a model cannot be called 'a/b'"),
            ([f"a:b c={bundle}"], "a version cannot be 'b c'"),
            ([bundle, "--provider", "tpu"], "tpu"),
            ([bundle, "--port", port], f"cannot listen on 127.0.0.1 port {port}"),
            ([bundle, "--host", "0.0.0.0", "--allow-admin"], "needs a token with admin = true"),
            ([bundle, "--tls-cert", "a.pem"], "belong together"),
            ([bundle, "--tls-cert", "a.pem", "--tls-key", "b.pem"], "are no certificate with its key"),
            (["--config", tmp_path / "none.toml"], "none.toml: cannot be read"),
        ):
            code, _, err = call("serve", *words)
            assert code == 2, words
            assert message in err
            assert err.count("\n") == 1
    for text, message in (
        ("port = 99999", r"Expected `int` <= 65535 - at `$.port`"),
        ("prot = 1", "unknown field `prot`"),
        ("[batching]\nlargest = 0", "at `$.batching.largest`"),
        ('[[tokens]]\nname = "a"\nsha256 = "secret"', "at `$.tokens[0].sha256`"),
        ("port = ", "serve.toml"),
        ("\xff", "serve.toml"),
    ):
        config.write_bytes(text.encode("latin-1"))
        code, _, err = call("serve", "--config", config)
        assert code == 2, text
        assert message in err
        assert err.count("\n") == 1


def test_a_new_token_is_what_the_file_takes(bundle: Path, tmp_path: Path) -> None:
    code, text, _ = call("serve", "--new-token", "camera")
    assert code == 0
    token = text.split()[1]
    config = tmp_path / "serve.toml"
    config.write_text(f'[[models]]\npath = "{bundle}"\n' + text.split("\n", 2)[2])
    with LiveServer("--config", config) as server:
        assert httpx.get(f"{server.address}/v1/models").status_code == 401
        assert httpx.get(f"{server.address}/metrics").status_code == 401
        good = httpx.get(f"{server.address}/v1/models", headers={"authorization": f"Bearer {token}"})
        assert good.status_code == 200
        assert httpx.get(f"{server.address}/v2/health/live").status_code == 200
