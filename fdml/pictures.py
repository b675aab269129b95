"""Pictures of a run, drawn without a display: what training did, and what an attack does to an image.

Only matplotlib's figures are used, never pyplot, so nothing global is left behind. Colours are those of Okabe and Ito
(2008) for all kinds of colour vision, darkened for text on white, and no meaning hangs on colour alone.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter
from PIL import Image

from fdml.attacks import pgd
from fdml.files import write_whole
from fdml.inference import inference
from fdml.losses import Labels
from fdml.models import RobustModel
from fdml.threat import Images, Threat

INK, GREY, PALE = "#222222", "#6b6b6b", "#d9d9d9"
BLUE, ORANGE, GREEN, PURPLE, BROWN = "#0072b2", "#c24e00", "#00795a", "#a3407a", "#8a6100"

MAX_BYTES = 150_000
"""The size a picture is held to, so that a page loads at once."""

DPI = 150
WIDTH = 1350
"""Pixels across; shown at 900, which leaves the rest to screens of high density."""

# Of a gallery, in pixels: the row names, from one column to the next, and the side of an image.
_LEFT, _PITCH, _CELL = 126, 204, 192

# Dots per inch and colours, None for all: sharp and true where that fits, then with fewer colours, then fewer pixels.
_PHOTOGRAPHS = ((DPI, (None, 256)), (100, (256, 96, 48)))
_LINES = ((DPI, (256,)),)

# DejaVu Sans comes with matplotlib; the others are asked for what it lacks, where a system has them.
_FAMILIES = (
    "DejaVu Sans",
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "PingFang SC",
    "Hiragino Sans",
    "Microsoft YaHei",
    "Malgun Gothic",
    "Arial Unicode MS",
    "WenQuanYi Zen Hei",
)


def curves(rows: list[dict], path: Path) -> None:
    """Writes what training did, epoch by epoch, as a PNG. ``rows`` are the lines of ``metrics.jsonl``."""
    with _style():
        write_whole(path, _png(curves_figure(rows), _LINES))


def gallery(
    models: Mapping[str, RobustModel], x: Images, y: Labels, classes: Sequence[str], threat: Threat, path: Path
) -> None:
    """Writes, as a PNG, what an attack inside ``threat`` does to a few of the images ``x`` and to each model's answer.

    ``shown`` makes the attacks and ``gallery_figure`` draws them. The same arguments give the same file.
    """
    with _style():
        write_whole(path, _png(gallery_figure(shown(models, x, y, threat), classes, threat), _PHOTOGRAPHS))


# What training did


@dataclass(frozen=True)
class Line:
    """One line of a panel: a value for some of the epochs."""

    label: str
    colour: str
    epochs: list[int]
    values: list[float]


_TERMS = {"ce": BLUE, "bce": BLUE, "kl": ORANGE, "fd": GREEN, "ml": PURPLE}


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
    lines = [_line("clean", BLUE, main, "clean"), _line("PGD", ORANGE, main, "pgd")]
    # The best is the one kept, and the later one of equals: as training chooses.
    judge = lines[1] if lines[1].epochs else lines[0]
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


# What an attack does


@dataclass(frozen=True)
class Attacked:
    """What one model makes of n images attacked against itself; on the CPU. ``x``: (n, c, h, w); the others: (n,)."""

    x: torch.Tensor
    answer: torch.Tensor
    confidence: torch.Tensor


@dataclass(frozen=True)
class Shown:
    """The images of a gallery, their labels and, for every model by name, what became of them; on the CPU.

    ``telling``: every model answers every one of the clean images rightly, and the teacher none of the attacked ones.
    """

    x: torch.Tensor
    y: torch.Tensor
    attacked: dict[str, Attacked]
    telling: bool


STEPS = 50


def shown(models: Mapping[str, RobustModel], x: Images, y: Labels, threat: Threat, count: int = 6) -> Shown:
    """Chooses ``count`` of the images and attacks them against each model by PGD of 50 steps, from a seeded start.

    Images of different classes come first; among those of a class, one that every model answers rightly and that the
    teacher, where there is one, loses under attack. How the student fares has no part in the choice.
    """
    right = torch.ones_like(y, dtype=torch.bool)
    for model in models.values():
        right &= _answers(model, x)[0] == y
    # A short list is enough to choose from, and attacks cost.
    short = rounds(y.tolist(), (~right).tolist(), 4 * count)
    x, y, right = x[short], y[short], right[short]
    attacked = {}
    for name, model in models.items():
        x_adv = pgd(model, x, y, threat, steps=STEPS, generator=torch.Generator(x.device).manual_seed(0))
        answer, confidence = _answers(model, x_adv)
        attacked[name] = Attacked(x_adv.cpu(), answer.cpu(), confidence.cpu())
    fallen = attacked["teacher"].answer != y.cpu() if "teacher" in attacked else torch.ones(len(y), dtype=torch.bool)
    lacking = 2 * (~right.cpu()).int() + (~fallen).int()
    chosen = sorted(rounds(y.tolist(), lacking.tolist(), count), key=lambda index: (int(y[index]), index))
    return Shown(
        x[chosen].cpu(),
        y[chosen].cpu(),
        {
            name: Attacked(found.x[chosen], found.answer[chosen], found.confidence[chosen])
            for name, found in attacked.items()
        },
        telling="teacher" in attacked and not bool(lacking[chosen].any()),
    )


def rounds(labels: Sequence[int], lacking: Sequence[int], count: int) -> list[int]:
    """Up to ``count`` indices: first the best image of each class, then the second best of each, and so on.

    Best is what lacks least, and what comes first among equals; so are the images of one round ordered.
    """
    taken: dict[int, int] = {}
    ranked: list[tuple[int, int, int]] = []
    for index in sorted(range(len(labels)), key=lambda index: (lacking[index], index)):
        turn = taken.get(labels[index], 0)
        taken[labels[index]] = turn + 1
        ranked.append((turn, lacking[index], index))
    return [index for _, _, index in sorted(ranked)[:count]]


def _answers(model: RobustModel, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with inference(model), torch.inference_mode():
        confidence, answer = torch.cat([model(part).softmax(1) for part in x.split(100)]).max(1)
    # Cloned: an inference tensor could not be used where gradients flow.
    return answer.clone(), confidence.clone()


def gallery_figure(found: Shown, classes: Sequence[str], threat: Threat) -> Figure:
    """Images across; down, the clean image, then for each model the image attacked against it with its answer, and the
    change, magnified around grey by one factor for all.

    Small images are drawn at a whole multiple of their pixels. A class name that no font at hand can draw becomes
    ``class 17``; one of more than 20 characters, or too wide, ends in an ellipsis.
    """
    count, _, height, width = found.x.shape
    factor = _CELL / max(height, width)
    factor = float(int(factor)) if factor >= 3 else factor
    cell = round(width * factor), round(height * factor)
    page = _LEFT + max(count, 5) * _PITCH
    name = _Names(classes, _PITCH - 6)
    changes = {model: attacked.x - found.x for model, attacked in found.attacked.items()}
    scale = magnification(list(changes.values()), threat)

    short = all(len(name(index)) <= 6 for index in _named(found))
    caption = 36 if short else 62
    total = 88 + cell[1] + 36 + len(found.attacked) * (2 * cell[1] + caption + 24) + (28 if found.telling else 0)

    figure = Figure(figsize=(page / DPI, total / DPI), dpi=DPI)
    # One set of axes for the whole page: its units are pixels, counted from the upper left corner.
    sheet = figure.add_axes((0, 0, 1, 1), xlim=(0, page), ylim=(total, 0), autoscale_on=False)
    sheet.axis("off")

    def write(x: float, y: float, text: str, **style: Any) -> None:
        style = {"fontsize": 8, "color": INK, "va": "top"} | style
        sheet.text(x, y, text, parse_math=False, **style)

    def picture(column: int, y: float, image: torch.Tensor, edge: str, *, smooth: bool = True) -> None:
        x = _LEFT + column * _PITCH + (_PITCH - cell[0]) // 2
        pixels = image.clamp(0, 1).permute(1, 2, 0).numpy()
        pixels = pixels if pixels.shape[2] == 3 else pixels.mean(2)
        # An image larger than its place is averaged down. A change never is: it would seem less than it is.
        kind = "hanning" if smooth and factor < 1 else "nearest"
        place = (x, x + cell[0], y + cell[1], y)
        sheet.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation=kind, extent=place, aspect="auto")
        thickness = 0.6 if edge == PALE else 1.5
        sheet.add_patch(Rectangle((x, y), *cell, fill=False, edgecolor=edge, linewidth=thickness, zorder=2))

    write(16, 14, f"What an attack inside {threat} does", fontsize=11, weight="bold")
    method = (
        f"PGD, {STEPS} steps, against each model itself. Below each: its change, magnified {scale:g} times around grey."
    )
    write(16, 46, method, color=GREY)
    centres = [_LEFT + (column + 0.5) * _PITCH for column in range(count)]
    y = 88
    write(16, y + cell[1] / 2, "clean", va="center")
    for column, centre in enumerate(centres):
        picture(column, y, found.x[column], PALE)
        write(centre, y + cell[1] + 8, name(int(found.y[column])), ha="center")
    y += cell[1] + 36
    for model, attacked in found.attacked.items():
        below = y + cell[1] + caption
        write(16, y + cell[1] / 2, f"attack on\nthe {model}", va="center")
        write(16, below + cell[1] / 2, "change", va="center", color=GREY)
        for column, centre in enumerate(centres):
            answer = int(attacked.answer[column])
            mark, colour = ("✓", BLUE) if answer == int(found.y[column]) else ("✗", ORANGE)
            sure = percent(float(attacked.confidence[column]))
            said = f"{mark} says {name(answer)}, {sure}" if short else f"{mark} says, {sure} sure:\n{name(answer)}"
            picture(column, y, attacked.x[column], colour)
            write(centre, y + cell[1] + 8, said, color=colour, ha="center", linespacing=1.25)
            picture(column, below, 0.5 + scale * changes[model][column], PALE, smooth=False)
        y = below + cell[1] + 24
    if found.telling:
        rule = "Chosen: images that every model answers rightly when clean, and the teacher wrongly under attack."
        write(16, y - 4, rule, color=GREY)
    return figure


def magnification(changes: Sequence[torch.Tensor], threat: Threat) -> float:
    """What brings a change of eps (linf), or nearly the largest of the changes, to black or white; to two digits."""
    if threat.norm == "linf" and threat.eps:
        return float(f"{0.5 / threat.eps:.2g}")
    sizes = np.concatenate([change.abs().flatten().numpy() for change in changes])
    sizes = sizes[sizes > 1e-6]
    return float(f"{0.5 / np.quantile(sizes, 0.99):.2g}") if len(sizes) else 1.0


def percent(share: float) -> str:
    """A confidence in whole percent; what is not certain is never said to be."""
    return ">99%" if share > 0.995 else f"{100 * share:.0f}%"


def shorten(name: str, length: int = 20) -> str:
    """The name on one line, and with an ellipsis where it is longer than ``length`` characters."""
    name = " ".join(name.split())
    return name if len(name) <= length else name[: length - 1].rstrip(" ,;") + "…"


def _named(found: Shown) -> set[int]:
    """The classes that a gallery names."""
    return set(torch.cat([found.y, *(attacked.answer for attacked in found.attacked.values())]).tolist())


class _Names:
    """Class names as they can be drawn at 8 points in ``width`` pixels."""

    def __init__(self, classes: Sequence[str], width: float) -> None:
        self._classes, self._width = classes, width
        self._fonts = [font_manager.get_font(font_manager.findfont(family)) for family in _families()]
        self._renderer = FigureCanvasAgg(Figure(dpi=DPI)).get_renderer()

    def __call__(self, index: int) -> str:
        name = shorten(self._classes[index])
        if not name or not all(any(font.get_char_index(ord(letter)) for font in self._fonts) for letter in name):
            return f"class {index}"
        fitting = (cut for length in range(20, 1, -1) if self._measure(cut := shorten(name, length)) <= self._width)
        return next(fitting, "…")

    def _measure(self, name: str) -> float:
        return self._renderer.get_text_width_height_descent(name, FontProperties(size=8), ismath=False)[0]


# Both


def _families() -> list[str]:
    known = {font.name for font in font_manager.fontManager.ttflist}
    return [family for family in _FAMILIES if family in known]


@contextmanager
def _style() -> Iterator[None]:
    """Our own settings, whatever the user's matplotlibrc says, and the user's again afterwards."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"font.family": _families(), "font.size": 8})
        yield


def _png(figure: Figure, attempts: Sequence[tuple[int, Sequence[int | None]]]) -> bytes:
    """The figure as a PNG of at most ``MAX_BYTES``, or the last attempt where photographs do not allow it."""
    FigureCanvasAgg(figure)
    content = b""
    for dpi, palettes in attempts:
        rendered = io.BytesIO()
        figure.savefig(rendered, format="png", dpi=dpi)
        for colours in palettes:
            buffer = rendered
            if colours:
                image = Image.open(rendered).convert("RGB").quantize(colours, dither=Image.Dither.NONE)
                image.save(buffer := io.BytesIO(), format="png", optimize=True)
            content = buffer.getvalue()
            if len(content) <= MAX_BYTES:
                return content
    return content
