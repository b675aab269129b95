"""FDML beside its rivals and its own ablations: same data, network, schedule and seeds, one process a run.

    python benchmarks/compare.py run  --data fashion-mnist --out runs/compare --seeds 3 --jobs 2 --set epochs=4
    python benchmarks/compare.py table --out runs/compare --data fashion-mnist

Methods that need a teacher share one a seed; its cost stands in a row of its own. A row may change keys of its recipe:
`trades:epochs=3` is TRADES at three epochs, which is how methods are given equal time. Every student is the last of
its run, so that nothing is chosen on the images that judge it; `--split val` judges on validation images, which is how
defaults are searched. Finished runs are not repeated. The attacks are FGSM, PGD-20 and APGD-50 on CE and on DLR;
`worst` counts the images that withstand all of them.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

COLUMNS = ["clean", "fgsm", "pgd20", "apgd50-ce", "apgd50-dlr", "worst"]
METHODS = ["pgd-at", "trades", "mart", "fd", "ml", "fdml"]

app = typer.Typer(add_completion=False, help=__doc__)

Data = Annotated[str, typer.Option(help="A name from `fdml datasets`.")]
Out = Annotated[Path, typer.Option(help="Folder of the runs and their results.")]


@app.command()
def run(
    data: Data = "digits",
    out: Out = Path("runs/compare"),
    data_dir: Annotated[Path | None, typer.Option()] = None,
    seeds: Annotated[int, typer.Option(help="Seeds 0, 1, …")] = 3,
    jobs: Annotated[int, typer.Option(help="Runs at a time, one thread each.")] = 2,
    split: Annotated[str, typer.Option(help="test, or val to search for defaults.")] = "test",
    limit: Annotated[int, typer.Option(help="Images that judge.")] = 2000,
    set_: Annotated[list[str] | None, typer.Option("--set", help="A recipe key for every row.")] = None,
    row: Annotated[
        list[str] | None, typer.Option(help="Rows in place of all methods: NAME or NAME:key=value,…")
    ] = None,
) -> None:
    """Run what is missing."""
    options = ["--data", data, "--out", str(out), "--split", split, "--limit", str(limit)]
    options += ["--data-dir", str(data_dir)] if data_dir else []
    options += [word for assignment in set_ or [] for word in ("--set", assignment)]

    def one(name: str, seed: int) -> None:
        command = [sys.executable, __file__, "one", name, str(seed), *options]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})

    with ThreadPoolExecutor(jobs) as pool:
        for _ in pool.map(one, ["teacher"] * seeds, range(seeds)):
            pass
        rows = [(name, seed) for seed in range(seeds) for name in row or METHODS]
        for _ in pool.map(one, *zip(*rows, strict=True)):
            pass


@app.command(hidden=True)
def one(
    name: str,
    seed: int,
    data: Data,
    out: Out,
    split: Annotated[str, typer.Option()],
    limit: Annotated[int, typer.Option()],
    data_dir: Annotated[Path | None, typer.Option()] = None,
    set_: Annotated[list[str] | None, typer.Option("--set")] = None,
) -> None:
    """One row of one seed."""
    import torch
    from rich.console import Console

    from fdml.attacks import CLOSING
    from fdml.checkpoint import load as load_model
    from fdml.data import load
    from fdml.evaluate import evaluate
    from fdml.files import write_whole
    from fdml.guidance import Teacher
    from fdml.recipe import override
    from fdml.recipes import recipe
    from fdml.threat import Threat
    from fdml.train import fit
    from fdml.world import World

    label = name.replace(":", "-").replace(",", "-")
    result = out / data / f"{label}-{seed}-{split}.json"
    if result.exists():
        return
    torch.set_num_threads(1)
    method, _, changes = name.partition(":")
    chosen = recipe("fdml" if method == "teacher" else method, data)
    chosen = replace(override(chosen, [*(set_ or []), *(changes.split(",") if changes else [])]), seed=seed)
    # Validation during training chooses nothing here, so it is kept cheap.
    chosen = replace(chosen, val_limit=500, val_steps=5)
    images = load(data, data_dir=data_dir, val_fraction=chosen.val_fraction)
    world, quiet = World.join("cpu"), Console(quiet=True)

    began, used = time.monotonic(), time.process_time()
    guide = None
    if method == "teacher" or chosen.needs_teacher:
        shared = _begun(out / data / f"teacher-{seed}")
        teacher = fit(chosen.teacher(), images, shared, world, "teacher", None, quiet)
        began, used = (began, used) if method == "teacher" else (time.monotonic(), time.process_time())
        guide = Teacher.of(teacher, chosen, images.train)
    role = "teacher" if method == "teacher" else "student"
    run = _begun(out / data / f"{label}-{seed}")
    if role == "student":
        fit(chosen, images, run, world, role, guide, quiet)
    seconds, cpu = time.monotonic() - began, time.process_time() - used

    _, x, y = (images.val if split == "val" else images.test).head(limit).all()
    x = x.contiguous(memory_format=torch.channels_last)
    attacks = {attack: CLOSING[attack] for attack in ("fgsm", "pgd20", "apgd50-ce", "apgd50-dlr")}
    model = load_model(run.model(role, "last"))
    shares = evaluate(model, x, y, Threat(chosen.norm, chosen.eps), attacks, seed=seed).shares()
    found = {"row": name, "seed": seed, "split": split, "n": len(y), "seconds": seconds, "cpu_seconds": cpu, **shares}
    write_whole(result, json.dumps(found | {"recipe": chosen.to_dict()}, indent=1) + "\n")
    shown = f"clean {100 * shares['clean']:.2f} worst {100 * shares['worst']:.2f}"
    print(f"{data} {name} seed {seed}: {shown}, {cpu:.0f} CPU seconds")


@app.command()
def table(data: Data = "digits", out: Out = Path("runs/compare"), split: str = "test") -> None:
    """Print the means and deviations over seeds as a Markdown table."""
    results: dict[str, list[dict]] = {}
    for path in sorted((out / data).glob(f"*-{split}.json")):
        found = json.loads(path.read_text())
        results.setdefault(found["row"], []).append(found)
    print("| method | seeds | clean | FGSM | PGD-20 | APGD-50 CE | APGD-50 DLR | worst | CPU seconds |")
    print("|-|-|-|-|-|-|-|-|-|")
    order = {name: place for place, name in enumerate(["teacher", *METHODS])}
    for name in sorted(results, key=lambda name: (order.get(name.partition(":")[0], 99), name)):
        runs = results[name]
        cells = [_cell([run[key] for run in runs]) for key in COLUMNS]
        cpu = statistics.mean(run["cpu_seconds"] for run in runs)
        print(f"| {name} | {len(runs)} | {' | '.join(cells)} | {cpu:.0f} |")


def _cell(shares: list[float]) -> str:
    percent = [100 * share for share in shares]
    return f"{statistics.mean(percent):.1f} ± {statistics.stdev(percent) if len(percent) > 1 else 0:.1f}"


def _begun(path: Path):
    from fdml.run import Run

    path.mkdir(parents=True, exist_ok=True)
    return Run(path)


if __name__ == "__main__":
    app()
