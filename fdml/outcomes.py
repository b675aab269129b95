"""What the runs of a table gave, and how it is shown: as JSON, as Markdown and as a picture."""

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

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

    def shares(self) -> dict[str, float | None]:
        """Clean accuracy, the kinds of attack, and the worst case; None where a kind was not run."""
        found = {"clean": self.accuracies["clean"], "gray": self.gray, "black": self.black, "white": self.white}
        return found | {"worst": self.worst}


def collect(outcomes: Sequence[Outcome], data: str, out: Path, ours: str) -> None:
    """Writes ``results.json``, the tables of the rows and of what ``ours`` leads them by as ``table.md``, and the
    picture ``table.png`` to ``out``."""
    # Loaded here: matplotlib is slow to load.
    from fdml.dots import write_dots

    write_whole(out / "results.json", json.dumps([asdict(each) for each in outcomes], indent=1) + "\n")
    write_whole(out / "table.md", "\n".join(part for part in (markdown(outcomes), leads(outcomes, ours)) if part))
    rows: dict[str, dict[str, list[float]]] = {}
    for each in outcomes:
        for kind, share in each.shares().items():
            if share is not None:
                rows.setdefault(each.row, {}).setdefault(kind, []).append(share)
    first, seeds = outcomes[0], len({each.seed for each in outcomes})
    judged = f"{first.n:,} {SPLITS[first.split]} images, {seeds} seed{'s' if seeds > 1 else ''}"
    write_dots(f"{data}, {first.threat}: {judged}", rows, out / "table.png")


def markdown(outcomes: Sequence[Outcome]) -> str:
    """The table, with means and deviations over the seeds, as text that docs/results.md takes."""
    rows = _by_row(outcomes)
    attacks = [name for name in outcomes[0].accuracies if name != "clean"]
    inside = [name for name in attacks if not name.startswith("gray ")]
    heads = ["method", "seeds", "clean", *(LABELS.get(name, name) for name in inside), "gray", "worst", "seconds"]
    lines = [heads, ["-"] * len(heads), *(list(_cells(row, found, inside)) for row, found in rows.items())]
    first = outcomes[0]
    note = (
        f"{first.n:,} {SPLITS[first.split]} images, {first.threat}; percentages, ± the standard deviation over seeds;"
        f" gray is the worst of what was crafted on the clean teacher. {first.hardware}, torch"
        f" {first.versions['torch']}, {first.date}."
    )
    return _piped(lines) + f"\n{note}\n"


def leads(outcomes: Sequence[Outcome], ours: str) -> str:
    """By how much the row ``ours`` leads each other, the nearest first, as text: seed by seed, as the rows of a seed
    share its images and its teacher, and the mean with its standard error over the seeds. Empty where nothing can be
    compared."""
    by_seed = _leads(outcomes, ours)
    if not by_seed:
        return ""
    seeds = sorted({seed for found in by_seed.values() for seed in found})
    lines = [[f"{ours} over", *(f"seed {seed}" for seed in seeds), "mean"], ["-"] * (len(seeds) + 2)]
    for row, found in by_seed.items():
        lines.append([row, *(f"{found[seed]:+.1f}" if seed in found else "-" for seed in seeds), _lead(found)])
    return _piped(lines) + "\nPoints of worst-case accuracy; ± the standard error of the mean over the seeds.\n"


def summary(outcomes: Sequence[Outcome], ours: str) -> Table:
    """What of the table fits a terminal: the kinds of attack in place of each of them, and what ``ours`` leads by.
    Deviations are for the two columns that are quoted."""
    first, by_seed = outcomes[0], _leads(outcomes, ours)
    rows = _by_row(outcomes)
    table = Table(
        box=box.SIMPLE_HEAD,
        title=Text(f"{first.n:,} {SPLITS[first.split]} images, attacks inside {first.threat}", style="bold"),
        caption="share answered rightly, ± its deviation over seeds"
        + (f"; lead of {ours} in the worst case, ± its standard error" if by_seed else ""),
        title_justify="left",
        caption_justify="left",
        padding=(0, 0, 0, 1),
        pad_edge=False,
    )
    table.add_column("method", overflow="fold")
    kinds = ("clean", "gray", "black", "white", "worst")
    for head in (*kinds, *(["lead"] if by_seed else [])):
        table.add_column(head, justify="right", no_wrap=True)
    for row, found in rows.items():
        cells = []
        for kind in kinds:
            shares = percent([share for each in found if (share := each.shares()[kind]) is not None])
            cells.append(shares if kind in ("clean", "worst") else shares.partition(" ")[0])
        if by_seed:
            cells.append(_lead(by_seed[row]) if row in by_seed else "")
        table.add_row(Text(row), *cells, style="bold" if row == ours else None)
    return table


def _by_row(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    rows: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        rows.setdefault(outcome.row, []).append(outcome)
    return rows


def _leads(outcomes: Sequence[Outcome], ours: str) -> dict[str, dict[int, float]]:
    """In points of worst-case accuracy, by row and seed, the nearest row first."""
    worst = {(each.row, each.seed): 100 * each.worst for each in outcomes}
    by_seed: dict[str, dict[int, float]] = {}
    for (row, seed), points in worst.items():
        if row != ours and (ours, seed) in worst:
            by_seed.setdefault(row, {})[seed] = worst[ours, seed] - points
    return dict(sorted(by_seed.items(), key=lambda item: statistics.mean(item[1].values())))


def _lead(by_seed: Mapping[int, float]) -> str:
    points = by_seed.values()
    error = f" ± {statistics.stdev(points) / len(points) ** 0.5:.1f}" if len(points) > 1 else ""
    return f"{statistics.mean(points):+.1f}{error}"


def _piped(lines: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


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
