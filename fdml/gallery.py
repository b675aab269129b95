"""The picture of what an attack does to an image and to each model's answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle

from fdml.attacks import pgd
from fdml.drawing import BLUE, DPI, GREY, INK, ORANGE, PALE, families, png, style
from fdml.files import write_whole
from fdml.inference import inference
from fdml.losses import Labels
from fdml.models import RobustModel
from fdml.showing import magnification, percent, shorten
from fdml.threat import Images, Threat

# In pixels: the row names, from one column to the next, and the side of an image.
_LEFT, _PITCH, _CELL = 126, 204, 192

# Dots per inch and colours, None for all: sharp and true where that fits, then with fewer colours, then fewer pixels.
_PHOTOGRAPHS = ((DPI, (None, 256)), (100, (256, 96, 48)))


def write_gallery(
    models: Mapping[str, RobustModel], x: Images, y: Labels, classes: Sequence[str], threat: Threat, path: Path
) -> None:
    """Writes, as a PNG, what an attack inside ``threat`` does to a few of the images ``x`` and to each model's answer.

    ``shown`` makes the attacks and ``gallery_figure`` draws them. The same arguments give the same file.
    """
    with style():
        write_whole(path, png(gallery_figure(shown(models, x, y, threat), classes, threat), _PHOTOGRAPHS))


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
        x_adv = pgd(model, x, y, threat, steps=STEPS, keep="best", generator=torch.Generator(x.device).manual_seed(0))
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
    scale = magnification([change.numpy() for change in changes.values()], threat)

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


def _named(found: Shown) -> set[int]:
    """The classes that a gallery names."""
    return set(torch.cat([found.y, *(attacked.answer for attacked in found.attacked.values())]).tolist())


class _Names:
    """Class names as they can be drawn at 8 points in ``width`` pixels."""

    def __init__(self, classes: Sequence[str], width: float) -> None:
        self._classes, self._width = classes, width
        self._fonts = [font_manager.get_font(font_manager.findfont(family)) for family in families()]
        self._renderer = FigureCanvasAgg(Figure(dpi=DPI)).get_renderer()

    def __call__(self, index: int) -> str:
        name = shorten(self._classes[index])
        if not name or not all(any(font.get_char_index(ord(letter)) for font in self._fonts) for letter in name):
            return f"class {index}"
        fitting = (cut for length in range(20, 1, -1) if self._measure(cut := shorten(name, length)) <= self._width)
        return next(fitting, "…")

    def _measure(self, name: str) -> float:
        return self._renderer.get_text_width_height_descent(name, FontProperties(size=8), ismath=False)[0]
