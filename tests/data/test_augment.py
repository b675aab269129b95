"""Augmentation: what may change, how often, and that the generator decides all of it."""

import pytest
import torch

from fdml.data.augment import AUGMENTATIONS, augment
from fdml.errors import InputError


def images(b: int = 64, c: int = 3, h: int = 32, w: int = 32) -> torch.Tensor:
    return torch.rand(b, c, h, w, generator=torch.Generator().manual_seed(0))


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kinds", [(), ("flip",), ("crop",), ("erase",), AUGMENTATIONS])
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 8, 8), (1, 28, 28), (3, 9, 17), (1, 1, 1)])
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


def test_unknown_kind() -> None:
    with pytest.raises(InputError, match="did you mean 'flip'"):
        augment(images(), ("crop", "flp"), seeded())
