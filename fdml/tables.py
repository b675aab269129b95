"""Tables for a terminal. They need no torch: `fdml info` shows them where only the card can be read."""

import statistics
from collections.abc import Mapping, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from fdml.card import threat_words

LABELS = {"clean": "clean", "fgsm": "FGSM", "pgd20": "PGD-20", "pgd50x3": "PGD-50x3", "apgd50-ce": "APGD-50 CE",
          "apgd50-dlr": "APGD-50 DLR", "worst": "worst of all"}  # fmt: skip
"""What the table calls an attack; one that is not here goes by its own name."""

ROLES = ("teacher", "student")


def closing_table(summary: Mapping) -> Table:
    """The table of a summary: attacks down, models across, each share with its 95% interval. Two fit 80 columns."""
    roles = [role for role in ROLES if role in summary]
    title = f"{summary['data']}, {summary['n']} test images, attacks inside {threat_words(**summary['threat'])}"
    table = Table(
        box=box.SIMPLE_HEAD,
        # Text, not markup: the name of a folder may hold brackets.
        title=Text(title, style="bold", overflow="fold"),
        caption="share answered rightly (95% interval)",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("attack", no_wrap=True)
    for role in roles:
        table.add_column(role, justify="right", no_wrap=True)
    for name in summary[roles[0]]["intervals"]:
        cells = [_cell(summary[role][name], *summary[role]["intervals"][name]) for role in roles]
        ends = name in ("clean", "worst")
        if name == "worst":
            table.add_section()
        table.add_row(LABELS.get(name, name), *cells, style="bold" if ends else None, end_section=name == "clean")
    return table


def percent(shares: Sequence[float]) -> str:
    """The mean in percent and, of several shares, their standard deviation; a dash of none."""
    if not shares:
        return "-"
    percents = [100 * share for share in shares]
    deviation = f" ± {statistics.stdev(percents):.1f}" if len(percents) > 1 else ""
    return f"{statistics.mean(percents):.1f}{deviation}"


def _cell(share: float, low: float, high: float) -> Text:
    # Every part has one width, so that points stand below points.
    return Text.assemble(f"{100 * share:5.1f}%  ", (f"({100 * low:4.1f} to {100 * high:5.1f})", "dim"))
