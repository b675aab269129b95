"""An evaluation's report as tables for a terminal. This module needs no torch: a report is JSON.

``docs/report.md`` describes the report.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from fdml.card import threat_words

PROTOCOLS = {"white": "white-box", "gray": "gray-box", "black": "black-box", "control": "controls"}
"""What people call a protocol, in the order in which a report shows them."""

NO_GRADIENTS = "no gradients were used: only query and transfer attacks were run"

# Models side by side: with intervals, and without.
_ROOMY, _TIGHT = 3, 8


@dataclass(frozen=True)
class Row:
    """One line of the table of attacks; ``cells`` has one entry a model, None where the attack was not run on it.

    A cell holds ``accuracy`` and, except for the step of a cascade, ``interval``; that of an attack is all its entry.
    """

    label: str
    cells: list[Mapping[str, Any] | None]
    step: bool = False


@dataclass(frozen=True)
class Section:
    """The attacks of one protocol, each followed by its steps, and the worst of them where they are several."""

    name: str
    rows: list[Row] = field(default_factory=list)
    worst: Row | None = None


def sections(models: Sequence[Mapping[str, Any]]) -> list[Section]:
    """The attacks on all ``models`` by protocol, in the order of ``PROTOCOLS``; in a protocol, as they were run."""
    found: dict[str, dict[tuple, list[Mapping | None]]] = {name: {} for name in PROTOCOLS}
    for place, model in enumerate(models):
        for attack in model["attacks"]:
            cells = found.setdefault(attack["protocol"], {}).setdefault(
                (attack["name"], attack["source"]), [None] * len(models)
            )
            cells[place] = attack
    return [_section(protocol, list(attacks.values()), models) for protocol, attacks in found.items() if attacks]


def _section(protocol: str, attacks: list[list[Mapping | None]], models: Sequence[Mapping[str, Any]]) -> Section:
    name = PROTOCOLS.get(protocol, protocol)
    section = Section(name)
    for cells in attacks:
        section.rows.append(Row(label(next(cell for cell in cells if cell)), cells))
        steps: dict[str, list[Mapping | None]] = {}
        for place, cell in enumerate(cells):
            for step in cell["steps"] if cell else ():
                steps.setdefault(step["label"], [None] * len(models))[place] = step
        section.rows.extend(Row(step, found, step=True) for step, found in steps.items())
    worst = [model["by_protocol"].get(protocol) for model in models]
    if len(attacks) > 1 and any(worst):
        return Section(name, section.rows, Row(f"worst of {name}", worst))
    return section


def label(attack: Mapping[str, Any]) -> str:
    """What people call an attack, with the model that it was crafted on where that is not the one it is tried on."""
    source = attack["source"]
    return f"{attack['label']} from {source}" if source and source not in attack["label"] else attack["label"]


def report_table(report: Mapping[str, Any]) -> RenderableType:
    """The report's accuracies, and below them what calls them in question.

    Attacks go down, by protocol, models across. One or two models fit 80 columns and up to eight fit 120, of which more
    than three show their accuracy without its interval; further models follow in a table of their own.
    """
    models = report["models"]
    tight = len(models) > _ROOMY
    width = _TIGHT if tight else _ROOMY
    parts: list[RenderableType] = [
        _table(report, models[start : start + width], tight=tight) for start in range(0, len(models), width)
    ]
    for model in models:
        if not model["gradients"]:
            parts.append(_below(Text.assemble((_plain(model["name"]), "bold"), f": {NO_GRADIENTS}")))
        parts.extend(_flag(model["name"], flag) for flag in model["flags"])
    return Group(*parts)


def _table(report: Mapping[str, Any], models: Sequence[Mapping[str, Any]], *, tight: bool) -> Table:
    data = report["data"]
    title = f"{_plain(data['name'])}, {data['n']:,} test images, attacks inside {threat_words(**report['threat'])}"
    table = Table(
        box=box.SIMPLE_HEAD,
        # Text, not markup: names may hold brackets.
        title=Text(title, style="bold", overflow="fold"),
        caption="share answered rightly" if tight else "share answered rightly (95% interval)",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("attack", max_width=40 if len(models) == 1 else 22, overflow="fold")
    for model in models:
        # Cells are of one width, and cells that stand to the right would lose the spaces they end in.
        table.add_column(Text(_plain(model["name"]), justify="right"), overflow="fold", width=9 if tight else 23)

    def add(row: Row, style: str | None = None) -> None:
        # A step's wrapped lines are indented too.
        name = Padding(Text(_plain(row.label)), (0, 0, 0, 2 * row.step), style="dim" if row.step else "")
        table.add_row(name, *(_cell(cell, tight=tight) for cell in row.cells), style=style)

    add(Row("clean", [model["clean"] for model in models]), "bold")
    for section in sections(models):
        table.add_section()
        table.add_row(Text(section.name, style="italic"))
        for row in section.rows:
            add(row)
        if section.worst:
            add(section.worst)
    table.add_section()
    add(Row("worst of all", [model["worst"] for model in models]), "bold")
    return table


def _cell(found: Mapping[str, Any] | None, *, tight: bool) -> Text:
    if found is None:
        return Text("-".rjust(9 if tight else 6), style="dim")
    share = f"{100 * found['accuracy']:{8 if tight else 5}.1f}%"
    if tight:
        return Text(share)
    low, high = found.get("interval", (None, None))
    return Text.assemble(share, ("" if low is None else f"  ({100 * low:4.1f} to {100 * high:5.1f})", "dim"))


def _flag(model: str, flag: Mapping[str, Any]) -> Padding:
    colour = "red" if flag["level"] == "fail" else "yellow"
    head = Text.assemble(
        (f"{flag['level'].upper()} ", f"bold {colour}"),
        (f"{_plain(flag['name'])} {flag['figure']:.4g}", colour),
        f"  {_plain(model)}",
    )
    page = Text(_plain(flag["page"]), style="dim", overflow="fold")
    return _below(Group(head, Padding(Text(_plain(flag["meaning"])), (0, 0, 0, 2)), Padding(page, (0, 0, 0, 2))))


def _below(content: RenderableType) -> Padding:
    return Padding(content, (0, 0, 0, 2))


def _plain(text: str) -> str:
    """The text without what a terminal would obey: names of files and classes may hold anything."""
    return "".join(letter if letter.isprintable() else "�" for letter in text)
