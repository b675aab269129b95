"""The clients of `benchmarks/serve.py` that check every answer, each in a process of its own.

    python benchmarks/serve_load.py ending PORT --shape 1 28 28          # asks until the server has gone
    python benchmarks/serve_load.py malformed PORT --shape 1 28 28 --requests 20000 --seed 0

Each prints one JSON object. `ending` prints a line "ready" before it, once all its connections were answered.
"""

import argparse
import asyncio
import json
import re
import time
from collections import Counter

import numpy as np
import uvloop
from serve_messages import INFER, Messages, infer, message

LONG = 300
"""Requests that wait behind one which takes a moment, in the longest pipelines."""
_LENGTH = re.compile(rb"\r\ncontent-length: (\d+)\r\n")


async def answer(reader: asyncio.StreamReader) -> tuple[int, bool, bytes]:
    """Status, whether the connection stays, body. Raises ``EOFError`` or ``OSError`` where it ends before."""
    head = await reader.readuntil(b"\r\n\r\n")
    found = _LENGTH.search(head)
    body = await reader.readexactly(int(found[1])) if found else b""
    return int(head[9:12]), b"\r\nconnection: close\r\n" not in head, body


async def ending(port: int, shape: tuple[int, ...], connections: int, seconds: float) -> dict[str, int]:
    """Asks without pause until connections are refused. Half of the connections are kept, half are new each time."""
    body, line = infer(np.random.default_rng(0).random((1, *shape), np.float32))
    request = message(INFER, body, line)
    counts: Counter[str] = Counter()
    ready = 0

    async def client(keep: bool) -> None:
        nonlocal ready
        first = True
        while True:
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                counts["refused"] += 1
                return
            stays = True
            while stays:
                try:
                    writer.write(request)
                    await writer.drain()
                    status, stays, _ = await answer(reader)
                except (EOFError, OSError):
                    counts["lost"] += 1
                    writer.close()
                    return
                counts[str(status)] += 1
                stays = stays and keep
                if first:
                    first = False
                    ready += 1
                    if ready == connections:
                        print("ready", flush=True)
            writer.close()

    tasks = [asyncio.create_task(client(number % 2 == 0)) for number in range(connections)]
    _, late = await asyncio.wait(tasks, timeout=seconds)
    for task in late:
        task.cancel()
    return {"lost": 0, "unfinished": len(late), **counts}


async def malformed(port: int, shape: tuple[int, ...], requests: int, seed: int, seconds: float) -> dict[str, object]:
    """Sends ``requests`` malformed requests, most in pipelines of kept connections, and counts what comes back.

    "closed" are those behind one after which the server ended the connection, which is its right; "none" those on a
    connection of their own to which nothing came. "stuck" had no answer in time, and "broken" lost the connection
    without an answer that announced it: both are defects.
    """
    messages = Messages(shape, seed)
    counts: Counter[tuple[str, str]] = Counter()
    examples: dict[str, str] = {}
    left = requests
    ends = time.monotonic() + seconds

    def add(kind: str, status: int, sent: bytes, body: bytes) -> None:
        counts[kind, str(status)] += 1
        if status in (500, 502) and len(examples) < 20:
            examples.setdefault(f"{kind} {status}", f"{sent[:700].decode('latin-1')} -> {body[:200].decode('latin-1')}")

    async def pipelined() -> None:
        nonlocal left
        while left > 0 and time.monotonic() < ends:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            stays = True
            while stays and left > 0 and time.monotonic() < ends:
                kinds = messages.pick(messages.whole, int(messages.random.integers(1, 17)))
                if messages.random.random() < 0.005:
                    kinds = ["pixels"] + ["address"] * LONG
                left -= len(kinds)
                batch = [messages.whole[kind][1]() for kind in kinds]
                writer.write(b"".join(batch))
                for place, kind in enumerate(kinds):
                    try:
                        async with asyncio.timeout(15):
                            status, stays, body = await answer(reader)
                    except (EOFError, OSError) as error:
                        end = "stuck" if isinstance(error, TimeoutError) else "broken"
                        counts[kind, end] += 1
                        examples.setdefault(f"{kind} {end}", batch[place][:700].decode("latin-1"))
                        counts.update((kind, "closed") for kind in kinds[place + 1 :])
                        stays = False
                        break
                    add(kind, status, batch[place], body)
                    if not stays:
                        counts.update((kind, "closed") for kind in kinds[place + 1 :])
                        break
            writer.close()

    async def alone() -> None:
        nonlocal left
        while left > 0 and time.monotonic() < ends:
            (kind,) = messages.pick(messages.torn, 1)
            left -= 1
            content = messages.torn[kind][1]()
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(content)
                async with asyncio.timeout(0.1 if kind in ("short", "garbage") else 1.0):
                    status, _, body = await answer(reader)
                add(kind, status, content, body)
            except (EOFError, OSError):
                counts[kind, "none"] += 1
            writer.close()

    await asyncio.gather(*(pipelined() for _ in range(6)), *(alone() for _ in range(4)))
    return {
        "requests": sum(counts.values()),
        "counts": [[kind, status, number] for (kind, status), number in sorted(counts.items())],
        "examples": examples,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("client", choices=("ending", "malformed"))
    parser.add_argument("port", type=int)
    parser.add_argument("--shape", type=int, nargs=3, required=True)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=60.0)
    given = parser.parse_args()
    if given.client == "ending":
        work = ending(given.port, tuple(given.shape), given.connections, given.seconds)
    else:
        work = malformed(given.port, tuple(given.shape), given.requests, given.seed, given.seconds)
    print(json.dumps(uvloop.run(work)))


if __name__ == "__main__":
    main()
