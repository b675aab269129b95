"""Pictures are judged by what can be measured: size, text that is neither cut nor overlapping, and what is chosen."""

import io
from itertools import combinations, pairwise
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from torch import nn

from fdml import curves, drawing, gallery, showing
from fdml.models import RobustModel, wrap
from fdml.threat import Threat

LINF = Threat("linf", 8 / 255)


def texts(figure: Figure) -> list[tuple[str, tuple[float, float, float, float]]]:
    """Every text that is drawn, with its place: left, bottom, right, top in shares of the figure."""
    FigureCanvasAgg(figure).draw()
    drawn = list(figure.texts)
    for axes in figure.axes:
        drawn += [*axes.texts, *(child for child in axes.get_children() if isinstance(child, Text))]
        for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            labels = zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=True)
            drawn += [axis.label, *(label for place, label in labels if low <= place <= high and axes.axison)]
    boxes = {text: Text.get_window_extent(text).transformed(figure.transFigure.inverted()) for text in drawn}
    return [(text.get_text(), box.extents) for text, box in boxes.items() if text.get_text()]


def check_text(figure: Figure) -> None:
    found = texts(figure)
    assert found
    for text, (left, bottom, right, top) in found:
        assert left >= 0 and bottom >= 0 and right <= 1 and top <= 1, f"{text!r} is cut"  # noqa: PT018
    for (one, a), (other, b) in combinations(found, 2):
        apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] + 1e-3 or b[3] <= a[1] + 1e-3
        assert apart, f"{one!r} lies on {other!r}"


def opened(path: Path) -> Image.Image:
    return Image.open(io.BytesIO(path.read_bytes()))


def said(figure: Figure) -> str:
    return "\n".join(text for text, _ in texts(figure))


def row(role: str, epoch: int, **more: float) -> dict:
    clean = 1 - 0.8 / epoch
    return {"role": role, "epoch": epoch, "lr": 0.1, "loss": 2.0 / epoch, "ce": 1.7 / epoch, "clean": clean} | more


def run(epochs: int = 20, *, teacher: bool = True, metric: bool = True, until: int = 14) -> list[dict]:
    rows = [row("teacher", epoch) for epoch in range(1, 6)] if teacher else []
    for epoch in range(1, epochs + 1):
        extra = {"pgd": 0.7 - 0.6 / epoch, "seconds": 1.0, "images_per_second": 1000.0}
        if metric and epoch <= until:
            extra |= {"fd": 0.3 / epoch, "ml": 0.02 / epoch, "active": 1 / epoch, "d_ap": 0.3 / epoch, "d_an": 0.4}
        rows.append(row("student", epoch, **extra))
    return rows


RUNS = {
    "full": run(),
    "held": run(until=20),
    "long": run(2000, until=2000),
    "one epoch": run(1),
    "two epochs": run(2),
    "no teacher": run(teacher=False),
    "no metric term": run(metric=False),
    "trades": [row("student", epoch, kl=0.0 if epoch == 1 else 0.5, pgd=0.3) for epoch in range(1, 4)],
    "mart": [{"role": "student", "epoch": 1, "loss": 3.0, "bce": 2.0, "kl": 1.0, "clean": 0.0, "pgd": 0.0}],
    "all equal": [row("teacher", 1) | {"clean": 1.0}, *(row("student", e, pgd=1.0) | {"clean": 1.0} for e in (1, 2))],
    "standard": [row("student", 1), row("student", 2)],
    "teacher only": [row("teacher", 1)],
    "nothing": [],
}


@pytest.mark.parametrize("name", RUNS)
def test_curves_are_legible(name: str) -> None:
    check_text(curves.curves_figure(RUNS[name]))


def test_curves_show_what_there_is() -> None:
    full = said(curves.curves_figure(RUNS["full"]))
    for words in ("clean 96.0%", "PGD 67.0%", "teacher 84.0%", "kept: epoch 20", "total", "d(a, p)", "active 7%"):
        assert words in full
    bare = said(curves.curves_figure(RUNS["standard"]))
    for words in ("PGD", "teacher", "total", "d(a, p)", "active"):
        assert words not in bare
    assert "Teacher on validation" in said(curves.curves_figure(RUNS["teacher only"]))
    assert said(curves.curves_figure([])) == "no epoch was recorded"


