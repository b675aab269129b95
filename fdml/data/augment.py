"""Random changes of a batch that keep its labels true, and CutMix, which mixes them; on the device of the batch."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from fdml.errors import unknown

Images = Float[Tensor, "b c h w"]
AUGMENTATIONS = ("flip", "crop", "erase", "cropshift", "colorshape")


def augment(x: Images, kinds: tuple[str, ...], generator: torch.Generator | None) -> Images:
    """``x`` after each of ``kinds`` in turn; every image draws for itself. A new tensor, still in [0, 1].

    ``generator`` lives on the device of ``x``; the same state gives the same result. ``flip``: left to right, with
    probability 1/2. ``crop``: a border of zeros (4 pixels, an eighth of the height for small images), then a window of
    the old size anywhere in it. ``erase``: with probability 1/4 a rectangle of uniform noise. ``cropshift``: a part of
    the image, moved, on black. ``colorshape``: one change of the colours or the shape. ``flip``, ``cropshift``,
    ``colorshape``, ``erase`` in this order is a setting like IDBH (Li & Spratling 2023, arXiv 2301.09879), which
    erases in half of the images or in all, to black.

    Raises ``InputError`` for an unknown kind.
    """
    for kind in kinds:
        if kind not in _KINDS:
            raise unknown("augmentation", kind, AUGMENTATIONS)
    for kind in kinds:
        x = _KINDS[kind](x, generator)
    return x


def flip(x: Images, generator: torch.Generator | None) -> Images:
    """Each image mirrored left to right with probability 1/2."""
    mirrored = _uniform(len(x), x, generator) < 0.5
    return torch.where(mirrored[:, None, None, None], x.flip(3), x)


def crop(x: Images, generator: torch.Generator | None) -> Images:
    """Each image moved by up to the border in each direction; zeros enter, as in the published recipes."""
    b, c, h, w = x.shape
    border = min(4, max(1, h // 8))
    padded = torch.nn.functional.pad(x, (border,) * 4)
    shifts = 2 * border + 1
    top, left = torch.randint(0, shifts, (2, b), device=x.device, generator=generator)
    image = torch.arange(b, device=x.device)[:, None, None, None]
    channel = torch.arange(c, device=x.device)[None, :, None, None]
    row = (top[:, None] + torch.arange(h, device=x.device))[:, None, :, None]
    column = (left[:, None] + torch.arange(w, device=x.device))[:, None, None, :]
    return padded[image, channel, row, column]


def erase(x: Images, generator: torch.Generator | None) -> Images:
    """Random erasing (Zhong et al. 2020, algorithm 1), with probability 1/4.

    The rectangle has 2% to 33% of the area and an aspect ratio of 0.3 to 3.3, log-uniform; it is filled with uniform
    noise in [0, 1] a pixel and channel, the paper's best choice. Where the paper draws again until the rectangle fits,
    its sides are cut to the image here, which needs no loop.
    """
    b, _, h, w = x.shape
    chosen = _uniform(b, x, generator) < 0.25
    area = h * w * (0.02 + (0.33 - 0.02) * _uniform(b, x, generator))
    aspect = 3.3 ** (2 * _uniform(b, x, generator) - 1)
    height = (area * aspect).sqrt().round().clamp(1, h)
    width = (area / aspect).sqrt().round().clamp(1, w)
    top = (_uniform(b, x, generator) * (h - height + 1)).floor()
    left = (_uniform(b, x, generator) * (w - width + 1)).floor()
    row, column = torch.arange(h, device=x.device), torch.arange(w, device=x.device)
    rows = (row >= top[:, None]) & (row < (top + height)[:, None]) & chosen[:, None]
    columns = (column >= left[:, None]) & (column < (left + width)[:, None])
    noise = torch.empty_like(x).uniform_(generator=generator)
    return torch.where((rows[:, :, None] & columns[:, None, :])[:, None], noise, x)


def cropshift(x: Images, generator: torch.Generator | None) -> Images:
    """A rectangle of each image moved to a random place, on black (Cropshift, Li & Spratling 2023).

    Width and height together lose 0 to 10 pixels of an image of 32, 5/16 of the shorter side of any other, as the
    authors set it for CIFAR-10; how many are the width's is uniform, and so are the places taken from and moved to.
    """
    b, _, h, w = x.shape
    cut = _up_to(torch.full((b,), min(h, w) * 5 // 16, device=x.device), generator)
    cut_width = _up_to(cut, generator)
    row, column = _moved(h, cut - cut_width, generator), _moved(w, cut_width, generator)
    return _pick(x, row[:, :, None], column[:, None, :])


def colorshape(x: Images, generator: torch.Generator | None) -> Images:
    """One of eight changes of each image, all equally likely (the colour-biased table of Li & Spratling 2023).

    Colour: saturation by a factor of 0.1 to 1.9, brightness and contrast of 0.5 to 1.9, sharpness of 0.1 to 1.9, the
    range of each channel stretched to [0, 1], its histogram made even. Shape, on black and with the nearest pixel: a
    shear of 0.05 to 0.15 along either axis, a rotation of 1 to 10 degrees, both either way. Strengths are uniform.
    Saturation leaves grey images as they are.
    """
    kind, amount, side = (_uniform(len(x), x, generator) for _ in range(3))
    out, begin = x, 0.0
    for change in _CHANGES:
        strength = change.low + (change.high - change.low) * amount
        if change.signed:
            strength = torch.where(side < 0.5, strength, -strength)
        chosen = (kind >= begin) & (kind < begin + change.share)
        out = torch.where(chosen[:, None, None, None], change.apply(x, strength[:, None, None, None]), out)
        begin += change.share
    return out


def cutmix(x: Images, generator: torch.Generator | None) -> tuple[Images, Int64[Tensor, " b"], Float[Tensor, " b"]]:
    """CutMix (Yun et al. 2019, algorithm 1): each image with a rectangle of another one in it; mixes labels too.

    Gives the mixed images, the place ``order`` of each one's partner in the batch, a random permutation (an image may
    meet itself), and ``share``: which part of its pixels, exactly, each image has kept, from 1/2 to 1; the partner has
    the rest. The label is ``share * y + (1 - share) * y[order]``. Every image has a rectangle of its own: of the area
    1 - lambda, lambda ~ Beta(1, 1), in the proportions of the image, its centre uniform, cut off at the border.

    Where the rectangle covers more than half, the two swap roles, and the image keeps what lies inside it. A pair
    (around, inside) is as likely as (inside, around), so this names the larger part first and changes nothing else:
    the mixed images and their labels have the distribution of the paper.
    """
    b, _, h, w = x.shape
    order = torch.randperm(b, device=x.device, generator=generator)
    side = _uniform(b, x, generator).sqrt()
    rows, columns = _window(h, side, generator), _window(w, side, generator)
    own = ~(rows[:, :, None] & columns[:, None, :])
    own ^= (own.float().mean((1, 2)) < 0.5)[:, None, None]
    return torch.where(own[:, None], x, x[order]), order, own.float().mean((1, 2))


_KINDS = {"flip": flip, "crop": crop, "erase": erase, "cropshift": cropshift, "colorshape": colorshape}


Strength = Float[Tensor, "b 1 1 1"]


def _saturate(x: Images, factor: Strength) -> Images:
    return _blend(_grey(x), x, factor)


def _brighten(x: Images, factor: Strength) -> Images:
    return _blend(torch.zeros_like(x), x, factor)


def _contrast(x: Images, factor: Strength) -> Images:
    return _blend(_grey(x).mean((2, 3), keepdim=True), x, factor)


def _sharpen(x: Images, factor: Strength) -> Images:
    """Away from a smoothed copy, whose pixels count 5 to their neighbours' 1; the border stays, as in Pillow."""
    smooth = x.clone()
    inner = torch.nn.functional.avg_pool2d(x, 3, stride=1, padding=1)[:, :, 1:-1, 1:-1]
    smooth[:, :, 1:-1, 1:-1] = (9 * inner + 4 * x[:, :, 1:-1, 1:-1]) / 13
    return _blend(smooth, x, factor)


