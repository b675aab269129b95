"""Randomised smoothing: the class that a network answers most often under Gaussian noise cannot be changed by any
perturbation of an L2 norm below a radius that is found by sampling (Cohen et al. 2019)."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from scipy import stats
from torch import Tensor

from fdml.certify.confidence import clopper_pearson
from fdml.certify.noise import GridNoise
from fdml.sequence import LOOK, decide, radius_of

ABSTAIN = -1
"""The answer where no class is shown to be the most frequent one."""

SAMPLES = 100_000
SELECTION = 100
ALPHA = 0.001


def ignore(count: int) -> None:
    """Takes no notice of the samples that were looked at."""


@dataclass(frozen=True)
class Smoothed:
    """The answer about one image.

    But for a chance of at most ``alpha``, the smoothed classifier answers ``answer`` everywhere closer than ``radius``
    (L2, pixel units). ``answer`` is ``ABSTAIN`` and ``radius`` 0 where that was not shown for any radius. ``hits`` of
    ``count`` samples answered the class ``candidate``, which ``selected`` other samples had chosen.
    """

    answer: int
    radius: float
    hits: int
    count: int
    candidate: int
    selected: int


@dataclass
class Smoother:
    """A smoothed classifier: ``classify`` gives logits (n, classes) of noisy images (n, c, h, w), which lie on the grid
    of pixel values but not in [0, 1].

    ``batch`` copies are looked at at once; it changes no result. Images are uint8 (c, h, w), known by their numbers,
    which choose their noise.
    """

    classify: Callable[[Tensor], Tensor]
    classes: int
    noise: GridNoise
    alpha: float = ALPHA
    batch: int = LOOK
    watch: Callable[[int], None] = ignore

    def __post_init__(self) -> None:
        assert 0 < self.alpha < 0.5, self.alpha

    def cohen(self, image: Tensor, number: int, *, selection: int = SELECTION, samples: int = SAMPLES) -> Smoothed:
        """CERTIFY of Cohen et al. 2019, as published: ``selection`` samples choose the class, ``samples`` fresh ones
        count it, and Clopper and Pearson bound its probability."""
        candidate = self.candidate(image, number, selection)
        hits = int(self.counts(image, number, samples)[candidate])
        radius = radius_of(float(clopper_pearson(hits, samples, self.alpha)), self.noise.sigma)
        return Smoothed(candidate if radius > 0 else ABSTAIN, radius, hits, samples, candidate, selection)

    def sequential(
        self,
        image: Tensor,
        number: int,
        radii: Sequence[float],
        *,
        selection: int = SELECTION,
        samples: int = SAMPLES,
    ) -> Smoothed:
        """The same guarantee from as many samples as the image needs, at most ``samples``.

        ``fdml.sequence.decide`` tells after every ``LOOK`` samples which of the ``radii`` are certified, and which have
        become hopeless.
        """
        candidate = self.candidate(image, number, selection)
        looks, sigma = self.looks(image, number, candidate, samples), self.noise.sigma
        radius, hits, count = decide(looks, radii, sigma=sigma, alpha=self.alpha, samples=samples)
        return Smoothed(candidate if radius > 0 else ABSTAIN, radius, hits, count, candidate, selection)

    def looks(self, image: Tensor, number: int, candidate: int, samples: int) -> Iterator[tuple[int, int]]:
        """How many of each ``LOOK`` copies were answered ``candidate``, ``samples`` copies together: (hits, copies).
        When to stop must not depend on ``batch``."""
        step = max(LOOK, self.batch // LOOK * LOOK)
        for first in range(0, samples, step):
            for part in self._answers(image, number, first, min(step, samples - first), "count").split(LOOK):
                yield int((part == candidate).sum()), len(part)

    def predict(self, image: Tensor, number: int, samples: int = 1000) -> int:
        """PREDICT of Cohen et al. 2019: the class answered most often, wrong about the smoothed classifier with a
        chance of at most ``alpha``; ``ABSTAIN`` where the two first are too close to tell."""
        counts = self.counts(image, number, samples, "predict")
        first, second = counts.topk(2).values.tolist()
        if first + second == 0 or stats.binomtest(first, first + second, 0.5).pvalue > self.alpha:
            return ABSTAIN
        return int(counts.argmax())

    def candidate(self, image: Tensor, number: int, selection: int) -> int:
        """The class that most of ``selection`` copies are answered; others than those that count it."""
        return int(self.counts(image, number, selection, "select").argmax())

    def counts(self, image: Tensor, number: int, samples: int, part: str = "count") -> Tensor:
        """How many of ``samples`` copies each class was answered to (classes,); ``part`` names the stream of noise."""
        counts = torch.zeros(self.classes + 1, dtype=torch.int64, device=self.noise.device)
        for first in range(0, samples, self.batch):
            answers = self._answers(image, number, first, min(self.batch, samples - first), part)
            counts += torch.bincount(answers + 1, minlength=self.classes + 1)
        return counts[1:]

    @torch.inference_mode()
    def _answers(self, image: Tensor, number: int, first: int, count: int, part: str) -> Tensor:
        """The class of each copy (n,); −1 where the copy or the answer is not sure, which never counts as a hit."""
        copies = self.noise.draw(image, number, first, count, part)
        logits = self.classify(copies.pixels)
        sure = copies.sure & torch.isfinite(logits).all(1)
        self.watch(count)
        return logits.argmax(1).where(sure, -1)
