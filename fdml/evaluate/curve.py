"""Accuracy over the size of the perturbation, in one ascent from small to large."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Bool
from torch import Tensor

from fdml.attacks import Model, pgd
from fdml.errors import InputError
from fdml.evaluate.accuracy import predictions
from fdml.losses import Labels
from fdml.randomness import Generator, take
from fdml.threat import Images, Threat

POINTS = 13


def around(eps: float, norm: str) -> tuple[float, ...]:
    """``POINTS`` values from 0 to twice eps, at most the whole pixel range for linf."""
    top = min(2 * eps, 1.0) if norm == "linf" else 2 * eps
    return tuple(top * place / (POINTS - 1) for place in range(POINTS))


def curve(
    model: Model,
    x: Images,
    y: Labels,
    norm: str,
    epsilons: Sequence[float],
    *,
    steps: int = 20,
    standing: Bool[Tensor, " b"] | None = None,
    generator: Generator = None,
) -> Bool[Tensor, "e b"]:
    """Which images stand at each eps, under PGD of ``steps`` steps: monotone by construction, and exactly so.

    What is fooled at an eps is fooled at every larger one, whose ball holds the same image: it is carried upward and
    not attacked again. One that stands is attacked from the perturbation that the last eps left, stretched to the new
    ball; at the first eps from a random point. ``standing`` are the images that the model answers rightly, where that
    is known.

    Raises ``InputError`` for values that do not rise or for fewer than one step.
    """
    if steps < 1 or any(b <= a for a, b in pairwise(epsilons)):
        raise InputError(f"a curve needs rising eps values and at least 1 step, got {tuple(epsilons)}, steps={steps}")
    stands = predictions(model, x) == y if standing is None else standing.clone()
    found = torch.empty(len(epsilons), len(x), dtype=torch.bool, device=x.device)
    x_adv, last = x.clone(), 0.0
    for place, eps in enumerate(epsilons):
        left = stands.nonzero().squeeze(1)
        if eps > 0 and len(left):
            threat, clean = Threat(norm, eps), x[left]
            if last:
                start = threat.project(clean + (x_adv[left] - clean) * (eps / last), clean)
            else:
                start = threat.random(clean, take(generator, left))
            x_adv[left] = pgd(model, clean, y[left], threat, steps=steps, start=start)
            stands[left] = predictions(model, x_adv[left]) == y[left]
        found[place], last = stands, eps
    return found
