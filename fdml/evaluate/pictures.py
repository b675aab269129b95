"""The pictures of a report's page, as PNG: its charts for light and for dark screens, and the images of its gallery."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fdml.card import threat_words
from fdml.drawing import BLUE, BROWN, GREEN, GREY, INK, ORANGE, PALE, PURPLE, png, style
from fdml.showing import data_uri


@dataclass(frozen=True)
class Theme:
    """The colours of a screen; ``lines`` are those of the models, in turn."""

    paper: str
    ink: str
    grey: str
    pale: str
    lines: tuple[str, ...]


LIGHT = Theme("#ffffff", INK, GREY, PALE, (BLUE, ORANGE, GREEN, PURPLE, BROWN))
# Okabe and Ito's own colours, which are light enough for a dark ground.
DARK = Theme("#16191d", "#e4e6e8", "#a0a6ad", "#3a4047", ("#56b4e9", "#f09a4d", "#2fc39b", "#d98cbb", "#d8b54a"))

DASHES = ((), (5, 2), (2, 1.5), (7, 2, 2, 2), (1, 1))
"""Strokes and gaps in widths of the line: colours alone tell nobody apart who does not see them."""

# Shown at 480 pixels across, and at twice that on screens of high density.
_SIZE, _DPI = (4.8, 3.3), 200
_ATTEMPTS = ((_DPI, (64,)),)


@dataclass(frozen=True)
class Picture:
    """The same picture for light and for dark screens, as data URIs."""

    light: str
    dark: str


@dataclass(frozen=True)
class Line:
    """A line of a chart: ``model`` chooses its colour and ``place``, among all lines, its dashes."""

    model: int
    place: int
    x: Sequence[float]
    y: Sequence[float]
    band: Sequence[tuple[float, float]] | None = None

    @property
    def dashes(self) -> tuple[float, ...]:
        """Moved on by one in every round, so that lines of one colour differ."""
        return DASHES[(self.place + self.place // len(DASHES)) % len(DASHES)]


def robustness_chart(lines: Sequence[Line], threat: Mapping[str, Any]) -> Picture:
    """Accuracy over eps, each line with the band of its intervals; the report's own eps is marked."""

    def draw(axes: Axes, theme: Theme) -> None:
        axes.set_xlabel(f"eps ({threat['norm']})", color=theme.grey)
        axes.axvline(threat["eps"], color=theme.grey, lw=0.8, ls=(0, (4, 3)), zorder=1)
        axes.annotate(
            threat_words(**threat),
            (threat["eps"], 1.03),
            (4, -3),
            textcoords="offset points",
            va="top",
            color=theme.grey,
        )
        for line in lines:
            colour = theme.lines[line.model % len(theme.lines)]
            low, high = zip(*line.band, strict=True) if line.band else (line.y, line.y)
            axes.fill_between(line.x, low, high, color=colour, alpha=0.16, lw=0)
            _plot(axes, line, colour, marker="o", ms=2.5, clip_on=False)
        axes.set_xlim(0, 1.02 * max([threat["eps"], *(x for line in lines for x in line.x)]) or 1)

    return _both(draw)


def distance_chart(lines: Sequence[Line], threat: Mapping[str, Any], norm: str) -> Picture:
    """The share of images that stand up to each distance, in steps; the report's eps is marked where its norm is it."""

    def draw(axes: Axes, theme: Theme) -> None:
        axes.set_xlabel(f"distance ({norm})", color=theme.grey)
        if threat["norm"] == norm:
            axes.axvline(threat["eps"], color=theme.grey, lw=0.8, ls=(0, (4, 3)), zorder=1)
        # The few images farthest out would leave the others no room.
        end = 1.05 * max(_reach(line) for line in lines) or 1.0
        for line in lines:
            drawn = replace(line, x=[*line.x, max(end, line.x[-1])], y=[*line.y, line.y[-1]])
            _plot(axes, drawn, theme.lines[line.model % len(theme.lines)], drawstyle="steps-post")
        axes.set_xlim(0, end)

    return _both(draw)


def standing(distances: Sequence[float | None]) -> tuple[list[float], list[float]]:
    """The steps of the share of images whose distance is larger than x; None is one that nothing was found for."""
    known = np.sort([distance for distance in distances if distance is not None])
    left = 1 - np.searchsorted(known, np.unique(known), side="right") / max(1, len(distances))
    x, y = [0.0, *np.unique(known).tolist()], [1.0, *left.tolist()]
    return (x[1:], y[1:]) if x[1:2] == [0.0] else (x, y)


def confusion_picture(counts: np.ndarray) -> Picture:
    """Rows are the true classes, columns the answers; each row is shaded by its own shares."""
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)

    def draw(axes: Axes, theme: Theme) -> None:
        shades = LinearSegmentedColormap.from_list("shades", [theme.paper, theme.lines[1]])
        # The square root: one image in a hundred should be seen.
        axes.imshow(np.sqrt(shares), cmap=shades, vmin=0, vmax=1, interpolation="nearest", aspect="auto")
        axes.set_xlabel("answer, by class number", color=theme.grey)
        axes.set_ylabel("true class", color=theme.grey)
        axes.grid(visible=False)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(nbins=6, integer=True))

    return _both(draw, size=(4.8, 4.4), percent=False)


def _both(draw: Callable[[Axes, Theme], None], *, size: tuple[float, float] = _SIZE, percent: bool = True) -> Picture:
    uris = []
    for theme in (LIGHT, DARK):
        with style():
            figure = Figure(figsize=size, dpi=_DPI, facecolor=theme.paper)
            axes = figure.add_axes((0.09, 0.13, 0.89, 0.85), facecolor=theme.paper)
            axes.grid(axis="y", color=theme.pale, lw=0.6)
            axes.set_axisbelow(True)
            axes.tick_params(color=theme.pale, labelcolor=theme.grey, length=3)
            for side, spine in axes.spines.items():
                spine.set_visible(side == "bottom" or not percent)
                spine.set_color(theme.pale)
            draw(axes, theme)
            if percent:
                axes.set_ylim(0, 1.03)
                axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            uris.append(data_uri(png(figure, _ATTEMPTS)))
    return Picture(*uris)


def _plot(axes: Axes, line: Line, colour: str, **how: Any) -> None:
    dashes = (0, line.dashes) if line.dashes else "-"
    axes.plot(line.x, line.y, color=colour, lw=1.6, ls=dashes, zorder=3, **how)


def _reach(line: Line) -> float:
    """The distance at which a line has made 98% of its way down."""
    bottom = line.y[-1] + 0.02 * (line.y[0] - line.y[-1])
    return next(x for x, y in zip(line.x, line.y, strict=True) if y <= bottom)


def certified_chart(lines: Sequence[Line], norm: str) -> Picture:
    """Certified accuracy over the radius, and above it, at the radii that were attacked, what stood: the truth lies
    between. The first line is the certified one."""

    def draw(axes: Axes, theme: Theme) -> None:
        axes.set_xlabel(f"radius ({norm})", color=theme.grey)
        for line in lines:
            marks = {} if line.place == 0 else {"marker": "v", "ms": 4, "clip_on": False}
            _plot(axes, line, theme.lines[line.place % len(theme.lines)], **marks)
        axes.set_xlim(0, 1.02 * max(x for line in lines for x in line.x) or 1)

    return _both(draw)
