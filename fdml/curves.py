"""The picture of what training did, epoch by epoch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from fdml.drawing import BLUE, BROWN, DPI, GREEN, GREY, INK, ORANGE, PALE, PURPLE, WIDTH, png, style
from fdml.files import write_whole
from fdml.run import CHOOSE

# Dots per inch and colours: lines lose nothing by a palette.
_LINES = ((DPI, (256,)),)


def write_curves(rows: list[dict], path: Path) -> None:
    """Writes what training did, epoch by epoch, as a PNG. ``rows`` are the lines of ``metrics.jsonl``."""
    with style():
        write_whole(path, png(curves_figure(rows), _LINES))


@dataclass(frozen=True)
class Line:
    """One line of a panel: a value for some of the epochs."""

    label: str
    colour: str
    epochs: list[int]
    values: list[float]


_TERMS = {"ce": BLUE, "bce": BLUE, "kl": ORANGE, "fd": GREEN, "ml": PURPLE, "ibp": BROWN}
_SCORES = {"clean": ("clean", BLUE), "pgd": ("PGD", ORANGE), "noisy": ("noise", GREEN), "certified": ("bounds", BROWN)}


def curves_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Small multiples over the student's epochs.

    Accuracy on validation, with the teacher's as a reference; the terms of the loss as weighted; and, where the metric
    term was on, the distances d(a, p) and d(a, n) and the share of active triplets.

    A run without a student shows its teacher; one without any epoch says so.
    """
    teacher = [row for row in rows if row["role"] == "teacher"]
    student = [row for row in rows if row["role"] == "student"]
    role, main = ("student", student) if student else ("teacher", teacher)
    if not main:
        figure = Figure(figsize=(WIDTH / DPI, 1.0), dpi=DPI)
        figure.text(0.5, 0.5, "no epoch was recorded", ha="center", va="center", color=GREY)
        return figure
    epochs = (min(row["epoch"] for row in main), max(row["epoch"] for row in main))
    distances = [
        _line("d(a, p)", GREEN, main, "d_ap"),
        _line("d(a, n)", PURPLE, main, "d_an"),
    ]
    active = [_line("active", BROWN, main, "active")]
    metric = any(line.epochs for line in distances + active)

    figure = Figure(figsize=(WIDTH / DPI, 5.9 if metric else 3.2), dpi=DPI)
    grid = figure.add_gridspec(
        2 if metric else 1,
        2,
        left=0.055,
        right=0.904,
        top=0.93 if metric else 0.87,
        bottom=0.085 if metric else 0.155,
        wspace=0.5,
        hspace=0.42,
    )
    _accuracy(figure.add_subplot(grid[0, 0]), role, main, teacher if student else [], epochs)
    _losses(figure.add_subplot(grid[0, 1]), role, main, epochs)
    if metric:
        axes = figure.add_subplot(grid[1, 0])
        _panel(axes, "Distance to positive (p) and negative (n)", distances, epochs)
        axes.set_ylim(0, 1.08 * max((value for line in distances for value in line.values), default=1.0) or 1.0)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        _label(axes, distances)
        axes = figure.add_subplot(grid[1, 1])
        _panel(axes, "Triplets inside the margin", active, epochs)
        _percent(axes)
        _label(axes, active, "{label} {value:.0%}")
    return figure


def _accuracy(
    axes: Axes, role: str, main: Sequence[Mapping], teacher: Sequence[Mapping], epochs: tuple[int, int]
) -> None:
    scores = {name: _line(label, colour, main, name) for name, (label, colour) in _SCORES.items()}
    lines = list(scores.values())
    # The best is the one kept, and the later one of equals: as training chooses.
    judge = next((scores[name] for name in CHOOSE if scores[name].epochs), lines[0])
    kept = max(zip(judge.values, judge.epochs, strict=True), default=None)
    _panel(axes, f"{role.capitalize()} on validation" + (f" (○ kept: epoch {kept[1]})" if kept else ""), lines, epochs)
    _percent(axes)
    if kept:
        axes.plot([kept[1]], [kept[0]], "o", ms=7, mfc="white", mec=judge.colour, mew=1.4, clip_on=False, zorder=4)
    reference = [row["clean"] for row in teacher if "clean" in row]
    if reference:
        axes.axhline(max(reference), color=GREY, lw=1.1, ls=(0, (5, 3)), zorder=1)
        lines.append(Line("teacher", GREY, [epochs[1]], [max(reference)]))
    _label(axes, lines, "{label} {value:.1%}")


