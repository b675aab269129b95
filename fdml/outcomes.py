"""What the runs of a table gave, and how it is shown: as JSON, as Markdown and as a picture."""

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fdml.evaluate.suites import LABELS
from fdml.files import write_whole
from fdml.tables import percent

SPLITS = {"test": "test", "val": "validation"}
"""The splits that judge, in words."""


@dataclass(frozen=True)
class Outcome:
    """One row of one seed: accuracies as fractions of ``n`` test images, and what they cost.

    ``white``, ``gray``, ``black`` and ``worst`` count the images that withstand every attack of the kind. ``seconds``
    are what the student's training took, the teacher's not among them: of all processors together on a CPU, of wall
    time on a GPU; None for a run that was stopped and went on.
    """

    row: str
    seed: int
    n: int
    threat: str
    accuracies: dict[str, float]
    white: float
    gray: float | None
    black: float | None
    worst: float
    seconds: float | None
    recipe: dict[str, Any]
    hardware: str
    versions: dict[str, str]
    date: str
    split: str = "test"


def collect(outcomes: Sequence[Outcome], data: str, out: Path) -> None:
    """Writes ``results.json``, the table as ``table.md`` and the picture ``table.png`` to ``out``."""
    # Loaded here: matplotlib is slow to load.
    from fdml.dots import write_dots

    write_whole(out / "results.json", json.dumps([asdict(each) for each in outcomes], indent=1) + "\n")
    write_whole(out / "table.md", markdown(outcomes))
    rows: dict[str, dict[str, list[float]]] = {}
    for each in outcomes:
        kinds = {"clean": each.accuracies["clean"], "gray": each.gray, "black": each.black, "white": each.white}
        for kind, share in (kinds | {"worst": each.worst}).items():
            if share is not None:
                rows.setdefault(each.row, {}).setdefault(kind, []).append(share)
    first, seeds = outcomes[0], len({each.seed for each in outcomes})
    judged = f"{first.n:,} {SPLITS[first.split]} images, {seeds} seed{'s' if seeds > 1 else ''}"
    write_dots(f"{data}, {first.threat}: {judged}", rows, out / "table.png")


def markdown(outcomes: Sequence[Outcome]) -> str:
    """The table, with means and deviations over the seeds, as text that docs/results.md takes."""
    rows: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        rows.setdefault(outcome.row, []).append(outcome)
    attacks = [name for name in outcomes[0].accuracies if name != "clean"]
    inside = [name for name in attacks if not name.startswith("gray ")]
    heads = ["method", "seeds", "clean", *(LABELS.get(name, name) for name in inside), "gray", "worst", "seconds"]
    lines = [" | ".join(heads), " | ".join("-" for _ in heads)]
    lines += [" | ".join(_cells(row, found, inside)) for row, found in rows.items()]
    first = outcomes[0]
    note = (
        f"{first.n:,} {SPLITS[first.split]} images, {first.threat}; percentages, ± the standard deviation over seeds;"
        f" gray is the worst of what was crafted on the clean teacher. {first.hardware}, torch"
        f" {first.versions['torch']}, {first.date}."
    )
    return "".join(f"| {line} |\n" for line in lines) + f"\n{note}\n"


def _cells(row: str, found: Sequence[Outcome], attacks: Sequence[str]) -> Iterator[str]:
    yield row
    yield str(len(found))
    yield percent([each.accuracies["clean"] for each in found])
    for name in attacks:
        yield percent([each.accuracies[name] for each in found])
    yield percent([each.gray for each in found if each.gray is not None])
    yield percent([each.worst for each in found])
    seconds = [each.seconds for each in found if each.seconds is not None]
    yield f"{statistics.mean(seconds):.0f}" if seconds else "-"
