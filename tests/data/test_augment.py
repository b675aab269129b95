"""Augmentation: what may change, how often, and that the generator decides all of it."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from fdml.data import augment as changes
from fdml.data.augment import AUGMENTATIONS, augment, cutmix
from fdml.errors import InputError

SHAPES = [(3, 32, 32), (1, 8, 8), (1, 28, 28), (3, 9, 17), (1, 1, 1)]


def images(b: int = 64, c: int = 3, h: int = 32, w: int = 32) -> torch.Tensor:
    return torch.rand(b, c, h, w, generator=torch.Generator().manual_seed(0))


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kinds", [(), *((kind,) for kind in AUGMENTATIONS), AUGMENTATIONS])
@pytest.mark.parametrize("shape", SHAPES)
def test_shape_range_input_and_repetition(kinds: tuple[str, ...], shape: tuple[int, int, int]) -> None:
    x = images(16, *shape)
    before = x.clone()
    out = augment(x, kinds, seeded())
    assert torch.equal(x, before)
    assert out.shape == x.shape
    assert out.dtype == x.dtype
    assert out.min() >= 0
    assert out.max() <= 1
    assert torch.equal(augment(x, kinds, seeded()), out)
    if kinds and shape == (3, 32, 32):
        assert not torch.equal(augment(x, kinds, seeded(2)), out)


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    augment(images(), AUGMENTATIONS, seeded())
    assert torch.equal(torch.get_rng_state(), before)


def test_flip_mirrors_about_half() -> None:
    x = images(2000, 1, 2, 3)
    out = augment(x, ("flip",), seeded())
    same = (out == x).flatten(1).all(1)
    assert torch.equal(out[~same], x[~same].flip(3))
    assert 0.45 < same.double().mean() < 0.55


@pytest.mark.parametrize(("side", "border"), [(32, 4), (28, 3), (8, 1)])
def test_crop_is_a_window_of_the_padded_image_and_reaches_every_place(side: int, border: int) -> None:
    x = images(1000, 1, side, side)
    out = augment(x, ("crop",), seeded())
    padded = torch.nn.functional.pad(x, (border,) * 4)
    found = torch.zeros(len(x), dtype=torch.bool)
    places = 0
    for top in range(2 * border + 1):
        for left in range(2 * border + 1):
            here = (out == padded[:, :, top : top + side, left : left + side]).flatten(1).all(1)
            found |= here
            places += bool(here.any())
    assert found.all()
    assert places == (2 * border + 1) ** 2


def test_erase_fills_one_rectangle_in_a_quarter_of_the_images() -> None:
    x = torch.full((4000, 2, 32, 32), 2.0)  # outside [0, 1], so noise cannot be mistaken for it
    erased = augment(x, ("erase",), seeded()) != 2
    assert torch.equal(erased[:, 0], erased[:, 1])
    mask = erased[:, 0]
    hit = mask.flatten(1).any(1)
    assert 0.22 < hit.double().mean() < 0.28
    mask = mask[hit]
    height, width = mask.any(2).sum(1), mask.any(1).sum(1)
    area = mask.flatten(1).sum(1)
    assert torch.equal(area, height * width)
    # a rectangle is one run of rows and of columns
    for lines in (mask.any(2), mask.any(1)):
        assert ((lines[:, 1:] & ~lines[:, :-1]).sum(1) + lines[:, 0] == 1).all()
    share = area / 32**2
    assert share.min() > 0.012  # 2% before its sides are rounded
    assert share.max() < 0.36
    aspect = height / width
    assert (aspect > 1).double().mean() == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("kind", AUGMENTATIONS)
def test_every_image_draws_for_itself(kind: str) -> None:
    x = images(1, 3, 16, 16).expand(64, -1, -1, -1)
    out = augment(x, (kind,), seeded())
    assert len(out.flatten(1).unique(dim=0)) > 1
    other = x.clone()
    other[0] = 0.5  # what one image looks like does not reach the others
    assert torch.equal(augment(other, (kind,), seeded())[1:], out[1:])


@pytest.mark.parametrize(("h", "w", "most"), [(32, 32, 10), (28, 28, 8), (8, 16, 2), (3, 3, 0)])
def test_cropshift_moves_a_rectangle_and_leaves_black_around_it(h: int, w: int, most: int) -> None:
    x = 0.5 + (torch.arange(h)[:, None] * w + torch.arange(w)).float()  # each pixel tells where it is from
    out = augment(x.expand(3000, 1, h, w), ("cropshift",), seeded())[:, 0]
    kept = out > 0
    rows, columns = kept.any(2), kept.any(1)
    assert torch.equal(kept, rows[:, :, None] & columns[:, None, :])
    lost = (h - rows.sum(1)) + (w - columns.sum(1))
    assert set(lost.tolist()) == set(range(most + 1))
    assert lost.double().mean() == pytest.approx(most / 2, abs=0.2)
    assert (w - columns.sum(1)).double().mean() == pytest.approx(most / 4, abs=0.15)
    # one whole vector from where the rectangle was to where it is, of up to what was lost, either way
    from_row, from_column = (out / w).floor(), (out % w).floor()
    for moved, drawn in (
        (from_row - torch.arange(h)[:, None], h - rows.sum(1)),
        (from_column - torch.arange(w), w - columns.sum(1)),
    ):
        low = moved.masked_fill(~kept, math.inf).amin((1, 2))
        high = moved.masked_fill(~kept, -math.inf).amax((1, 2))
        assert torch.equal(low, high)
        assert (low.abs() <= drawn).all()
        assert most == 0 or {-1.0, 0.0, 1.0} <= set(low.tolist())


PICTURE = torch.from_numpy(np.random.default_rng(0).integers(30, 200, (128, 200, 3), dtype=np.uint8))
PILLOW: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "_saturate": lambda image, factor: ImageEnhance.Color(image).enhance(factor),
    "_brighten": lambda image, factor: ImageEnhance.Brightness(image).enhance(factor),
    "_contrast": lambda image, factor: ImageEnhance.Contrast(image).enhance(factor),
    "_sharpen": lambda image, factor: ImageEnhance.Sharpness(image).enhance(factor),
    "_stretch": lambda image, _: ImageOps.autocontrast(image),
    "_equalize": lambda image, _: ImageOps.equalize(image),
}


@pytest.mark.parametrize("factor", [0.1, 1.0, 1.9])
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("name", PILLOW)
def test_colours_change_as_in_pillow(name: str, mode: str, factor: float) -> None:
    """To within what Pillow rounds on the way: most in equalize, a step of 99.8 to 99."""
    picture = Image.fromarray(PICTURE.numpy()).convert(mode)
    expected = np.atleast_3d(np.asarray(PILLOW[name](picture, factor)))
    x = torch.from_numpy(np.atleast_3d(np.asarray(picture)).copy()).permute(2, 0, 1)[None] / 255
    out = getattr(changes, name)(x, torch.full((1, 1, 1, 1), factor))
    assert (out[0].permute(1, 2, 0) * 255 - torch.from_numpy(expected.copy())).abs().max() < 2.6
    if factor == 1 and name not in ("_stretch", "_equalize"):
        assert torch.allclose(out, x, atol=1e-6)


@pytest.mark.parametrize("name", ["_stretch", "_equalize"])
def test_a_channel_of_one_value_stays(name: str) -> None:
    x = images(2, 3, 5, 5)
    x[:, 1] = 0.3
    out = getattr(changes, name)(x, torch.zeros(2, 1, 1, 1))
    assert torch.equal(out[:, 1], x[:, 1])
    assert torch.equal(out[:, 0].amin((1, 2)), torch.zeros(2))
    assert torch.equal(out[:, 0].amax((1, 2)), torch.ones(2))


def test_saturation_leaves_grey_as_it_is() -> None:
    factors = torch.linspace(0.1, 1.9, 8).view(8, 1, 1, 1)
    for x in (images(8, 1), images(8, 1).expand(-1, 3, -1, -1)):
        assert torch.allclose(changes._saturate(x, factors), x, atol=1e-6)


def degrees(*angles: float) -> torch.Tensor:
    return torch.tensor(angles).view(-1, 1, 1, 1)


def test_rotation_turns_about_the_centre() -> None:
    x = images(5, 3, 12, 12)
    out = changes._rotate(x, degrees(0.0, 90.0, 180.0, 270.0, -90.0))
    for place, quarters in enumerate((0, 1, 2, 3, -1)):
        assert torch.equal(out[place], x[place].rot90(quarters, (1, 2)))
    # a bar of another shape of image turns by its angle, and what comes from outside is black
    bar = torch.zeros(1, 1, 41, 81)
    bar[:, :, 20] = 1
    turned = changes._rotate(bar, degrees(10.0))[0, 0]
    row, column = turned.nonzero().double().sub(torch.tensor([20, 40])).unbind(1)
    assert abs(row @ column / (column @ column)) == pytest.approx(math.tan(math.radians(10)), abs=0.01)
    assert changes._rotate(torch.ones(1, 1, 40, 40), degrees(45.0))[0, 0, 0, 0] == 0


def test_shears_slide_rows_and_columns() -> None:
    x = images(1, 2, 21, 21)
    slope = torch.full((1, 1, 1, 1), 0.1)
    rows, columns = changes._shear_rows(x, slope), changes._shear_columns(x, slope)
    assert torch.equal(rows[:, :, 10], x[:, :, 10])
    assert torch.equal(rows[:, :, 20, :-1], x[:, :, 20, 1:])  # ten rows below the centre: by one pixel
    assert torch.equal(rows[:, :, 0, 1:], x[:, :, 0, :-1])
    assert (rows[:, :, 20, -1] == 0).all()
    assert torch.equal(columns, changes._shear_rows(x.mT, slope).mT)


def test_colorshape_takes_every_change_in_its_share_and_range(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each change is replaced by one that writes its number and its strength into the image."""

    def noting(number: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        return lambda x, strength: torch.cat([torch.full_like(strength, number), strength], 1)

    assert sum(change.share for change in changes._CHANGES) == 1
    noted = tuple(change._replace(apply=noting(k)) for k, change in enumerate(changes._CHANGES))
    monkeypatch.setattr(changes, "_CHANGES", noted)
    out = augment(torch.full((8000, 2, 1, 1), -1.0), ("colorshape",), seeded())[:, :, 0, 0]
    for k, change in enumerate(noted):
        strength = out[out[:, 0] == k, 1]
        assert len(strength) / len(out) == pytest.approx(change.share, abs=0.015), change
        spread = (change.high - change.low) / 20
        assert change.low <= strength.abs().min() <= change.low + spread, change
        assert change.high - spread <= strength.abs().max() <= change.high, change
        assert (strength < 0).double().mean() == pytest.approx(0.5 if change.signed else 0, abs=0.07), change


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 9, 17)])
def test_cutmix_gives_each_its_exact_share(shape: tuple[int, int, int]) -> None:
    b = 500
    x = torch.arange(b).float().view(b, 1, 1, 1).expand(b, *shape)  # each pixel tells whose it is
    mixed, order, share = cutmix(x, seeded())
    assert sorted(order.tolist()) == list(range(b))
    own = mixed == x
    assert (own | (mixed == x[order])).all()
    assert torch.equal(own.all(1), own.any(1))
    other = order != torch.arange(b)
    assert torch.equal(own[:, 0].float().mean((1, 2))[other], share[other])
    assert share.min() >= 0.5
    assert share.max() <= 1
    # what is pasted, or what is left around it, is one rectangle for each image
    kept, pasted = (
        (part == (part.any(2)[:, :, None] & part.any(1)[:, None, :])).flatten(1).all(1)
        for part in (own[other, 0], ~own[other, 0])
    )
    assert (kept | pasted).all()
    assert (~kept).any()
    assert (~pasted).any()
    assert len(share.unique()) > 30
    again = cutmix(x, seeded())
    assert all(torch.equal(one, two) for one, two in zip((mixed, order, share), again, strict=True))
    assert not torch.equal(cutmix(x, seeded(2))[0], mixed)


