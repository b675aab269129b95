"""How a run ends: one table, teacher beside student, and pictures of what was learnt and what an attack does to it."""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from fdml.attacks import CLOSING, Attack, Model
from fdml.data.dataset import DataSet
from fdml.evaluate import evaluate, interval
from fdml.files import write_whole
from fdml.losses import Labels
from fdml.models import Frozen, RobustModel
from fdml.randomness import Generator
from fdml.recipe import Recipe
from fdml.run import Run
from fdml.tables import LABELS, closing_table
from fdml.threat import Images, Threat


def write_report(
    run: Run,
    recipe: Recipe,
    data: DataSet,
    threat: Threat,
    models: Mapping[str, RobustModel],
    *,
    began: float,
    console: Console,
) -> dict:
    """Attacks every model on test images, prints the closing table, and writes ``report/``; returns the summary.

    ``report/summary.json`` holds ``data``, ``n``, ``input``, ``threat``, ``recipe``, ``seed``, ``seconds`` (from
    ``began``, a ``time.monotonic()``, until all attacks were done), and for each model the accuracies as fractions with
    their 95% Wilson ``intervals``. Beside it lie ``curves.png`` and ``examples.png``. Raises ``InputError`` where the
    system refuses to write.
    """
    # Loaded here: a process that trains but writes no report needs no matplotlib.
    from fdml.curves import write_curves
    from fdml.gallery import write_gallery

    _, x, y = data.test.head(recipe.test_limit).all()
    x = x.contiguous(memory_format=torch.channels_last)
    accuracies: dict[str, dict[str, float]] = {}
    for role, model in models.items():
        with watched(CLOSING, role, console) as attacks:
            accuracies[role] = evaluate(Frozen(model), x, y, threat, attacks, seed=recipe.seed).shares()
    summary = summarise(recipe, data, threat, accuracies, n=len(y), seconds=time.monotonic() - began)
    # The numbers first: nothing that befalls a picture loses them.
    write_whole(run.report / "summary.json", json.dumps(summary, indent=2) + "\n")
    console.print(closing_table(summary))
    write_curves(run.rows(), run.report / "curves.png")
    write_gallery(models, x[:200], y[:200], data.classes, threat, run.report / "examples.png")
    # Paths stay in one piece, to be copied.
    place = f"student: {run.model('student')}\npictures: {run.report}/examples.png, curves.png"
    console.print(place, markup=False, highlight=False, soft_wrap=True)
    return summary


def summarise(
    recipe: Recipe,
    data: DataSet,
    threat: Threat,
    accuracies: Mapping[str, Mapping[str, float]],
    *,
    n: int,
    seconds: float,
) -> dict:
    """What ``summary.json`` holds: ``accuracies`` are fractions of ``n`` images by role and attack."""
    summary: dict = {
        "data": data.name,
        "n": n,
        "input": list(data.input),
        "threat": {"norm": threat.norm, "eps": threat.eps},
        "recipe": recipe.name,
        "seed": recipe.seed,
    }
    for role, shares in accuracies.items():
        summary[role] = {**shares, "intervals": {name: list(interval(share, n)) for name, share in shares.items()}}
    return summary | {"seconds": round(seconds, 2)}


@contextmanager
def watched(attacks: Mapping[str, Attack], role: str, console: Console) -> Iterator[dict[str, Attack]]:
    """The attacks, each of which shows its name on a bar while it runs; without a terminal nothing is shown."""
    # Time left is not shown: the attacks differ a hundredfold in what they take.
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[attack]}", style="cyan"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(f"attacking the {role}", total=len(attacks), attack="")
        yield {name: _announced(name, place, attack, bar, task) for place, (name, attack) in enumerate(attacks.items())}


def _announced(name: str, place: int, attack: Attack, bar: Progress, task: TaskID) -> Attack:
    def announced(model: Model, x: Images, y: Labels, threat: Threat, *, generator: Generator = None) -> Images:
        bar.update(task, completed=place, attack=LABELS.get(name, name))
        return attack(model, x, y, threat, generator=generator)

    return announced