def test_the_epoch_kept_is_the_later_of_equals() -> None:
    rows = [row("student", epoch, pgd=pgd) for epoch, pgd in enumerate((0.1, 0.5, 0.5, 0.2), 1)]
    assert "kept: epoch 3" in said(curves.curves_figure(rows))


def test_curves_are_a_small_png_and_leave_settings_alone(tmp_path: Path) -> None:
    path = tmp_path / "report" / "curves.png"
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black"}):
        before = dict(matplotlib.rcParams)
        curves.write_curves(RUNS["full"], path)
        assert dict(matplotlib.rcParams) == before
    image = opened(path)
    assert image.format == "PNG"
    assert image.width == drawing.WIDTH
    assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
    assert path.stat().st_size < 100_000
    assert [file.name for file in path.parent.iterdir()] == ["curves.png"]


@given(st.lists(st.floats(0, 100), max_size=8))
def test_spread_keeps_order_and_gap(places: list[float]) -> None:
    moved = curves.spread(places, gap=10, low=0, high=100)
    order = sorted(range(len(places)), key=lambda index: (places[index], -index))
    for below, above in pairwise(order):
        assert moved[above] - moved[below] >= 10 - 1e-9
    assert all(-1e-9 <= place <= 100 + 1e-9 for place in moved)


def test_spread_leaves_what_is_apart() -> None:
    assert curves.spread([50, 10, 30], gap=10, low=0, high=100) == [50, 10, 30]
    assert curves.spread([50, 50], gap=10, low=0, high=100) == [60, 50]
    assert curves.spread([99, 100], gap=10, low=0, high=100) == [90, 100]


def linear(channels: int, classes: int, seed: int = 0) -> RobustModel:
    torch.manual_seed(seed)
    layers = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * channels, classes))
    return wrap(layers, ["1"])


def images(n: int, channels: int, height: int, width: int) -> torch.Tensor:
    """Noise; at 224 pixels about as smooth as photographs are."""
    small = torch.rand(n, channels, height % 208, width % 208, generator=torch.Generator().manual_seed(0))
    return nn.functional.interpolate(small, (height, width), mode="bilinear")


NAMES = ["great white shark, man-eater", "Zürich tram", "$a$ $b_2$ [x]", "two\nlines", "日本の猫", "W" * 40, "", "\x07"]
CASES = {
    # channels, height, width, classes, images, models
    "digits": (1, 8, 8, [*"0123456789"], 20, ("teacher", "student")),
    "two classes": (3, 32, 32, ["automobile", "Flugzeug"], 12, ("teacher", "student")),
    "thousand classes": (3, 224, 224, NAMES + [f"n{index:08}" for index in range(992)], 7, ("teacher", "student")),
    "student only": (1, 28, 28, [*"0123456789"], 20, ("student",)),
    "one image": (3, 20, 32, ["a", "b", "c"], 1, ("student",)),
    "tall": (3, 64, 24, ["a", "b", "c"], 4, ("teacher", "student")),
}


@pytest.mark.parametrize("name", CASES)
def test_galleries_are_legible_and_small(name: str, tmp_path: Path) -> None:
    channels, height, width, classes, n, roles = CASES[name]
    models = {role: linear(channels, len(classes), seed) for seed, role in enumerate(roles)}
    x, y = images(n, channels, height, width), torch.arange(n) % len(classes)
    with drawing.style():
        figure = gallery.gallery_figure(gallery.shown(models, x, y, LINF), classes, LINF)
        check_text(figure)
        words = said(figure)
    for word in ("linf 8/255", "PGD, 50 steps", "16 times", *(f"the {role}" for role in roles)):
        assert word in words
    assert words.count("✓") + words.count("✗") == min(6, n) * len(roles)
    path = tmp_path / "examples.png"
    gallery.write_gallery(models, x, y, classes, LINF, path)
    assert opened(path).format == "PNG"
    assert path.stat().st_size <= drawing.MAX_BYTES


