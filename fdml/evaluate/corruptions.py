"""Common corruptions at five severities, after Hendrycks and Dietterich (2019, section 4.1).

The kinds are theirs; the amounts are ours and scale with the image, so that a severity means about the same at 8 and at
224 pixels. They stand beside ImageNet-C and CIFAR-10-C, and are not comparable with published figures.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fdml.errors import InputError, unknown
from fdml.randomness import Generator, integers, normal, uniform
from fdml.threat import Images

Corruption = Callable[[Images, int, Generator], Images]
SEVERITIES = (1, 2, 3, 4, 5)


def corrupt(name: str, x: Images, severity: int, generator: Generator = None) -> Images:
    """The images under the corruption of that name, in [0, 1]; what is random is drawn for each image by itself.

    Raises ``InputError`` for an unknown name and a severity that is not 1, 2, 3, 4 or 5.
    """
    if name not in CORRUPTIONS:
        raise unknown("corruption", name, CORRUPTIONS)
    if severity not in SEVERITIES:
        raise InputError(f"severity must be a whole number from 1 to 5, got {severity}")
    with torch.no_grad():
        return CORRUPTIONS[name](x, severity, generator).clamp(0, 1)


def _gaussian_noise(x: Images, severity: int, generator: Generator) -> Images:
    sigma = (0.04, 0.08, 0.12, 0.18, 0.26)[severity - 1]
    return x + sigma * normal(x, generator, *x.shape[1:])


def _shot_noise(x: Images, severity: int, generator: Generator) -> Images:
    """The noise of counted photons, whose variance is the brightness over the photons of white; normal, not Poisson."""
    photons = (60, 25, 12, 5, 3)[severity - 1]
    return x + (x / photons).sqrt() * normal(x, generator, *x.shape[1:])


def _impulse_noise(x: Images, severity: int, generator: Generator) -> Images:
    """Salt and pepper: a share of the values, half of it black and half white."""
    share = (0.03, 0.06, 0.1, 0.17, 0.27)[severity - 1]
    draw = uniform(x, generator, *x.shape[1:])
    return x.masked_fill(draw < share / 2, 0).masked_fill(draw >= 1 - share / 2, 1)


def _gaussian_blur(x: Images, severity: int, generator: Generator) -> Images:
    sigma = (0.02, 0.035, 0.05, 0.065, 0.08)[severity - 1] * min(x.shape[2:])
    reach = math.ceil(3 * sigma)
    # Integrated over each pixel: sampled at its centre alone, a Gaussian narrower than a pixel would be none.
    edges = torch.arange(-reach, reach + 2, dtype=x.dtype, device=x.device) - 0.5
    line = torch.erf(edges / (sigma * math.sqrt(2))).diff()
    line = line / line.sum()
    flat = F.pad(x.flatten(0, 1)[:, None], (reach, reach, reach, reach), mode="replicate")
    return F.conv2d(F.conv2d(flat, line.view(1, 1, 1, -1)), line.view(1, 1, -1, 1)).view_as(x)


def _fog(x: Images, severity: int, generator: Generator) -> Images:
    """A bright haze of three octaves of smooth noise, mixed in."""
    amount = (0.3, 0.5, 0.8, 1.2, 1.8)[severity - 1]
    haze = torch.zeros_like(x[:, :1])
    for octave, cells in enumerate((2, 4, 8)):
        coarse = uniform(x, generator, 1, cells, cells)
        haze += F.interpolate(coarse, x.shape[2:], mode="bilinear") * 2.0**-octave
    return (x + amount * haze / 1.75) / (1 + amount)


def _brightness(x: Images, severity: int, generator: Generator) -> Images:
    return x + (0.1, 0.2, 0.3, 0.4, 0.5)[severity - 1]


def _contrast(x: Images, severity: int, generator: Generator) -> Images:
    """Every value drawn towards the mean of its channel."""
    kept = (0.75, 0.5, 0.4, 0.3, 0.15)[severity - 1]
    return x.mean((2, 3), keepdim=True).lerp(x, kept)


def _pixelate(x: Images, severity: int, generator: Generator) -> Images:
    """Fewer, larger cells, each with the mean of what it covers; a pixel across two of them has a part of both."""
    share = (0.8, 0.65, 0.5, 0.35, 0.25)[severity - 1]
    down, across = (_cells(x, side, max(round(share * side), 1)) for side in x.shape[2:])
    return down @ x @ across


def _cells(x: Images, side: int, count: int) -> Float[Tensor, "side side"]:
    """What of each pixel goes to each other one when ``side`` of them are averaged in ``count`` cells; symmetric."""
    pixels = torch.arange(side, dtype=x.dtype, device=x.device) / side
    cells = torch.arange(count, dtype=x.dtype, device=x.device)[:, None] / count
    ends = torch.minimum(pixels + 1 / side, cells + 1 / count)
    covered = (ends - torch.maximum(pixels, cells)).clamp(min=0)
    return covered.T @ covered * side * count


def _occlusion(x: Images, severity: int, generator: Generator) -> Images:
    """A grey rectangle with the image's proportions, at a random place."""
    share = (0.125, 0.25, 0.375, 0.5, 0.625)[severity - 1]
    across, down = (_span(x, share, side, generator) for side in (x.shape[3], x.shape[2]))
    return x.masked_fill(down[:, None, :, None] & across[:, None, None, :], 0.5)


def _span(x: Images, share: float, side: int, generator: Generator) -> Tensor:
    """Which of the ``side`` places the rectangle covers, per image: (b, side)."""
    length = max(round(share * side), 1)
    start = integers(x, generator, side - length + 1, 1)
    places = torch.arange(side, device=x.device)
    return (places >= start) & (places < start + length)


CORRUPTIONS: dict[str, Corruption] = {
    "gaussian-noise": _gaussian_noise,
    "shot-noise": _shot_noise,
    "impulse-noise": _impulse_noise,
    "gaussian-blur": _gaussian_blur,
    "fog": _fog,
    "brightness": _brightness,
    "contrast": _contrast,
    "pixelate": _pixelate,
    "occlusion": _occlusion,
}
"""By name: images, severity and generator, to images that may leave [0, 1]. ``corrupt`` checks and clips."""
