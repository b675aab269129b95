"""How a run ends: one table, teacher beside student, and pictures of what was learnt and what an attack does to it."""

import json
import time
from collections.abc import Mapping

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fdml.attacks import ATTACKS
from fdml.data.dataset import DataSet
from fdml.evaluate import evaluate, interval
from fdml.files import write_whole
from fdml.models import RobustModel
from fdml.recipe import Recipe
from fdml.run import Run
from fdml.threat import Threat

LABELS = {"clean": "clean", "fgsm": "FGSM", "pgd20": "PGD-20", "pgd50x3": "PGD-50x3", "apgd50-ce": "APGD-50 CE",
          "apgd50-dlr": "APGD-50 DLR", "worst": "worst of all"}  # fmt: skip


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
    """Attacks every model on test images, prints the closing table, and writes ``report/``.

    ``report/summary.json`` holds ``data``, ``n``, ``input``, ``threat``, ``recipe``, ``seed``, ``seconds`` (since ``began``, a
    ``time.monotonic()``), and for each model the accuracies as fractions with their 95% Wilson ``intervals``.
    """
    from fdml import pictures

    _, x, y = data.test.head(recipe.test_limit).all()
    x = x.contiguous(memory_format=torch.channels_last)
    summary: dict = {
        "data": data.name,
        "n": len(y),
        "input": list(data.input),
        "threat": {"norm": threat.norm, "eps": threat.eps},
        "recipe": recipe.name,
        "seed": recipe.seed,
    }
    columns = (TextColumn("[bold]{task.description}"), BarColumn(bar_width=20), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        for role, model in models.items():
            batches = -(-len(y) // 250)
            task = bar.add_task(f"attacking the {role}", total=len(ATTACKS) * batches)
            found = evaluate(
                model, x, y, threat, ATTACKS, seed=recipe.seed, tick=lambda task=task: bar.advance(task)
            ).shares()
            bar.update(task, completed=len(ATTACKS) * batches)
            summary[role] = found | {"intervals": {name: interval(share, len(y)) for name, share in found.items()}}
    pictures.curves(run.rows(), run.report / "curves.png")
    pictures.gallery(models, x[:200], y[:200], data.classes, threat, run.report / "examples.png")
    summary["seconds"] = round(time.monotonic() - began, 2)
    write_whole(run.report / "summary.json", json.dumps(summary, indent=2) + "\n")
    console.print(closing_table(summary))
    console.print(f"student: {run.model('student')}\npictures: {run.report}/examples.png, curves.png")
    return summary


def closing_table(summary: Mapping) -> Table:
    """The table of a summary: attacks down, models across, with 95% intervals in percent."""
    threat = Threat(**summary["threat"])
    title = f"{summary['data']}: accuracy on {summary['n']} test images, {threat} (95% interval)"
    table = Table(title=title)
    table.add_column("attack")
    roles = [role for role in ("teacher", "student") if role in summary]
    for role in roles:
        table.add_column(role, justify="right")
    for name, label in LABELS.items():
        cells = []
        for role in roles:
            share, (low, high) = summary[role][name], summary[role]["intervals"][name]
            cells.append(f"{100 * share:.1f}%  [dim]({100 * low:.1f} to {100 * high:.1f})[/dim]")
        table.add_row(label, *cells, style="bold" if name in ("clean", "worst") else None)
    return table
