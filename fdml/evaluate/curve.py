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
    not attacked again. One that stands is attacked from where the last eps left it for half of the steps, then from a
    random point for the rest. ``standing`` are the images that the model answers rightly, where that is known.

    Raises ``InputError`` for values that do not rise or for fewer than two steps.
    """
    if steps < 2 or any(b <= a for a, b in pairwise(epsilons)):
        raise InputError(f"a curve needs rising eps values and at least 2 steps, got {tuple(epsilons)}, steps={steps}")
    stands = predictions(model, x) == y if standing is None else standing.clone()
    found = torch.empty(len(epsilons), len(x), dtype=torch.bool, device=x.device)
    x_adv = x.clone()
    for place, eps in enumerate(epsilons):
        threat = Threat(norm, eps)
        for warm in (True, False):
            left = stands.nonzero().squeeze(1)
            if eps == 0 or not len(left):
                break
            start = x_adv[left] if warm else threat.random(x[left], take(generator, left))
            half = steps // 2
            size = 2.5 * eps / half
            x_adv[left] = pgd(model, x[left], y[left], threat, steps=half, step_size=size, start=start)
            stands[left] = predictions(model, x_adv[left]) == y[left]
        found[place] = stands
    return found
