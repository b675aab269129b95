"""Every form of one network on this processor, in turns: stock torch, ours, compiled, AOTInductor, ONNX Runtime, int8.

    python benchmarks/forms.py --threads 1                     # resnet18, CIFAR-10 images, random weights
    python benchmarks/forms.py --architecture cnn --aoti --batch 1 64 --json

A row's time is the median over `--rounds`; in a round each form has one turn of a few calls, in an order that moves on
by one. `faster` is against stock torch: the same weights in nn.BatchNorm2d and nn.Conv2d, contiguous. AOTInductor needs
a C++ compiler, and compiles for about a minute.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blank import SHAPE, blank
from stock import plain

from fdml.evaluate.session import Session
from fdml.export.convert import convert
from fdml.export.quantise import quantised
from fdml.models import Frozen, build


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="resnet18")
    parser.add_argument("--width", type=int)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--aoti", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    rows = [row for size in options.batch for row in timed(forms(options, size), options.rounds, size)]
    if options.json:
        print(json.dumps({"threads": torch.get_num_threads(), "rows": rows}))
        return
    print(f"{options.architecture}, {torch.get_num_threads()} threads, medians of {options.rounds} rounds")
    for row in rows:
        print(f"{row['form']:14}  batch {row['batch']:4}  {row['ms']:9.2f} ms  {row['faster']:5.2f}x")


def forms(options: argparse.Namespace, size: int) -> dict[str, Callable[[], object]]:
    """A call of each form on a batch of ``size``."""
    torch.manual_seed(0)
    keys = {} if options.width is None else {"width": options.width}
    model = build(options.architecture, input=SHAPE, classes=10, mean=(0.5,) * 3, std=(0.25,) * 3, options=keys).eval()
    card = blank(options.architecture, keys)
    folded = Frozen(model).model
    x = torch.rand(size, *SHAPE)
    made: dict[str, Any] = {"stock torch": plain(model), "fdml torch": model, "fdml, folded": folded}
    if options.compile:
        made["torch.compile"] = torch.compile(folded)
    if options.aoti:
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            program = torch.export.export(folded, (x,))
            path = Path(folder) / "model.pt2"
            torch._inductor.aoti_compile_and_package(program, package_path=str(path))
            made["AOTInductor"] = torch._inductor.aoti_load_package(str(path))
    calls = {name: by_torch(form, x) for name, form in made.items()}
    proto = convert(model, card)
    noise = np.random.default_rng(0).random((64, *SHAPE), np.float32)
    for name, each in (("ONNX Runtime", proto), ("int8", quantised(proto, [noise]))):
        calls[name] = Session(each.SerializeToString(), spin=True).bare(x.numpy())
    return calls


def by_torch(form: Callable[[torch.Tensor], object], x: torch.Tensor) -> Callable[[], object]:
    def call() -> object:
        with torch.inference_mode():
            return form(x)

    return call


def timed(calls: dict[str, Callable[[], object]], rounds: int, size: int) -> list[dict[str, Any]]:
    names = list(calls)
    repeats = max(1, 32 // size)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-2, rounds):
        for place in range(len(names)):
            name = names[(place + turn) % len(names)]
            began = time.perf_counter()
            for _ in range(repeats):
                calls[name]()
            if turn >= 0:
                seconds[name].append((time.perf_counter() - began) / repeats)
    found = {name: statistics.median(each) for name, each in seconds.items()}
    first = found[names[0]]
    return [{"form": name, "batch": size, "ms": 1e3 * each, "faster": first / each} for name, each in found.items()]


if __name__ == "__main__":
    main()
