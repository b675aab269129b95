"""How `fdml serve` holds up: throughput, latency, peers, overload, start, end, malformed requests. On this machine.

    python benchmarks/serve.py BUNDLE                                           # every part but the peers
    python benchmarks/serve.py BUNDLE --part throughput half --seconds 10 --json
    python benchmarks/serve.py BUNDLE --part peers --peers-python PEERS/bin/python

The load comes from wrk, another process (Debian: apt install wrk). The peers have an environment of their own:
python -m venv PEERS; PEERS/bin/pip install litserve fastapi uvicorn uvloop httptools onnxruntime numpy. Servers,
clients and the plain loop share the processors, over the loopback; what is compared takes turns, round after round.

throughput   64 connections that ask for the logits of one image, or of 8, in bytes; beside a loop of
             `InferenceSession.run` on batches as large as the server's were on average.
peers        the same load on FastAPI and LitServe.
half         the 99th percentile at half of the requests that saturate the server, which come evenly and
             at random; beside it a perfect server's that runs image after image.
overload     256 connections that ask for 8 images each without pause: twice the queue.
start        seconds from the spawn to the first 200 of /v2/health/ready; also after SIGKILL.
sigterm      requests that are lost when the server is told to end under load.
malformed    malformed requests of every kind, with an ordinary client beside them.
"""

import argparse
import contextlib
import json
import math
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from serve_live import (
    CONNECTIONS,
    Bench,
    Load,
    Server,
    answers,
    between,
    classified,
    ended,
    free_port,
    infers,
    loaded,
    request,
    served,
    statuses,
)
from serve_messages import INFER, infer, message

from fdml.runtime import RobustClassifier

HERE = Path(__file__).parent
SHARES = {"cnn": 0.60, "resnet18": 0.90}
"""The share of the plain loop's images that the server is to answer."""
DELAY = 0.002
"""Seconds for which the server waits for a batch by default."""
PEERS = ("fastapi", "litserve")
GROWTH = 64.0
"""MiB by which malformed requests may let the server grow, once it has seen the first tenth of them."""

# Parts ----------------------------------------------------------------------------------------------------------------


def throughput(bench: Bench) -> list[dict[str, Any]]:
    bar, rows = SHARES.get(bench.classifier.card.architecture, 0.0), []
    seconds = bench.options.seconds
    for count in (1, 8):
        with served(bench) as server:
            rounds: list[dict[str, float]] = []
            for _ in range(bench.options.rounds):
                before = server.counts()
                load = infers(bench, server, count, seconds=seconds)
                size = between(before, server.counts(), "batch_images")
                taken = bench.bare(max(1, round(size)), seconds)
                plain = round(size) * len(taken) / sum(taken)
                rounds.append({"size": size, "ours": load.rate * count, "plain": plain, "p99": load.p99})
                rounds[-1]["errors"] = load.refused + load.failed
        ratio = statistics.median(each["ours"] / each["plain"] for each in rounds)
        rows.append(
            {
                "images a request": count,
                "batch": middle(rounds, "size"),
                "images/s": middle(rounds, "ours"),
                "plain loop": middle(rounds, "plain"),
                "p99 ms": 1000 * middle(rounds, "p99"),
                "errors": int(sum(each["errors"] for each in rounds)),
                "ratio": ratio,
                "bar": bar,
                "holds": ratio >= bar and not any(each["errors"] for each in rounds),
            }
        )
    return rows


def middle(rounds: list[dict[str, float]], name: str) -> float:
    return statistics.median(each[name] for each in rounds)