def _stretch(x: Images, _: Strength) -> Images:
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    return torch.where(high > low, ((x - low) / (high - low)).clamp(0, 1), x)


def _equalize(x: Images, _: Strength) -> Images:
    """Each of 256 levels becomes the share of the channel's pixels that are darker, where the brightest have 1."""
    level = (x.flatten(2) * 255).round().long()
    counts = torch.zeros(*x.shape[:2], 256, dtype=torch.int64, device=x.device)
    counts.scatter_add_(2, level, torch.ones_like(level))
    darker = (counts.cumsum(2) - counts).gather(2, level).view(x.shape)
    most = darker.amax((2, 3), keepdim=True)
    return torch.where(most > 0, darker / most, x)


def _shear_rows(x: Images, slope: Strength) -> Images:
    return _distort(x, along=torch.ones_like(slope), across=slope, down=torch.zeros_like(slope))


def _shear_columns(x: Images, slope: Strength) -> Images:
    return _distort(x, along=torch.ones_like(slope), across=torch.zeros_like(slope), down=slope)


def _rotate(x: Images, degrees: Strength) -> Images:
    angle = degrees.deg2rad()
    return _distort(x, along=angle.cos(), across=-angle.sin(), down=angle.sin())


class _Change(NamedTuple):
    """``share`` of the images change so, with a strength from ``low`` to ``high``, of either sign if ``signed``."""

    apply: Callable[[Images, Strength], Images]
    share: float
    low: float = 0.0
    high: float = 0.0
    signed: bool = False