@pytest.mark.parametrize("threat", [Threat("l2", 0.5), Threat("l1", 5), Threat("linf", 0)], ids=str)
def test_galleries_of_every_threat(threat: Threat, tmp_path: Path) -> None:
    x, y = images(8, 1, 8, 8), torch.arange(8) % 4
    gallery.write_gallery({"student": linear(1, 4)}, x, y, [*"abcd"], threat, tmp_path / "examples.png")
    assert (tmp_path / "examples.png").exists()


def test_the_same_arguments_give_the_same_file(tmp_path: Path) -> None:
    models = {"teacher": linear(1, 4).train(), "student": linear(1, 4, 1)}
    x, y = images(8, 1, 8, 8), torch.arange(8) % 4
    for name in ("one.png", "two.png"):
        gallery.write_gallery(models, x, y, [*"abcd"], LINF, tmp_path / name)
        torch.rand(1)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    assert models["teacher"].training
    assert all(parameter.requires_grad for parameter in models["teacher"].parameters())


def test_small_pixels_stay_whole(tmp_path: Path) -> None:
    x = (images(1, 1, 8, 8) > 0.5).float()
    model = linear(1, 2)
    gallery.write_gallery({"student": model}, x, torch.tensor([0]), ["a", "b"], LINF, tmp_path / "examples.png")
    drawn = opened(tmp_path / "examples.png").convert("L")
    left, top, side = 126 + 6, 88, 192 // 8
    for line in range(8):
        for column in range(8):
            # Well inside the frame that runs around the picture.
            corner = (
                left + column * side + 4,
                top + line * side + 4,
                left + (column + 1) * side - 4,
                top + (line + 1) * side - 4,
            )
            value = round(255 * float(x[0, 0, line, column]))
            assert drawn.crop(corner).getextrema() == (value, value)


class Brightness(nn.Module):
    """Two classes, dark and bright; its certainty is ``slope``."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.tensor(threshold))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bright = 50 * (x.mean((1, 2, 3)) - self.threshold)
        return torch.stack([-bright, bright], 1)


def test_chosen_are_images_that_tell_something() -> None:
    level = torch.tensor([0.05, 0.45, 0.55, 0.95, 0.6, 0.44, 0.1, 0.56])
    x = level[:, None, None, None].expand(-1, 1, 8, 8).contiguous()
    y = torch.tensor([0, 0, 1, 1, 0, 0, 0, 1])  # the fifth is answered wrongly before any attack
    models = {"teacher": wrap(nn.Sequential(Brightness(0.5)), ["0"])}
    found = gallery.shown(models, x, y, Threat("linf", 0.1), count=4)
    assert found.telling
    assert found.y.tolist() == [0, 0, 1, 1]
    assert found.x[:, 0, 0, 0].tolist() == pytest.approx([0.45, 0.44, 0.55, 0.56])
    assert found.attacked["teacher"].answer.tolist() == [1, 1, 0, 0]
    assert not gallery.shown(models, x, y, Threat("linf", 0.1), count=5).telling


def test_rounds_take_the_best_of_each_class_first() -> None:
    labels, lacking = [0, 0, 1, 1, 2, 0], [1, 0, 0, 0, 2, 0]
    assert gallery.rounds(labels, lacking, 3) == [1, 2, 4]
    assert gallery.rounds(labels, lacking, 9) == [1, 2, 4, 3, 5, 0]


def test_words() -> None:
    assert [showing.percent(share) for share in (0.0, 0.204, 0.97, 0.996, 1.0)] == ["0%", "20%", "97%", ">99%", ">99%"]
    assert showing.shorten("twenty letters exact") == "twenty letters exact"
    assert showing.shorten("great white shark, man-eater") == "great white shark…"
    assert showing.shorten(" two\n lines ") == "two lines"
    assert showing.magnification([], Threat("linf", 0.2)) == 2.5
    assert showing.magnification([np.full((1, 1, 8, 8), -0.01)], Threat("l2", 0.5)) == 50
    assert showing.magnification([np.zeros((1, 1, 8, 8))], Threat("l2", 0.5)) == 1


def test_a_picture_that_cannot_get_small_is_still_a_picture() -> None:
    figure = Figure(figsize=(9, 9), dpi=50)
    figure.figimage(images(1, 3, 200, 200)[0].permute(1, 2, 0).numpy())
    content = drawing.png(figure, [(50, (None, 2))])
    assert Image.open(io.BytesIO(content)).width == 450