def peers(bench: Bench) -> list[dict[str, Any]]:
    python = bench.options.peers_python
    if python is None:
        raise SystemExit("--part peers needs --peers-python")
    body, headers = bench.images(1).tobytes(), {"content-type": "application/octet-stream"}
    loads: dict[str, list[Load]] = {name: [] for name in ("fdml", *PEERS)}
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(served(bench))
        urls = {name: stack.enter_context(peer(bench, name, python)) for name in PEERS}
        for name in urls:
            loaded(bench.wrk(urls[name], body, headers, 1, CONNECTIONS))
        for turn in range(bench.options.rounds):
            for place in range(len(loads)):
                name = list(loads)[(place + turn) % len(loads)]
                if name == "fdml":
                    load = infers(bench, server, 1, seconds=bench.options.seconds)
                else:
                    load = loaded(bench.wrk(urls[name], body, headers, bench.options.seconds, CONNECTIONS))
                loads[name].append(load)
    better = [max(load.rate for load in each) for each in zip(*(loads[name] for name in PEERS), strict=True)]
    ratio = statistics.median(ours.rate / peer for ours, peer in zip(loads["fdml"], better, strict=True))
    p99 = {name: 1000 * statistics.median(load.p99 for load in each) for name, each in loads.items()}
    rows: list[dict[str, Any]] = [
        {
            "server": name,
            "requests/s": statistics.median(load.rate for load in each),
            "p50 ms": 1000 * statistics.median(load.p50 for load in each),
            "p99 ms": p99[name],
            "errors": sum(load.refused + load.failed for load in each),
        }
        for name, each in loads.items()
    ]
    rows[0] |= {"to the better": ratio, "bar": 1.5, "holds": ratio >= 1.5 and p99["fdml"] <= min(p99.values())}
    return rows


@contextlib.contextmanager
def peer(bench: Bench, name: str, python: str) -> Iterator[str]:
    """The address of a peer's server, in a session of its own: LitServe has processes that outlive their parent."""
    port = free_port()
    command = [python, str(HERE / "serve_peers.py"), name, str(bench.bundle / "model.onnx"), str(port)]
    log = bench.scratch / f"{name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    try:
        if not answers(port, "/health", 60):
            raise SystemExit(f"{name} did not start: {log.read_text()[-2000:]}")
        yield f"http://127.0.0.1:{port}/predict"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def half(bench: Bench) -> list[dict[str, Any]]:
    seconds, rounds = bench.options.seconds, []
    with served(bench) as server:
        for turn in range(2 * bench.options.rounds):
            random = turn % 2 == 1
            most = infers(bench, server, 1, seconds=seconds).rate
            before = server.counts()
            load = infers(bench, server, 1, seconds=seconds, connections=2 * CONNECTIONS, rate=most / 2, random=random)
            after = server.counts()
            size = between(before, after, "batch_images")
            alone = statistics.median(bench.bare(math.ceil(size), min(seconds, 2)))
            single = statistics.median(bench.bare(1, min(seconds, 2)))
            rounds.append(
                {
                    "arrivals": "random" if random else "even",
                    "saturation": most,
                    "requests/s": load.rate,
                    "batch": size,
                    "waited ms": 1000 * between(before, after, "queue_seconds"),
                    "ran ms": 1000 * between(before, after, "run_seconds"),
                    "alone ms": 1000 * alone,
                    "p50 ms": 1000 * load.p50,
                    "p99 ms": 1000 * load.p99,
                    "bar ms": 1000 * (DELAY + 2 * alone),
                    "queue ms": 1000 * queued(load.rate, single, random),
                    "holds": load.p99 <= DELAY + 2 * alone,
                }
            )
    return sorted(rounds, key=lambda each: each["arrivals"])


def queued(rate: float, seconds: float, random: bool) -> float:
    """The 99th percentile, in seconds, with a perfect server that runs one image after the other (Lindley, 1952)."""
    gaps = np.random.default_rng(0).exponential(1 / rate, 100_000) if random else np.full(100_000, 1 / rate)
    waits, wait = np.empty(len(gaps)), 0.0
    for place, gap in enumerate(gaps):
        wait = max(0.0, wait + seconds - gap)
        waits[place] = wait
    return float(np.percentile(waits + seconds, 99))


