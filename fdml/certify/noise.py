"""Gaussian noise for smoothing, on the grid of the 256 pixel values.

Noise in floating point leaves traces of the image under it in the low bits of their sum, by which a network could tell
images apart that the theorem takes for one (Voracek and Hein 2023). Here a network only ever sees whole multiples of
1/255: the image's own pixels plus Gaussian noise rounded to the grid. Rounding commutes with adding a whole number, so
this is the smoothing of a network that rounds its input first, and Cohen's radius holds as it stands.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fdml import grid
from fdml.grid import LEVELS
from fdml.randomness import mixed


@dataclass(frozen=True)
class Samples:
    """Noisy copies of one image: ``pixels`` (n, c, h, w) float32, and which of them count: ``sure`` (n,).

    A copy is not sure where one of its noise values lay too near a threshold to be rounded rightly for certain (about
    once in 10^9 pixels): it counts as a miss.
    """

    pixels: Tensor
    sure: Tensor


class GridNoise:
    """Draws noisy copies of images: N(0, sigma²) rounded to the grid, in a stream of its own for every image.

    The n-th copy of an image is a function of ``seed``, the image's number and n, so that no batch, order or number of
    devices changes a result. Sums outside [−K, K + 1], K = max(1, floor(6 sigma)), are clipped, which a network that
    does the same to its input would not notice. ``sigma`` is above 0 and at most 4.
    """

    def __init__(self, sigma: float, seed: int = 0, device: torch.device | str = "cpu") -> None:
        assert 0 < sigma <= 4, sigma
        self.sigma, self.seed, self.device = sigma, seed, torch.device(device)
        self._low, self._high, self._reach = grid.reach(sigma)
        thresholds = grid.thresholds(sigma, self._reach)
        self._thresholds = torch.from_numpy(thresholds).to(self.device)
        self._table = torch.from_numpy(grid.look_up(thresholds, self._reach)).to(self.device)

    def draw(self, image: Tensor, number: int, first: int, count: int, part: str = "") -> Samples:
        """Copies ``first`` to ``first + count`` − 1 of the image (c, h, w), uint8, that is known by ``number``.

        ``part`` names one of several independent streams of the image.
        """
        size = image.numel()
        words = -(-size // 4)  # a word of 64 bits makes four values
        key = grid.key_of(self.seed, number, part)
        places = torch.arange(first * words, (first + count) * words, device=self.device)
        index = mixed(key, places).view(torch.int16).view(count, 4 * words)[:, :size].int() + (1 << 15)
        noise = self._table.index_select(0, index.flatten())
        sure = torch.ones(count, dtype=torch.bool, device=self.device)
        rare = (noise == grid.AMBIGUOUS).nonzero().squeeze(1)
        if len(rare):
            exact, certain = self._resolve(key, index.flatten()[rare].long(), rare + first * size)
            noise[rare] = exact
            if not certain.all():
                sure[rare[~certain] // size] = False
        total = noise.view(count, size) + image.to(self.device, torch.int16).flatten()
        pixels = total.clamp_(self._low, self._high).float().div_(LEVELS)
        return Samples(pixels.view(count, *image.shape), sure)

    def _resolve(self, key: int, index: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """The values of draws whose first 16 bits do not decide them, from 44 more; and whether these do."""
        more = grid.BITS - grid.LOOK_UP
        low = mixed(key ^ grid.SECOND, places) & ((1 << more) - 1)
        drawn = (index << more) | low
        above = torch.searchsorted(self._thresholds, drawn, right=True)
        last = len(self._thresholds) - 1
        certain = (drawn - self._thresholds[(above - 1).clamp(min=0)]).abs() > grid.UNSURE
        certain &= (self._thresholds[above.clamp(max=last)] - drawn).abs() > grid.UNSURE
        return (above - self._reach).to(torch.int16), certain
