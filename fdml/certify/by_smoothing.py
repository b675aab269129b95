"""Certificates by randomised smoothing."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fdml.attacks import Model
from fdml.card import Card
from fdml.certify.assault import fooled_at
from fdml.certify.certificate import Certificate
from fdml.certify.noise import LEVELS, GridNoise
from fdml.certify.smoothing import ABSTAIN, ALPHA, SAMPLES, SELECTION, Smoother, ignore
from fdml.errors import InputError
from fdml.sequence import LOOK


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to smooth: the noise ``sigma`` in pixel units, the ``radii`` that are asked about (None: one, two and three
    sigma), the chance ``alpha`` of an error an image, ``n0`` samples that choose the class, at most ``n`` that count.

    ``sequential`` False is the published CERTIFY with exactly ``n`` samples. Raises ``InputError`` for a value out of
    its range.
    """

    sigma: float
    radii: tuple[float, ...] | None = None
    alpha: float = ALPHA
    n0: int = SELECTION
    n: int = SAMPLES
    sequential: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.sigma <= 4:
            raise InputError(f"sigma={self.sigma:g} is out of range: above 0 and at most 4, as pixels are in [0, 1]")
        if not 0 < self.alpha < 0.5:
            raise InputError(f"alpha={self.alpha:g} is out of range: the chance of an error is above 0 and below 0.5")
        if self.n0 < 1:
            raise InputError(f"n0={self.n0} is out of range: at least one sample chooses the class")
        if self.n < self.n0:
            raise InputError(f"n={self.n} is below n0={self.n0}: the samples that count are usually far more")
        if self.n > 10_000_000:
            raise InputError(f"n={self.n} is out of range: at most 10,000,000 samples an image")
        for radius in self.radii or ():
            if not 0 <= radius < math.inf:
                raise InputError(f"radius={radius:g} is out of range: it must be at least 0, in pixel units")

    @property
    def asked(self) -> tuple[float, ...]:
        """The radii that are asked about."""
        return self.radii if self.radii is not None else tuple(round(k * self.sigma, 12) for k in (1, 2, 3))


class SmoothingProver:
    """Certificates by randomised smoothing, for any classifier.

    ``classify`` gives logits of noisy images. ``attacked`` is the same network with gradients: where it is given,
    images with labels are attacked at each radius that was asked about and not certified. ``watch`` is told of the
    samples that were looked at, as they are.
    """

    together = 1

    def __init__(
        self,
        classify: Model,
        classes: int,
        sampling: Sampling,
        *,
        attacked: Model | None = None,
        device: torch.device | str = "cpu",
        batch: int | None = None,
        watch: Callable[[int], None] = ignore,
    ) -> None:
        self.sampling, self.classes, self._attacked = sampling, classes, attacked
        noise = GridNoise(sampling.sigma, sampling.seed, device)
        batch = batch or (2 * LOOK if noise.device.type == "cpu" else 32 * LOOK)
        self._smoother = Smoother(classify, classes, noise, alpha=sampling.alpha, batch=batch, watch=watch)

    def prove(self, numbers: Tensor, images: Tensor, labels: Tensor | None) -> Iterator[Certificate]:
        """One certificate an image.

        An image off the grid of pixel values is moved to it; what is proved about the point that it moves to holds for
        the image at a radius smaller by the distance.
        """
        ask = self.sampling
        for row, (number, image) in enumerate(zip(numbers.tolist(), images, strict=True)):
            began = time.monotonic()
            on_grid = (image.double() * LEVELS).round().clamp(0, LEVELS)
            shift = float((image.double() - on_grid / LEVELS).norm()) if image.is_floating_point() else 0.0
            # A pixel that came from a byte is off by its float rounding alone, which moves no grid point.
            shift = 0.0 if torch.equal((on_grid / LEVELS).to(image.dtype), image) else shift * (1 + 1e-9)
            grid = on_grid.to(torch.uint8)
            if ask.sequential:
                radii = [radius + shift for radius in ask.asked]
                found = self._smoother.sequential(grid, number, radii, selection=ask.n0, samples=ask.n)
            else:
                found = self._smoother.cohen(grid, number, selection=ask.n0, samples=ask.n)
            radius = found.radius - shift
            certified = found.answer != ABSTAIN and radius > 0
            certificate = Certificate(
                index=number,
                label=None if labels is None else int(labels[row]),
                answer=found.answer if certified else ABSTAIN,
                status="certified" if certified else "abstain",
                radius=radius if certified else 0.0,
                norm="l2",
                method="smoothing" if ask.sequential else "cohen",
                seconds=time.monotonic() - began,
                seed=ask.seed,
                sigma=ask.sigma,
                alpha=ask.alpha,
                n0=ask.n0,
                n=found.count,
                hits=found.hits,
                shift=shift,
            )
            open_ = [r for r in ask.asked if r > certificate.radius]
            if self._attacked is not None and certificate.correct and open_:
                fell = fooled_at(self._smoother, self._attacked, grid, certificate.answer, number, open_)
                certificate = replace(certificate, fooled_at=fell)
            yield certificate


def check_sigma(card: Card | None, sigma: float | None, *, force: bool) -> float:
    """The noise to certify at: ``sigma``, or that of the model's training.

    Raises ``InputError`` where neither is known, and, without ``force``, where they differ: a model that never saw such
    noise hardly answers under it.
    """
    trained = None if card is None else card.recipe.get("sigma", 0.0)
    if sigma is None:
        if not trained:
            raise InputError("the model says of no noise that it was trained with: give --sigma, in pixel units")
        return float(trained)
    if trained is not None and trained != sigma and not force:
        was = f"sigma={trained:g}" if trained else "no noise"
        raise InputError(
            f"sigma={sigma:g}, but the model was trained with {was} and would mostly abstain: train with"
            " fdml train fdml-smooth --set sigma=…, or add --force"
        )
    return sigma