_CHANGES = (
    _Change(_saturate, 1 / 8, 0.1, 1.9),
    _Change(_brighten, 1 / 8, 0.5, 1.9),
    _Change(_contrast, 1 / 8, 0.5, 1.9),
    _Change(_sharpen, 1 / 8, 0.1, 1.9),
    _Change(_stretch, 1 / 8),
    _Change(_equalize, 1 / 8),
    _Change(_shear_rows, 1 / 16, 0.05, 0.15, signed=True),
    _Change(_shear_columns, 1 / 16, 0.05, 0.15, signed=True),
    _Change(_rotate, 1 / 8, 1.0, 10.0, signed=True),
)


def _blend(dull: Float[Tensor, "b #c #h #w"], x: Images, factor: Strength) -> Images:
    """``dull`` at 0, ``x`` at 1, beyond ``x`` above 1."""
    return (dull + factor * (x - dull)).clamp(0, 1)


def _grey(x: Images) -> Float[Tensor, "b 1 h w"]:
    """The luma of ITU-R BT.601 for three channels; the mean of any other number."""
    if x.shape[1] != 3:
        return x.mean(1, keepdim=True)
    return (x * torch.tensor([0.299, 0.587, 0.114], device=x.device).view(3, 1, 1)).sum(1, keepdim=True)


def _distort(x: Images, *, along: Strength, across: Strength, down: Strength) -> Images:
    """About the centre: a pixel at (column, row) shows the one at (along*column + across*row, down*column + along*row).

    Element by element, so that no matrix product of reduced precision moves a pixel on some machines only.
    """
    h, w = x.shape[2:]
    row = (torch.arange(h, device=x.device) + 0.5 - h / 2)[:, None]
    column = torch.arange(w, device=x.device) + 0.5 - w / 2
    from_row, from_column = down * column + along * row, along * column + across * row
    return _pick(x, (from_row[:, 0] + h / 2).floor().long(), (from_column[:, 0] + w / 2).floor().long())


def _moved(size: int, cut: Int64[Tensor, " b"], generator: torch.Generator | None) -> Int64[Tensor, "b size"]:
    """For each place on a side of which ``cut`` pixels get lost, the place that its pixel comes from; -1 for none."""
    begin, to = (_up_to(cut, generator)[:, None] for _ in range(2))
    place = torch.arange(size, device=cut.device) - to
    return torch.where((place >= 0) & (place < size - cut[:, None]), place + begin, -1)


def _pick(x: Images, row: Int64[Tensor, "b h #w"], column: Int64[Tensor, "b #h w"]) -> Images:
    """The pixels of ``x`` at those places; 0 for places outside."""
    b, c, h, w = x.shape
    image = torch.arange(b, device=x.device)[:, None, None, None]
    channel = torch.arange(c, device=x.device)[None, :, None, None]
    inside = (row >= 0) & (row < h) & (column >= 0) & (column < w)
    found = x[image, channel, row.clamp(0, h - 1)[:, None], column.clamp(0, w - 1)[:, None]]
    return torch.where(inside[:, None], found, 0)


def _window(size: int, part: Float[Tensor, " b"], generator: torch.Generator | None) -> Bool[Tensor, "b size"]:
    """True in a stretch of ``part`` of ``size`` places with its centre anywhere, cut off at the ends."""
    middle, half = _uniform(len(part), part, generator) * size, part * size / 2
    place = torch.arange(size, device=part.device)
    return (place >= (middle - half).round()[:, None]) & (place < (middle + half).round()[:, None])


def _up_to(most: Int64[Tensor, " b"], generator: torch.Generator | None) -> Int64[Tensor, " b"]:
    """A whole number from 0 to ``most`` for each."""
    return (_uniform(len(most), most, generator) * (most + 1)).long()


def _uniform(count: int, like: Tensor, generator: torch.Generator | None) -> Float[Tensor, " b"]:
    return torch.rand(count, device=like.device, generator=generator)