def test_cutmix_shares_are_those_of_the_published_algorithm() -> None:
    """Of the larger part: drawn here step by step as the paper writes it, on a square of side 1."""
    rng, n = np.random.default_rng(0), 20_000
    cut = np.sqrt(1 - rng.beta(1, 1, n))
    middle = rng.random((2, n))
    pasted = ((middle + cut / 2).clip(0, 1) - (middle - cut / 2).clip(0, 1)).prod(0)
    at = np.linspace(0.05, 0.95, 19)
    expected = np.quantile(np.maximum(pasted, 1 - pasted), at)
    _, _, share = cutmix(torch.zeros(4000, 1, 64, 64), seeded())
    assert np.quantile(share.numpy(), at) == pytest.approx(expected, abs=0.02)


def test_cutmix_is_asked_for_by_its_own_name() -> None:
    with pytest.raises(InputError, match="unknown augmentation 'cutmix'"):
        augment(images(), ("cutmix",), seeded())


def test_cutmix_keeps_range_input_and_the_global_generator() -> None:
    for shape in SHAPES:
        x = images(16, *shape)
        before, state = x.clone(), torch.get_rng_state()
        mixed, _, _ = cutmix(x, seeded())
        assert mixed.shape == x.shape
        assert torch.equal(x, before)
        assert torch.equal(torch.get_rng_state(), state)
        assert mixed.min() >= 0
        assert mixed.max() <= 1


def test_unknown_kind() -> None:
    with pytest.raises(InputError, match="did you mean 'flip'"):
        augment(images(), ("crop", "flp"), seeded())
