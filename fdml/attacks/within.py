"""Minimal-norm attacks: what they share, and how one serves within a threat model.

A minimal-norm attack is a function ``(model, x, y, norm, *, enough=None, generator=None, …) -> x_adv``: for each image
the nearest misclassified one that it found, in [0, 1]; x itself where it found none or where x is misclassified. With
``enough`` it stops working on an image once the perturbation is at most this.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fdml.attacks.objective import Model, answer
from fdml.errors import InputError
from fdml.losses import Labels, Logits, PerImage, margin
from fdml.randomness import Generator
from fdml.threat import Images, Threat


def within(attack: Callable[..., Images]) -> Callable[..., Images]:
    """The minimal-norm attack as one inside a threat model: ``(model, x, y, threat, *, generator=None, …) -> x_adv``.

    It has found enough at eps. What it found farther away is projected on the threat model.
    """

    def attack_within(
        model: Model, x: Images, y: Labels, threat: Threat, *, generator: Generator = None, **options: Any
    ) -> Images:
        found = attack(model, x, y, threat.norm, enough=threat.eps, generator=generator, **options)
        inside = threat.contains(found, x)[:, None, None, None]
        return torch.where(inside, found, threat.project(found, x))

    return attack_within


class Nearest:
    """The nearest misclassified image seen so far, per image; of those inside ``enough``, the first.

    Raises ``InputError`` for an unknown norm, and for an ``enough`` that is no eps of a threat model.
    """

    def __init__(self, x: Images, y: Labels, norm: str, enough: float | None) -> None:
        self.x, self.y, self.threat = x, y, Threat(norm, 0.0 if enough is None else enough)
        self.x_adv = x.clone()
        self.distance = torch.full((len(x),), torch.inf, dtype=x.dtype, device=x.device)
        self._gap = torch.zeros_like(self.distance)
        self._gap_clean = torch.zeros_like(self.distance)
        self._done = torch.zeros(len(x), dtype=torch.bool, device=x.device)

    def remaining(self) -> Tensor:
        """The images, by number, for which nothing inside ``enough`` was found."""
        return (~self._done).nonzero().squeeze(1)

    def see(self, rows: Tensor, x_adv: Images, distance: PerImage, logits: Logits) -> tuple[Tensor, Tensor]:
        """Keeps ``x_adv``, a candidate for each of the images ``rows``, where it is misclassified and the nearest so far.

        Returns, for each, whether it is misclassified and whether the search goes on.
        """
        gap, clean = _gap(logits, self.y[rows]), distance == 0
        # An image that is misclassified by however little needs no attack.
        fooled = (gap > 0) | (clean & (margin(logits, self.y[rows]) > 0))
        self._gap_clean[rows] = torch.where(clean, gap, self._gap_clean[rows])
        nearer = fooled & (distance < self.distance[rows])
        kept = rows[nearer]
        self.x_adv[kept], self.distance[kept], self._gap[kept] = x_adv[nearer], distance[nearer], gap[nearer]
        self._done[kept] = self.threat.contains(x_adv[nearer], self.x[kept])
        return fooled, ~self._done[rows]

    def closer(self, model: Model, looks: int = 5) -> Images:
        """What was found, each drawn towards x along the line between them as far as it stays misclassified.

        The boundary is looked for by false position (the Illinois variant), with ``looks`` forward passes.
        """
        rows = self.remaining()
        rows = rows[self.distance[rows] < torch.inf]
        x, y, delta = self.x[rows], self.y[rows], self.x_adv[rows] - self.x[rows]
        low, high = torch.zeros_like(self._gap[rows]), torch.ones_like(self._gap[rows])
        below, above = self._gap_clean[rows], self._gap[rows]
        last = torch.zeros_like(low, dtype=torch.int)
        for _ in range(looks if len(rows) else 0):
            at = low + (high - low) * (below / (below - above)).nan_to_num(0.5).clamp(0.01, 0.99)
            gap = _gap(answer(model, (x + at[:, None, None, None] * delta).clamp_(0, 1)), y)
            fooled = gap > 0
            low, high = torch.where(fooled, low, at), torch.where(fooled, at, high)
            side = torch.where(fooled, 1, -1).int()
            again = side == last
            # An end that stays twice is weighed by half, so that the other one comes to it.
            below = torch.where(fooled, torch.where(again, below / 2, below), gap)
            above = torch.where(fooled, gap, torch.where(again, above / 2, above))
            last = side
        self.x_adv[rows] = (x + high[:, None, None, None] * delta).clamp_(0, 1)
        return self.x_adv


def _gap(logits: Logits, y: Labels) -> PerImage:
    """The margin, less what rounding may change it by when the same image is looked at in other company."""
    return margin(logits, y) - 1e-5 * logits.abs().amax(1)
