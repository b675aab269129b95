"""Randomised smoothing of an exported network, without torch: sample for sample what ``fdml.certify`` does."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fdml.card import Card
from fdml.errors import InputError
from fdml.grid import LEVELS, ArrayNoise
from fdml.sequence import LOOK, decide

SELECTION = 100
"""Samples that choose the class, before others count it."""


@dataclass(frozen=True)
class Certified:
    """The smoothed classifier's answer about one image.

    But for a chance of at most ``alpha``, it answers ``label`` (``index`` among the classes) everywhere closer to the
    image than ``radius`` (L2, pixel units). Where that was not shown for any radius it abstains: ``label`` and
    ``index`` are None and ``radius`` is 0. ``hits`` of ``n`` samples under noise of ``sigma`` answered the class in
    question.
    """

    label: str | None
    index: int | None
    radius: float
    hits: int
    n: int
    alpha: float
    sigma: float

    @property
    def abstained(self) -> bool:
        """Whether no radius was shown."""
        return self.index is None


@dataclass(frozen=True)
class Smoothing:
    """How to smooth: at most ``n`` samples an image, the chance ``alpha`` of an error, the ``radii`` asked about.

    Raises ``InputError`` for a value out of its range.
    """

    sigma: float
    n: int
    alpha: float
    radii: tuple[float, ...]
    seed: int

    def __post_init__(self) -> None:
        if not 0 < self.sigma <= 4:
            raise InputError(f"sigma={self.sigma:g} is out of range: above 0 and at most 4, as pixels are in [0, 1]")
        if not 0 < self.alpha < 0.5:
            raise InputError(f"alpha={self.alpha:g} is out of range: the chance of an error is above 0 and below 0.5")
        if not SELECTION <= self.n <= 10_000_000:
            raise InputError(f"n={self.n} is out of range: {SELECTION} to 10,000,000 samples an image")
        for radius in self.radii:
            if not 0 <= radius < math.inf:
                raise InputError(f"radius={radius:g} is out of range: it must be at least 0, in pixel units")


class ArraySmoother:
    """A smoothed classifier: ``classify`` gives logits (n, classes) of noisy images (n, c, h, w), which lie on the grid
    of pixel values but not in [0, 1]. ``batch`` copies are looked at at once; it changes no result. Where ``classify``
    gives None sampling ends, and what was shown until then is the result: the bounds hold at every number of samples.
    """

    def __init__(
        self, classify: Callable[[np.ndarray], np.ndarray | None], classes: Sequence[str], how: Smoothing, batch: int
    ) -> None:
        self._classify, self._classes, self._how = classify, classes, how
        self._batch = max(LOOK, batch // LOOK * LOOK)
        self._noise = ArrayNoise(how.sigma, how.seed)

    def certify(self, image: np.ndarray, number: int) -> Certified:
        """The certificate of an image (c, h, w), float32, whose ``number`` chooses its noise.

        An image off the grid of pixel values is moved to it; what is proved about the point that it moves to holds for
        the image at a radius smaller by the distance.
        """
        exact = image.astype(np.float64)
        on_grid = np.clip(np.rint(exact * LEVELS), 0, LEVELS)
        # A pixel that came from a byte is off by its float rounding alone, which moves no grid point.
        same = np.array_equal((on_grid / LEVELS).astype(np.float32), image)
        shift = 0.0 if same else float(np.linalg.norm(exact - on_grid / LEVELS)) * (1 + 1e-9)
        grid = on_grid.astype(np.uint8)

        how = self._how
        answers = np.concatenate([np.empty(0, int), *self._answers(grid, number, SELECTION, "select")])
        if len(answers) < SELECTION:  # it was ended before a class was chosen
            return Certified(None, None, 0.0, 0, 0, how.alpha, how.sigma)
        candidate = int(np.bincount(answers + 1, minlength=len(self._classes) + 1)[1:].argmax())
        radii = [radius + shift for radius in how.radii]
        looks = self._looks(grid, number, candidate)
        radius, hits, count = decide(looks, radii, sigma=how.sigma, alpha=how.alpha, samples=how.n)
        radius = max(radius - shift, 0.0) if radius > 0 else 0.0
        index = candidate if radius > 0 else None
        label = None if index is None else self._classes[index]
        return Certified(label, index, radius, hits, count, how.alpha, how.sigma)

    def _looks(self, grid: np.ndarray, number: int, candidate: int) -> Iterator[tuple[int, int]]:
        for answers in self._answers(grid, number, self._how.n, "count"):
            for first in range(0, len(answers), LOOK):
                part = answers[first : first + LOOK]
                yield int((part == candidate).sum()), len(part)

    def _answers(self, grid: np.ndarray, number: int, samples: int, part: str) -> Iterator[np.ndarray]:
        """The class of each copy; −1 where the copy or the answer is not sure, which never counts as a hit."""
        for first in range(0, samples, self._batch):
            count = min(self._batch, samples - first)
            pixels, sure = self._noise.draw(grid, number, first, count, part)
            logits = self._classify(pixels)
            if logits is None:
                return
            sure &= np.isfinite(logits).all(1)
            yield np.where(sure, logits.argmax(1), -1)


def sigma_of(card: Card, sigma: float | None, *, force: bool) -> float:
    """The noise to certify at: ``sigma``, or that of the model's training.

    Raises ``InputError`` where the card names none and none is given, and, without ``force``, where they differ: a
    model that never saw such noise hardly answers under it.
    """
    trained = card.recipe.get("sigma") or 0.0
    was = f"sigma={trained:g}" if trained else "no noise"
    if sigma is None and not trained:
        raise InputError("the model was trained with no noise: certify one of fdml train fdml-smooth, or give sigma")
    if sigma is not None and sigma != trained and not force:
        raise InputError(
            f"sigma={sigma:g}, but the model was trained with {was} and would mostly abstain: train with"
            " fdml train fdml-smooth --set sigma=…, or give force=True"
        )
    return float(trained if sigma is None else sigma)
