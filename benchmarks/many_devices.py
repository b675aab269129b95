"""What training by several processes costs over the ideal: the same processes side by side, each on its own.

    python benchmarks/many_devices.py
    python benchmarks/many_devices.py --data cifar10 --width 8 --recipe pgd-at --steps 10

Three arrangements take turns, round by round. *Ideal*: N processes of one thread run at the same time, and each trains
a model of its own on batches of B/N images, so that nobody waits for anybody and cores, caches and memory are shared as
they are below. *Together*: `torchrun` starts the N processes, which train one model on batches of B. *Threads*: one
process trains it with N threads. All run `fdml.train.fit` on made-up images of the data set's shape, and the rate is
that of its `metrics.jsonl` for the second epoch: steps alone, without the start of the processes or validation. The
overhead is the time of a step over that of the ideal, pair by pair; the table has its median, least and greatest.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from fdml.data.dataset import Arrays, DataSet
from fdml.guidance import Teacher
from fdml.recipe import Recipe, override
from fdml.recipes import recipe
from fdml.run import Run
from fdml.train import fit, new_model
from fdml.world import World

SHAPES = {"fashion-mnist": (1, 28, 28), "cifar10": (3, 32, 32)}
"""The shapes of the data sets whose settings can be measured; the images themselves are random."""

ARRANGEMENTS = ("ideal", "together", "threads")


def work(options: argparse.Namespace) -> None:
    """One process: trains as its environment says and leaves its images a second in a file of its own."""
    world = World.join("cpu")
    share = options.processes if options.work == "ideal" else 1
    number = int(os.environ["RANK"])
    chosen = measured(options, options.batch // share)
    data = images(options, options.steps * chosen.batch_size)
    run = Run(options.folder / ("run" if share == 1 else f"run-{number}"))
    if world.leads:
        run.path.mkdir()
    guide = None
    if chosen.needs_teacher:
        torch.manual_seed(0)
        guide = Teacher.of(new_model(chosen.teacher(), data, None, None), chosen, data.train)

    # Processes that start together also measure together.
    (options.folder / f"ready-{number}").touch()
    while len(list(options.folder.glob("ready-*"))) < (1 if options.work == "threads" else options.processes):
        time.sleep(0.01)
    fit(chosen, data, run, world, "student", guide, Console(quiet=True))
    if world.leads:
        rate = run.rows()[-1]["images_per_second"]
        (options.folder / f"rate-{number}").write_text(json.dumps(rate))
    world.leave()


def measured(options: argparse.Namespace, batch_size: int) -> Recipe:
    """The recipe of two epochs: one to warm up, one to measure. Validation is as short as it can be."""
    chosen = recipe(options.recipe, options.data)
    architecture = options.architecture or chosen.architecture
    small = replace(chosen, architecture=architecture, width=options.width, batch_size=batch_size)
    return override(replace(small, epochs=2, lr=1e-3, val_limit=2, val_steps=1), options.set)


def images(options: argparse.Namespace, n: int) -> DataSet:
    generator = torch.Generator().manual_seed(0)
    made = torch.randint(0, 256, (n, *SHAPES[options.data]), dtype=torch.uint8, generator=generator)
    train = Arrays(made, torch.randint(0, 10, (n,), generator=generator))
    few = train.head(2)
    return DataSet(options.data, tuple("0123456789"), train, few, few, fingerprint="0" * 64)


def measure(arrangement: str, options: argparse.Namespace) -> float:
    """Images a second of all processes of an arrangement together."""
    alone = {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"}
    own = [__file__, *sys.argv[1:], "--work", arrangement]
    with tempfile.TemporaryDirectory() as name:
        own += ["--folder", name]
        if arrangement == "together":
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.processes}"]
            commands = [[*launcher, *own]]
        else:
            commands = [own] * (options.processes if arrangement == "ideal" else 1)
        threads = str(options.processes if arrangement == "threads" else 1)
        running = [
            subprocess.Popen([sys.executable, *command], env=alone | {"OMP_NUM_THREADS": threads, "RANK": str(number)})
            for number, command in enumerate(commands)
        ]
        codes = [process.wait() for process in running]
        if any(codes):
            sys.exit(f"{arrangement}: a process ended with {codes}")
        return sum(json.loads(path.read_text()) for path in Path(name).glob("rate-*"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="fdml", help="a name from `fdml recipes`")
    parser.add_argument("--data", default="fashion-mnist", choices=SHAPES, help="whose recipe, and images of its shape")
    parser.add_argument("--architecture", help="by default the recipe's")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a recipe key; repeat it")
    parser.add_argument("--batch", type=int, default=128, help="of all processes together")
    parser.add_argument("--processes", type=int, default=2)
    # While the first process validates, the others begin the next epoch: of few steps that head start is a large share.
    parser.add_argument("--steps", type=int, default=100, help="in each of two epochs, of which the second counts")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--work", choices=ARRANGEMENTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.batch % options.processes:
        parser.error(f"--batch {options.batch} is no multiple of --processes {options.processes}")
    if options.work:
        work(options)
        return

    rates: dict[str, list[float]] = {arrangement: [] for arrangement in ARRANGEMENTS}
    for turn in range(options.rounds):
        for arrangement in ARRANGEMENTS if turn % 2 == 0 else reversed(ARRANGEMENTS):
            rates[arrangement].append(measure(arrangement, options))
    rows = {}
    for arrangement, found in rates.items():
        overheads = [100 * (ideal / rate - 1) for ideal, rate in zip(rates["ideal"], found, strict=True)]
        rows[arrangement] = {
            "images_per_second": round(statistics.median(found), 1),
            "milliseconds_a_step": round(1e3 * options.batch / statistics.median(found), 1),
            "overhead_percent": round(statistics.median(overheads), 1),
            "overhead_range": [round(min(overheads), 1), round(max(overheads), 1)],
        }
    if options.json:
        kept = {name: value for name, value in vars(options).items() if name not in ("work", "folder")}
        print(json.dumps({"options": kept, "torch": torch.__version__, "rows": rows, "rates": rates}))
        return
    chosen = measured(options, options.batch)
    shape = "x".join(map(str, SHAPES[options.data]))
    n = options.processes
    names = {
        "ideal": f"{n} processes, alone",
        "together": f"{n} processes, together",
        "threads": f"1 process, {n} threads",
    }
    table = Table(
        title=f"{options.recipe}, {chosen.architecture} {options.width}, {shape}, batch {options.batch}",
        caption=f"{options.rounds} rounds of {options.steps} steps, torch {torch.__version__}",
    )
    table.add_column("arrangement")
    for column in ("images/s", "ms a step", "overhead", "from … to"):
        table.add_column(column, justify="right")
    for arrangement, row in rows.items():
        low, high = row["overhead_range"]
        own = arrangement != "ideal"
        table.add_row(
            names[arrangement],
            f"{row['images_per_second']:,.0f}",
            f"{row['milliseconds_a_step']:.1f}",
            f"{row['overhead_percent']:+.1f}%" if own else "",
            f"{low:+.1f} … {high:+.1f}%" if own else "",
        )
    Console(width=min(100, Console().width)).print(table)


if __name__ == "__main__":
    main()