def _losses(axes: Axes, role: str, main: Sequence[Mapping], epochs: tuple[int, int]) -> None:
    terms = [line for name, colour in _TERMS.items() if (line := _line(name, colour, main, name)).epochs]
    total = _line("total", INK, main, "loss")
    lines = terms if len(terms) == 1 else [total, *terms]
    _panel(axes, f"Loss of the {role}, by term as weighted", lines, epochs)
    sizes = [max(line.values) for line in lines if line.epochs]
    values = [value for line in lines for value in line.values]
    # Terms of very different size share an axis only by their logarithm. One that fades runs out at the bottom.
    if sizes and 0 < min(sizes) < max(sizes) / 5:
        axes.set_yscale("log")
        least = min(value for value in values if value > 0)
        axes.set_ylim(max(0.8 * least, min(sizes) / 100), 1.4 * max(sizes))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.minorticks_off()
    elif values:
        axes.set_ylim(min(0.0, min(values)), 1.08 * max(values) or 1.0)
    _label(axes, lines)


def _line(label: str, colour: str, rows: Sequence[Mapping], key: str) -> Line:
    found = [row for row in rows if row.get(key) is not None and np.isfinite(row[key])]
    return Line(label, colour, [row["epoch"] for row in found], [row[key] for row in found])


def _panel(axes: Axes, title: str, lines: Sequence[Line], epochs: tuple[int, int]) -> None:
    first, last = epochs
    axes.set_title(title, loc="left", fontsize=9, color=INK, pad=8)
    pad = 0.012 * (last - first) or 0.5
    axes.set_xlim(first - pad, last + pad)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    axes.set_xlabel("epoch", color=GREY)
    axes.grid(axis="y", color=PALE, lw=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(color=PALE, labelcolor=GREY, length=3)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(PALE)
    for line in lines:
        dashed = line.colour == INK
        axes.plot(
            line.epochs,
            line.values,
            color=line.colour,
            lw=1.1 if dashed else 1.7,
            ls=(0, (2, 1.5)) if dashed else "-",
            marker="o" if len(line.epochs) == 1 else None,
            ms=4,
            zorder=3,
            solid_capstyle="round",
        )


def _percent(axes: Axes) -> None:
    axes.set_ylim(0, 1.03)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def _label(axes: Axes, lines: Sequence[Line], form: str = "{label}") -> None:
    """Writes each line's name where it ends, pushed up or down where two names would touch. To be called last."""
    bottom, top = axes.get_window_extent().intervaly
    for end in sorted({line.epochs[-1] for line in lines if line.epochs}):
        ending = [line for line in lines if line.epochs and line.epochs[-1] == end]
        heights = [axes.transData.transform((end, line.values[-1]))[1] for line in ending]
        heights = [min(max(height, bottom), top) for height in heights]
        places = spread(heights, gap=10.5 * DPI / 72, low=bottom + 6, high=top)
        for line, place in zip(ending, places, strict=True):
            axes.annotate(
                form.format(label=line.label, value=line.values[-1]),
                (end, axes.transAxes.inverted().transform((0, place))[1]),
                xycoords=("data", "axes fraction"),
                xytext=(7, 0),
                textcoords="offset points",
                va="center",
                color=line.colour,
                annotation_clip=False,
                # Above the grid and below the lines.
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
                zorder=2,
            )


def spread(places: Sequence[float], *, gap: float, low: float, high: float) -> list[float]:
    """The places moved so that they are ``gap`` apart and, as far as there is room, within low to high.

    Their order stays; of equal ones the first given is the highest.
    """
    order = sorted(range(len(places)), key=lambda index: (places[index], -index))
    moved = list(places)
    floor = low
    for index in order:
        moved[index] = max(moved[index], floor)
        floor = moved[index] + gap
    ceiling = high
    for index in reversed(order):
        moved[index] = min(moved[index], ceiling)
        ceiling = moved[index] - gap
    return moved
