"""How fast every form of a model is, side by side: latency and throughput over batch sizes."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from fdml import bundle
from fdml.card import read_card
from fdml.checkpoint import load
from fdml.errors import InputError
from fdml.evaluate.session import Session
from fdml.export.convert import convert
from fdml.files import write_whole
from fdml.models import Frozen

Call = Callable[[], object]

WARM = 3
"""Calls of each form before any counts."""


def bench(
    paths: Sequence[Path],
    *,
    batches: Sequence[int] = (1, 8, 64),
    seconds: float = 3.0,
    rounds: int = 10,
    compiled: bool = False,
    watch: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Times every form of the models at ``paths``: of a ``.safetensors`` file or a run folder torch as it is loaded,
    torch with BatchNorm folded, with ``compiled`` torch.compile, and ONNX Runtime; of a bundle or an ``.onnx`` file
    ONNX Runtime.

    In each of ``rounds`` rounds every form has its turn at every batch size, for its part of ``seconds``, so that what
    else the machine does falls on all alike. Latencies are wall seconds a call; threads are torch's.

    Returns JSON values: ``rows`` with ``model``, ``form``, ``batch``, ``p50``, ``p95``, ``p99`` (ms), ``images`` (a
    second, at the median) and ``calls``. Raises ``InputError`` for what is no model.
    """
    if not batches or min(batches) < 1 or max(batches) > 4096:
        raise InputError(f"batch sizes {list(batches)} are out of range: 1 to 4096")
    torch.manual_seed(0)
    forms = [(_name(path), form, make) for path in paths for form, make in _forms(path, compiled, watch).items()]
    ways = [(name, form, size, make(size)) for name, form, make in forms for size in batches]
    taken: list[list[float]] = [[] for _ in ways]
    for place, (name, form, size, call) in enumerate(ways):
        watch(f"warming up {name}, {form}, batch {size} ({place + 1} of {len(ways)})")
        for _ in range(WARM):
            call()
    for turn in range(rounds):
        for place, (name, form, size, call) in enumerate(ways):
            watch(f"round {turn + 1} of {rounds}: {name}, {form}, batch {size}")
            ends = time.perf_counter() + seconds / rounds
            while True:
                began = time.perf_counter()
                call()
                now = time.perf_counter()
                taken[place].append(now - began)
                if now >= ends:
                    break
    rows = [
        {
            "model": name,
            "form": form,
            "batch": size,
            "p50": 1e3 * statistics.median(found),
            "p95": 1e3 * float(np.quantile(found, 0.95)),
            "p99": 1e3 * float(np.quantile(found, 0.99)),
            "images": size / statistics.median(found),
            "calls": len(found),
        }
        for (name, form, size, _), found in zip(ways, taken, strict=True)
    ]
    return {"threads": torch.get_num_threads(), "rounds": rounds, "seconds": seconds, "rows": rows}


def bench_table(found: Mapping[str, Any]) -> Table:
    """The result as a table for a terminal."""
    table = Table("model", "form", "batch", "p50", "p95", "p99", "images/s", "faster")
    for column in table.columns[2:]:
        column.justify = "right"
    first: dict[int, float] = {}
    for row in found["rows"]:
        base = first.setdefault(row["batch"], row["p50"])
        times = [f"{row[key]:.3g}" if row[key] < 1000 else f"{row[key]:,.0f}" for key in ("p50", "p95", "p99")]
        table.add_row(
            row["model"], row["form"], str(row["batch"]), *times, f"{row['images']:,.0f}", f"{base / row['p50']:.2f}"
        )
    table.caption = f"milliseconds a call, {found['threads']} threads, {found['rounds']} alternating rounds"
    return table


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Throughput over batch sizes as a picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    lines: dict[str, list[tuple[int, float]]] = {}
    several = len({row["model"] for row in found["rows"]}) > 1
    for row in found["rows"]:
        label = f"{row['model']}, {row['form']}" if several else row["form"]
        lines.setdefault(label, []).append((row["batch"], row["images"]))
    for label, points in lines.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=label)
    axes.set(xlabel="batch", ylabel="images a second", ylim=(0, None))
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({row["batch"] for row in found["rows"]}))
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    write_whole(path, lambda where: figure.savefig(where, dpi=150))


def _name(path: Path) -> str:
    return path.parent.name if path.name in ("student.safetensors", "model.onnx") else path.stem


def _forms(path: Path, compiled: bool, watch: Callable[[str], None]) -> dict[str, Callable[[int], Call]]:
    if path.suffix == ".onnx":
        return {"ONNX Runtime": _by_session(Session(path, spin=True))}
    if path.is_dir() and (path / "model.onnx").exists():
        found = bundle.read(path)
        return {f"ONNX Runtime {found.evidence['precision']}": _by_session(Session(path / "model.onnx", spin=True))}
    file = path / "student.safetensors" if path.is_dir() else path
    model, card = load(file), read_card(file)
    watch(f"converting {_name(path)}")
    forms = {"torch": _by_torch(model, card.input), "torch, folded": _by_torch(Frozen(model).model, card.input)}
    if compiled:
        forms["torch.compile"] = _by_torch(torch.compile(Frozen(model).model), card.input)
    forms["ONNX Runtime"] = _by_session(Session(convert(model, card).SerializeToString(), spin=True))
    return forms


def _by_torch(model: Any, shape: tuple[int, int, int]) -> Callable[[int], Call]:
    def make(size: int) -> Call:
        x = torch.rand(size, *shape)

        def call() -> object:
            with torch.inference_mode():
                return model(x)

        return call

    return make


def _by_session(session: Session) -> Callable[[int], Call]:
    def make(size: int) -> Call:
        return session.bare(np.random.default_rng(0).random((size, *session.shape), np.float32))

    return make
