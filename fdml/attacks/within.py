"""Minimal-norm attacks: what they share, and how one serves within a threat model.

A minimal-norm attack is a function ``(model, x, y, norm, *, enough=None, generator=None, …) -> x_adv``: for each image
the nearest misclassified one that it found, in [0, 1]; x itself where it found none or where x is misclassified. With
``enough`` it stops working on an image once the perturbation is at most this, up to rounding.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from fdml.attacks.objective import Model, answer
from fdml.losses import Labels, Logits, PerImage, margin
from fdml.randomness import Generator
from fdml.threat import Images, Threat

Rows = Int[Tensor, " b"]


def within(attack: Callable[..., Images]) -> Callable[..., Images]:
    """The minimal-norm attack as one inside a threat model: ``(model, x, y, threat, *, generator=None, …) -> x_adv``.

    What it finds within eps is enough, and what it finds farther away is projected on the threat model.
    """

    def inside(
        model: Model, x: Images, y: Labels, threat: Threat, *, generator: Generator = None, **options: Any
    ) -> Images:
        found = attack(model, x, y, threat.norm, enough=threat.eps, generator=generator, **options)
        contained = threat.contains(found, x)[:, None, None, None]
        return torch.where(contained, found, threat.project(found, x))

    inside.__dict__["minimal"] = attack  # a report lists its settings
    return inside


class Nearest:
    """The nearest misclassified image seen so far, per image: ``x_adv`` and its ``distance``.

    Raises ``InputError`` for an unknown norm, and for an ``enough`` that no threat model has for its eps.
    """

    def __init__(self, x: Images, y: Labels, norm: str, enough: float | None) -> None:
        self.threat = Threat(norm, 0.0 if enough is None else enough)
        self.x, self.y, self.x_adv = x.detach(), y, x.detach().clone()
        self.distance = torch.full((len(x),), torch.inf, dtype=x.dtype, device=x.device)
        self._done = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        # How far each image, and the nearest one found, is from being fooled, and from being right again.
        self._clean, self._found = torch.zeros_like(self.distance), torch.zeros_like(self.distance)

    def remaining(self) -> Rows:
        """The numbers of the images for which nothing near enough was found."""
        return (~self._done).nonzero().squeeze(1)

    def see(
        self, rows: Rows, x_adv: Images, distance: PerImage, logits: Logits
    ) -> tuple[Bool[Tensor, " b"], Bool[Tensor, " b"]]:
        """Keeps ``x_adv``, a candidate for each of the images ``rows``, where it is the nearest misclassified so far.

        Returns, for each, whether it is misclassified, and whether the search goes on.
        """
        gap, clean = _gap(logits, self.y[rows]), distance == 0
        # However little the model is wrong about x itself, there is nothing to attack.
        fooled = (gap > 0) | (clean & (margin(logits, self.y[rows]) > 0))
        self._clean[rows] = torch.where(clean, gap, self._clean[rows])
        nearer = fooled & (distance < self.distance[rows])
        kept = rows[nearer]
        self.x_adv[kept], self.distance[kept], self._found[kept] = x_adv[nearer], distance[nearer], gap[nearer]
        self._done[kept] = self.threat.contains(x_adv[nearer], self.x[kept])
        return fooled, ~self._done[rows]

    def closer(self, model: Model, looks: int = 6) -> Images:
        """What was found, each drawn towards x along the line between them as far as it stays misclassified.

        The boundary on this line is looked for by false position (the Illinois variant), with ``looks`` forward passes.
        """
        rows = (~self._done & self.distance.isfinite()).nonzero().squeeze(1)
        if not len(rows):
            return self.x_adv
        x, y, delta = self.x[rows], self.y[rows], self.x_adv[rows] - self.x[rows]
        below, above = self._clean[rows], self._found[rows]
        low, high = torch.zeros_like(below), torch.ones_like(above)
        last = torch.zeros_like(below)
        for _ in range(looks):
            at = low + (high - low) * (below / (below - above)).clamp_(0.01, 0.99)
            gap = _gap(answer(model, torch.addcmul(x, delta, at[:, None, None, None]).clamp_(0, 1)), y)
            fooled = gap > 0
            side = torch.where(fooled, 1.0, -1.0)
            # An end that stays twice counts half, so that the next look is nearer to it.
            half = torch.where(side == last, 0.5, 1.0)
            low, below = torch.where(fooled, low, at), torch.where(fooled, below * half, gap)
            high, above = torch.where(fooled, at, high), torch.where(fooled, gap, above * half)
            last = side
        self.x_adv[rows] = torch.addcmul(x, delta, high[:, None, None, None]).clamp_(0, 1)
        return self.x_adv


def narrow(stays: Bool[Tensor, " b"], *tensors: Tensor) -> Sequence[Tensor]:
    """Of each tensor, the rows that stay."""
    if bool(stays.all()):
        return tensors
    index = stays.nonzero().squeeze(1)
    return [tensor[index] for tensor in tensors]


def _gap(logits: Logits, y: Labels) -> PerImage:
    """The margin, less what rounding may change it by when the same image is looked at in other company."""
    return margin(logits, y) - 1e-5 * logits.abs().amax(1)