def overload(bench: Bench) -> list[dict[str, Any]]:
    deadline = 2.0
    with served(bench, "--deadline", str(deadline)) as server:
        rate = infers(bench, server, 8, seconds=bench.options.seconds).rate
        before = server.counts()
        memory = [server.megabytes]
        wrk = bench.wrk(server.url, *request(bench, 8), bench.options.overload_seconds, 4 * CONNECTIONS)
        while wrk.poll() is None:
            time.sleep(0.25)
            memory.append(server.megabytes)
        began = time.perf_counter()
        recovered = False
        while not recovered and time.perf_counter() < began + 30:
            recovered = classified(bench, server, bench.images(1)) is not None
        recovery = time.perf_counter() - began
        load, found = loaded(wrk), statuses(before, server.counts())
    return [
        {
            "saturation": rate,
            "offered/s": load.requests / load.seconds,
            "200/s": found.get("200", 0) / load.seconds,
            **{status: found.get(status, 0) for status in ("200", "503", "504")},
            "other": sum(found.values()) - sum(found.get(status, 0) for status in ("200", "503", "504")),
            "no answer": load.failed,
            "most s": load.most,
            "deadline s": deadline,
            "MiB": [round(memory[0]), round(memory[len(memory) // 2]), round(memory[-1])],
            "recovery s": recovery,
            "holds": load.most <= deadline + 0.5 and not load.failed and set(found) <= {"200", "503"} and recovered,
        }
    ]


def start(bench: Bench) -> list[dict[str, Any]]:
    port = free_port()
    command = [sys.executable, "-m", "fdml", "serve", f"m={bench.bundle}", "--port", str(port), "--log", "errors"]
    taken: dict[str, list[float]] = {"start": [], "after SIGKILL": []}
    torch = False
    for _ in range(5):
        for name in taken:
            began = time.perf_counter()
            process = subprocess.Popen(
                [*command, *bench.options.flags.split()], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            try:
                if not answers(port, "/v2/health/ready", 60):
                    raise SystemExit("the server did not start")
                taken[name].append(time.perf_counter() - began)
                torch = torch or "libtorch" in Path(f"/proc/{process.pid}/maps").read_text()
                if name == "start":  # killed with requests under way
                    with contextlib.ExitStack() as stack:
                        for _ in range(CONNECTIONS):
                            kept = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
                            body, line = infer(bench.images(1))
                            kept.sendall(message(INFER, body, line))
                        process.kill()
            finally:
                ended(process)
                process.wait()
    bars = {"start": 1.5, "after SIGKILL": 2.0}
    return [
        {
            "": name,
            "best s": min(each),
            "median s": statistics.median(each),
            "bar s": bars[name],
            "torch": "loaded" if torch else "not loaded",
            "holds": statistics.median(each) <= bars[name] and not torch,
        }
        for name, each in taken.items()
    ]


def sigterm(bench: Bench) -> list[dict[str, Any]]:
    rows = []
    for _ in range(bench.options.rounds):
        with served(bench) as server:
            command = [sys.executable, str(HERE / "serve_load.py"), "ending", str(server.port), *bench.shaped]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as client:
                assert client.stdout is not None
                assert client.stdout.readline() == "ready\n"
                time.sleep(min(2.0, bench.options.seconds))
                began = time.perf_counter()
                server.process.terminate()
                code = server.process.wait(60)
                ending = time.perf_counter() - began
                found = json.loads(client.stdout.read())
        holds = not found["lost"] and not found["unfinished"] and code == 0
        rows.append({**found, "exit": code, "ended s": ending, "holds": holds})
    return rows


def malformed(bench: Bench) -> list[dict[str, Any]]:
    images = bench.images(1)
    (right,) = bench.classifier.logits(images)
    asked, wrong, worst, done = 0, 0, 0.0, threading.Event()

    def ordinary(server: Server) -> None:
        nonlocal asked, wrong, worst
        while not done.is_set():
            began = time.perf_counter()
            found = classified(bench, server, images)
            worst = max(worst, time.perf_counter() - began)
            asked += 1
            wrong += found is None or not np.allclose(found[0], right, rtol=1e-3, atol=1e-4)
            done.wait(0.01)

    def send(server: Server, requests: int, seed: int) -> dict[str, Any]:
        command = [sys.executable, str(HERE / "serve_load.py"), "malformed", str(server.port), *bench.shaped]
        command += ["--requests", str(requests), "--seed", str(seed), "--seconds", str(bench.options.malformed_seconds)]
        return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)

    with served(bench) as server:
        client = threading.Thread(target=ordinary, args=(server,))
        client.start()
        try:
            tenth = bench.options.requests // 10
            memory = [server.megabytes]
            began = time.perf_counter()
            runs = [send(server, tenth, 1)]
            memory.append(server.megabytes)
            runs.append(send(server, bench.options.requests - tenth, 2))
            seconds = time.perf_counter() - began
            memory.append(server.megabytes)
        finally:
            done.set()
            client.join()
        alive = server.process.poll() is None and answers(server.port, "/v2/health/live", 5)
        text = server.log.read_text(errors="replace")
    kinds: dict[str, dict[str, int]] = {}
    for run in runs:
        for kind, status, number in run["counts"]:
            counts = kinds.setdefault(kind, {})
            counts[status] = counts.get(status, 0) + number
    total: dict[str, int] = {}
    for counts in kinds.values():
        for status, number in counts.items():
            total[status] = total.get(status, 0) + number
    bad = {
        status: number
        for status, number in total.items()
        if status in ("stuck", "broken")
        or (status.isdigit() and int(status) >= 500 and status not in ("501", "503", "504"))
    }
    columns = sorted(total)
    table = [
        {"kind": kind, **{status: counts.get(status, 0) for status in columns}}
        for kind, counts in sorted(kinds.items())
    ]
    show("malformed, by kind", table, bench.options.json)
    for run in runs:
        for name, example in run["examples"].items():
            print(f"{name}: {example!r}"[:1000], file=sys.stderr)
    if text.count('"defect"'):
        print(next(line for line in text.splitlines() if '"defect"' in line)[:3000], file=sys.stderr)
    return [
        {
            "requests": sum(run["requests"] for run in runs),
            "seconds": seconds,
            **{status: total[status] for status in columns},
            "MiB": [round(each) for each in memory],
            "ordinary": asked,
            "of them wrong": wrong,
            "worst s": worst,
            "defects": text.count('"defect"'),
            "holds": not bad and alive and not wrong and memory[2] - memory[1] <= GROWTH,
        }
    ]


PARTS: dict[str, Callable[[Bench], list[dict[str, Any]]]] = {
    "throughput": throughput,
    "peers": peers,
    "half": half,
    "overload": overload,
    "start": start,
    "sigterm": sigterm,
    "malformed": malformed,
}


def show(title: str, rows: list[dict[str, Any]], quiet: bool) -> None:
    """A table on standard output."""
    if quiet:
        return
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, *[[shown(row.get(name, "")) for name in names] for row in rows]]
    widths = [max(len(line[place]) for line in lines) for place in range(len(names))]
    print(f"\n{title}")
    for line in lines:
        print("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)))


def shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--part", nargs="+", choices=PARTS, help="(default: all; peers where they are given)")
    parser.add_argument("--seconds", type=float, default=5.0, help="of one load")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--flags", default="", help="more flags of `fdml serve`, in one word")
    parser.add_argument("--peers-python", help="the interpreter of the environment that has the peers")
    parser.add_argument("--overload-seconds", type=float, default=60.0)
    parser.add_argument("--requests", type=int, default=200_000, help="malformed ones")
    parser.add_argument("--malformed-seconds", type=float, default=600.0, help="at most, for nine tenths of them")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    parts = options.part or [name for name in PARTS if name != "peers" or options.peers_python]
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        classifier = RobustClassifier.load(options.bundle, threads=os.cpu_count())
        bench = Bench(options, options.bundle, Path(scratch), classifier)
        for part in parts:
            found[part] = PARTS[part](bench)
            show(part, found[part], options.json)
    if options.json:
        print(json.dumps({"bundle": options.bundle.name, "processors": os.cpu_count(), **found}))


if __name__ == "__main__":
    main()
