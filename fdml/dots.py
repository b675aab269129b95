"""The picture of a comparison: a line a method, a mark for each kind of accuracy."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fdml.drawing import BLUE, DPI, GREEN, GREY, INK, ORANGE, PALE, PURPLE, WIDTH, png, style
from fdml.files import write_whole
from fdml.tables import percent

MARKS = {
    "clean": ("clean", "o", BLUE),
    "gray": ("gray box", "^", GREEN),
    "black": ("black box", "d", PURPLE),
    "white": ("white box", "s", GREY),
    "worst": ("worst of all", "o", ORANGE),
}
"""By kind: what the legend calls it, its mark and its colour."""

_HEAD, _LINE, _FOOT = 0.55, 0.22, 0.42  # inches
_LINES = ((DPI, (256,)),)


def write_dots(title: str, rows: Mapping[str, Mapping[str, Sequence[float]]], path: Path) -> None:
    """Writes the picture as a PNG. ``rows`` hold, for each method, the shares of the seeds for
    each kind of ``MARKS``; ``worst`` is always among these."""
    with style():
        write_whole(path, png(dots_figure(title, rows), _LINES))


def dots_figure(title: str, rows: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Methods from the best in the worst case down; means over the seeds, the bar is their standard deviation."""
    order = sorted(rows, key=lambda row: statistics.mean(rows[row]["worst"]))
    height = _HEAD + _LINE * len(order) + _FOOT
    figure = Figure(figsize=(WIDTH / DPI, height), dpi=DPI)
    left = (0.3 + 0.066 * max(len(row) for row in order)) * DPI / WIDTH
    axes = figure.add_axes((left, _FOOT / height, 0.86 - left, _LINE * len(order) / height))
    for place, row in enumerate(order):
        for kind in MARKS:
            if rows[row].get(kind):
                _mark(axes, kind, place, rows[row][kind])
        axes.annotate(
            percent(rows[row]["worst"]), (1.015, place), xycoords=("axes fraction", "data"), va="center_baseline",
            color=MARKS["worst"][2], annotation_clip=False,
        )  # fmt: skip
    axes.set_yticks(range(len(order)), order)
    axes.set_ylim(-0.6, len(order) - 0.4)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8))
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(axis="y", color=PALE, lw=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(color=PALE, labelcolor=INK, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(PALE)
    figure.text(0.012, 1 - 0.12 / height, title, va="top", fontsize=9, color=INK)
    axes.legend(
        loc="lower right", bbox_to_anchor=(1, 1), ncols=len(MARKS), frameon=False, handletextpad=0.1,
        columnspacing=1.2, borderaxespad=0.2,
    )  # fmt: skip
    return figure


def _mark(axes: Axes, kind: str, place: int, shares: Sequence[float]) -> None:
    label, mark, colour = MARKS[kind]
    mean, solid = statistics.mean(shares), kind == "worst"
    if kind in ("clean", "worst") and len(shares) > 1:
        spread = statistics.stdev(shares)
        axes.plot([mean - spread, mean + spread], [place, place], color=colour, lw=1.4, zorder=2)
    axes.plot(
        [mean], [place], mark, ms=6 if solid else 4.5, mec=colour, mfc=colour if solid else "white", mew=1.2,
        label=label if place == 0 else None, zorder=4 if solid else 3, clip_on=False,
    )  # fmt: skip
