"""A server to measure, the load that wrk puts on it, and what both say: for `benchmarks/serve.py`."""

import argparse
import contextlib
import http.client
import json
import math
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from serve_messages import INFER, infer

from fdml.runtime import RobustClassifier

CONNECTIONS = 64

LUA = """
local file = io.open(%(body)s, "rb")
wrk.method, wrk.body = "POST", file:read("*a")
for name, value in pairs({%(headers)s}) do wrk.headers[name] = value end
%(delay)s
function done(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format(
    '{"requests":%%d,"seconds":%%f,"p50":%%f,"p99":%%f,"most":%%f,"refused":%%d,"failed":%%d}\\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e6, latency:percentile(99) / 1e6,
    latency.max / 1e6, errors.status, errors.connect + errors.read + errors.write + errors.timeout))
end
"""
PAUSE = """
local ffi = require("ffi")
ffi.cdef[[typedef struct {long s; long ns;} fdml_time; int clock_gettime(int, fdml_time*);]]
local time, at = ffi.new("fdml_time"), 0
math.randomseed(1)
function delay()
  ffi.C.clock_gettime(1, time)
  local now = tonumber(time.s) * 1e3 + tonumber(time.ns) / 1e6
  at = math.max(at + %(gap)f * (%(random)s and -math.log(1 - math.random()) or 1), now)
  return math.floor(at - now + 0.5)
end
"""
"""A connection's pause before its next request, which takes the next free moment of one timetable for all."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """What wrk saw; seconds. ``refused`` were answered with an error, ``failed`` not at all."""

    requests: int
    seconds: float
    p50: float
    p99: float
    most: float
    refused: int
    failed: int

    @property
    def rate(self) -> float:
        """Requests a second that were answered well."""
        return (self.requests - self.refused) / self.seconds


@dataclass
class Bench:
    """What every part is given."""

    options: argparse.Namespace
    bundle: Path
    scratch: Path
    classifier: RobustClassifier

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.classifier.input

    @property
    def shaped(self) -> list[str]:
        """The shape as the clients are told it."""
        return ["--shape", *map(str, self.shape)]

    def images(self, count: int) -> np.ndarray:
        return np.random.default_rng(0).random((count, *self.shape), np.float32)

    def bare(self, size: int, seconds: float) -> list[float]:
        """Seconds of each call in a plain loop of `InferenceSession.run` on a batch of ``size``."""
        session, x = self.classifier._opened.session, self.images(size)
        session.run(["logits"], {"images": x})
        taken, ends = [], time.perf_counter() + seconds
        while (began := time.perf_counter()) < ends:
            session.run(["logits"], {"images": x})
            taken.append(time.perf_counter() - began)
        return taken

    def wrk(
        self,
        url: str,
        body: bytes,
        headers: dict[str, str],
        seconds: float,
        connections: int,
        *,
        rate: float = 0,
        random: bool = False,
    ) -> "subprocess.Popen[str]":
        """Starts wrk. With ``rate`` it sends so many requests a second, evenly or at random, otherwise all it can."""
        (self.scratch / "body").write_bytes(body)
        pause = PAUSE % {"gap": 1000 / rate, "random": str(random).lower()} if rate else ""
        lines = ", ".join(f'["{name}"] = "{value}"' for name, value in headers.items())
        script = self.scratch / "load.lua"
        script.write_text(LUA % {"body": json.dumps(str(self.scratch / "body")), "headers": lines, "delay": pause})
        command = ["wrk", "-t", "1", "-c", str(connections), "-d", f"{math.ceil(seconds)}s", "--timeout", "30s"]
        return subprocess.Popen([*command, "-s", str(script), url], stdout=subprocess.PIPE, text=True)


def loaded(wrk: "subprocess.Popen[str]") -> Load:
    """What a wrk that was started saw."""
    out, _ = wrk.communicate(timeout=300)
    return Load(**json.loads(out.strip().splitlines()[-1]))


class Server:
    """A `fdml serve` of its own process, the bundle called m."""

    def __init__(self, process: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
        self.process, self.port, self.log = process, port, log
        self.url = f"http://127.0.0.1:{port}{INFER}"

    def get(self, path: str) -> bytes:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        with contextlib.closing(connection):
            connection.request("GET", path)
            return connection.getresponse().read()

    def counts(self) -> dict[str, float]:
        """Its metrics, by name and labels as they are written."""
        lines = [line.rpartition(" ") for line in self.get("/metrics").decode().splitlines() if line[:5] == "fdml_"]
        return {name: float(value) for name, _, value in lines}

    @property
    def megabytes(self) -> float:
        """MiB in memory (RSS)."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) / 1024


