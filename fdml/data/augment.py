"""Random changes of a batch that keep its labels true, on the device that the batch is on."""

import torch
from jaxtyping import Float
from torch import Tensor

from fdml.errors import unknown

Images = Float[Tensor, "b c h w"]
AUGMENTATIONS = ("flip", "crop", "erase")


def augment(x: Images, kinds: tuple[str, ...], generator: torch.Generator | None) -> Images:
    """``x`` after each of ``kinds`` in turn; every image draws for itself. A new tensor, still in [0, 1].

    ``generator`` lives on the device of ``x``; the same state gives the same result. ``flip``: left to right, with
    probability 1/2. ``crop``: a border of zeros (4 pixels, an eighth of the height for small images), then a window of
    the old size anywhere in it. ``erase``: with probability 1/4 a rectangle of uniform noise.

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


_KINDS = {"flip": flip, "crop": crop, "erase": erase}


def _uniform(count: int, like: Tensor, generator: torch.Generator | None) -> Float[Tensor, " b"]:
    return torch.rand(count, device=like.device, generator=generator)
