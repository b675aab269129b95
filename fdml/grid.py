"""Gaussian noise on the grid of the 256 pixel values: its tables, and its drawing with numpy alone.

The noise is a function of a seed, an image's number and a place, by a counter and a hash, so that
``fdml.certify.noise.GridNoise`` draws the same on any device. That module says why noise lies on a grid.
"""

import hashlib
import math

import numpy as np

from fdml.beta import normal_tail

LEVELS = 255
"""Steps of the grid from black to white."""

BITS = 60
LOOK_UP = 16
UNSURE = 1 << 10
"""Units of 2^-60 by which a computed threshold may be off: the normal distribution in float64 errs by less."""
AMBIGUOUS = -(1 << 15)
SECOND = 0x5851F42D4C957F2D

# SplitMix64 (Steele, Lea and Flood 2014), as fdml.randomness has it for torch.
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))


def reach(sigma: float) -> tuple[int, int, int]:
    """(lowest, highest, reach): sums are clipped to the first two, and noise at or beyond the third is clipped
    whatever it is."""
    beyond = max(1, math.floor(6 * sigma))
    return -beyond * LEVELS, (beyond + 1) * LEVELS, (beyond + 1) * LEVELS


def key_of(seed: int, number: int, part: str) -> int:
    """The key of one stream of noise, a signed number of 64 bits."""
    digest = hashlib.blake2b(repr((seed, number, part)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def thresholds(sigma: float, reach: int) -> np.ndarray:
    """2^60 · Phi((2i + 1) / (2 · 255 · sigma)) for i from −reach to reach − 1, int64: a uniform number of 60 bits at or
    above exactly ``reach`` + n of them is the noise n."""
    tails = [normal_tail((2 * i + 1) / (2 * LEVELS * sigma)) for i in range(reach)]
    tail = np.rint(np.array(tails) * 2.0**BITS).astype(np.int64)
    return np.concatenate([tail[::-1], (1 << BITS) - tail])


def look_up(thresholds: np.ndarray, reach: int) -> np.ndarray:
    """The noise for each value of the first 16 bits, int16; ``AMBIGUOUS`` where a threshold is near."""
    edges = np.arange((1 << LOOK_UP) + 1, dtype=np.int64) << (BITS - LOOK_UP)
    low = np.searchsorted(thresholds, edges[:-1] - UNSURE, side="right")
    high = np.searchsorted(thresholds, edges[1:] + UNSURE, side="right")
    return np.where(low == high, low - reach, AMBIGUOUS).astype(np.int16)


class ArrayNoise:
    """``GridNoise`` for numpy: the same pixels for the same seed and number, bit for bit."""

    def __init__(self, sigma: float, seed: int) -> None:
        assert 0 < sigma <= 4, sigma
        self.sigma, self.seed = sigma, seed
        self._low, self._high, self._reach = reach(sigma)
        self._thresholds = thresholds(sigma, self._reach)
        self._table = look_up(self._thresholds, self._reach)

    def draw(
        self, image: np.ndarray, number: int, first: int, count: int, part: str = ""
    ) -> tuple[np.ndarray, np.ndarray]:
        """Copies ``first`` to ``first + count`` − 1 of the image (c, h, w), uint8, known by ``number``.

        Gives the pixels (count, c, h, w), float32, and which copies count (count,): one with a noise value too near a
        threshold to be rounded rightly for certain is a miss. ``part`` names one of several independent streams.
        """
        size = image.size
        words = -(-size // 4)  # a word of 64 bits makes four values
        key = key_of(self.seed, number, part)
        drawn = _mixed(key, np.arange(first * words, (first + count) * words, dtype=np.uint64))
        index = drawn.view(np.int16).reshape(count, 4 * words)[:, :size].astype(np.int32).ravel() + (1 << 15)
        noise = self._table[index]
        sure = np.ones(count, dtype=bool)
        rare = np.flatnonzero(noise == AMBIGUOUS)
        if rare.size:
            exact, certain = self._resolve(key, index[rare].astype(np.int64), rare + first * size)
            noise[rare] = exact
            sure[rare[~certain] // size] = False
        total = noise.reshape(count, size) + image.astype(np.int16).ravel()
        pixels = np.clip(total, self._low, self._high).astype(np.float32)
        pixels /= np.float32(LEVELS)
        return pixels.reshape(count, *image.shape), sure

    def _resolve(self, key: int, index: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The values of draws whose first 16 bits do not decide them, from 44 more; and whether these do."""
        more = BITS - LOOK_UP
        low = (_mixed(key ^ SECOND, places.astype(np.uint64)) & np.uint64((1 << more) - 1)).astype(np.int64)
        drawn = (index << more) | low
        above = np.searchsorted(self._thresholds, drawn, side="right")
        last = len(self._thresholds) - 1
        certain = np.abs(drawn - self._thresholds[np.maximum(above - 1, 0)]) > UNSURE
        certain &= np.abs(self._thresholds[np.minimum(above, last)] - drawn) > UNSURE
        return (above - self._reach).astype(np.int16), certain


def _mixed(key: int, places: np.ndarray) -> np.ndarray:
    """64 random bits for each place, uint64, of the stream ``key``: SplitMix64, whose products wrap."""
    z = places * _GOLDEN + np.uint64(key & (1 << 64) - 1)
    z = (z ^ (z >> _SHIFTS[0])) * _MIX[0]
    z = (z ^ (z >> _SHIFTS[1])) * _MIX[1]
    return z ^ (z >> _SHIFTS[2])