@contextlib.contextmanager
def served(bench: Bench, *flags: str) -> Iterator[Server]:
    """A server that is ready, and its end."""
    log = bench.scratch / "server.log"
    command = [sys.executable, "-m", "fdml", "serve", f"m={bench.bundle}", "--port", "0", "--log", "errors"]
    with log.open("wb") as errors, subprocess.Popen(
        [*command, *bench.options.flags.split(), *flags], stdout=subprocess.PIPE, stderr=errors
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            port = None
            while port is None:
                line = process.stdout.readline()
                if not line:
                    raise SystemExit(f"the server did not start: {log.read_text()[-2000:]}")
                port = re.search(rb"http://[^:/]+:(\d+)", line)
            server = Server(process, int(port[1]), log)
            infers(bench, server, 1, seconds=1)  # warm
            yield server
        finally:
            ended(process)


def ended(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(40)
        except subprocess.TimeoutExpired:
            process.kill()


def request(bench: Bench, count: int) -> tuple[bytes, dict[str, str]]:
    body, line = infer(bench.images(count))
    name, _, value = line.strip().partition(": ")
    return body, {name: value, "content-type": "application/octet-stream"}


def infers(
    bench: Bench,
    server: Server,
    count: int,
    *,
    seconds: float,
    connections: int = CONNECTIONS,
    rate: float = 0,
    random: bool = False,
) -> Load:
    return loaded(bench.wrk(server.url, *request(bench, count), seconds, connections, rate=rate, random=random))


def between(before: dict[str, float], after: dict[str, float], name: str) -> float:
    """The mean of what a histogram took in between two looks."""
    label = '{model="m"}'
    total, number = (
        after[f"fdml_{name}_{part}{label}"] - before.get(f"fdml_{name}_{part}{label}", 0) for part in ("sum", "count")
    )
    return total / number


def statuses(before: dict[str, float], after: dict[str, float]) -> dict[str, int]:
    """Requests to infer by the status of their answer, between two looks."""
    found = {}
    for name, value in after.items():
        if match := re.fullmatch(r'fdml_requests_total{model="m",route="infer",status="(\d+)"}', name):
            found[match[1]] = int(value - before.get(name, 0))
    return {status: number for status, number in found.items() if number}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def answers(port: int, path: str, seconds: float) -> bool:
    """Waits for a 200."""
    ends = time.perf_counter() + seconds
    while time.perf_counter() < ends:
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            with contextlib.closing(connection):
                connection.request("GET", path)
                if connection.getresponse().status == 200:
                    return True
        time.sleep(0.002)
    return False


def classified(bench: Bench, server: Server, images: np.ndarray) -> np.ndarray | None:
    """The logits of images from a connection of its own; None where they are not to be had."""
    body, headers = request(bench, len(images))
    with contextlib.suppress(OSError, http.client.HTTPException):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        with contextlib.closing(connection):
            connection.request("POST", INFER, body, headers)
            answer = connection.getresponse()
            content = answer.read()
            if answer.status == 200:
                size = int(answer.headers["inference-header-content-length"])
                return np.frombuffer(content[size:], np.float32).reshape(len(images), -1)
    return None
