"""Attacks by estimated gradients, of queries alone: NES and SPSA.

Both climb along the gradient that pairs of opposite steps about a point suggest, and look at every point that they come
to. All that they show to the model lies in [0, 1]. They return the first misclassified point of an image, or else the
one of largest margin; the image itself where it is misclassified already.
"""

from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor

from fdml.attacks.objective import CHUNK, Model, Objective, answer, check, objective_of
from fdml.errors import InputError
from fdml.inference import inference
from fdml.losses import Labels, margin
from fdml.randomness import Generator, normal, signs, take
from fdml.threat import Images, Threat

Kept = tuple[Tensor, ...]
Rule = Callable[[Tensor, Tensor, Kept, int], tuple[Tensor, Kept]]
"""From points, gradients, what was kept of each image and the number of the step, to moved points and what to keep."""


def nes(
    model: Model,
    x: Images,
    y: Labels,
    threat: Threat,
    *,
    budget: int = 5000,
    samples: int = 20,
    sigma: float = 0.01,
    step_size: float | None = None,
    momentum: float = 0.9,
    objective: str | Objective = "margin",
    generator: Generator = None,
    queries: Int[Tensor, " b"] | None = None,
) -> Images:
    """Ascent along gradients estimated by natural evolution strategies (Ilyas et al. 2018, algorithm 1).

    A gradient takes ``samples`` queries, in pairs at ± ``sigma`` (in pixel units) times a normal direction. Steps are
    of steepest ascent, of length ``step_size`` (pixel units of the norm; default eps / 2), along a running mean of the
    gradients that ``momentum`` weighs, and are projected. No image is shown more than ``budget`` times, the clean look
    included; how often each one was is added to ``queries``. For linf and l2.

    Raises ``InputError`` for another norm, a budget below 1, an odd number of samples, a sigma of 0, a momentum outside
    [0, 1) and an unknown objective.
    """
    if not 0 <= momentum < 1:
        raise InputError(f"momentum must be at least 0 and below 1, got {momentum}")
    size = threat.eps / 2 if step_size is None else step_size

    def rule(here: Tensor, grad: Tensor, kept: Kept, _: int) -> tuple[Tensor, Kept]:
        mean = torch.lerp(grad, kept[0], momentum)
        return threat.ascend(here, mean, size), (mean,)

    return _climb(model, x, y, threat, budget, samples, sigma, objective, normal, rule, 1, generator, queries)


def spsa(
    model: Model,
    x: Images,
    y: Labels,
    threat: Threat,
    *,
    budget: int = 5000,
    samples: int = 20,
    sigma: float = 0.01,
    step_size: float | None = None,
    objective: str | Objective = "margin",
    generator: Generator = None,
    queries: Int[Tensor, " b"] | None = None,
) -> Images:
    """Adam along gradients estimated by simultaneous perturbation (Uesato et al. 2018).

    A gradient takes ``samples`` queries, in pairs at ± ``sigma`` (in pixel units) times random signs. Adam has its
    usual constants; its ``step_size`` is in pixel units (default eps / 2 for linf, eps / 2√d for l2 on images of d
    numbers), and every step is projected. No image is shown more than ``budget`` times, the clean look included; how
    often each one was is added to ``queries``. For linf and l2.

    Raises ``InputError`` for another norm, a budget below 1, an odd number of samples, a sigma of 0 and an unknown
    objective.
    """
    per_pixel = 1.0 if threat.norm == "linf" else x.shape[1:].numel() ** -0.5
    size = threat.eps / 2 * per_pixel if step_size is None else step_size

    def rule(here: Tensor, grad: Tensor, kept: Kept, step: int) -> tuple[Tensor, Kept]:
        mean, square = torch.lerp(grad, kept[0], 0.9), torch.lerp(grad.square(), kept[1], 0.999)
        scale = (square / (1 - 0.999**step)).sqrt_().add_(1e-8)
        return here + mean / scale * (size / (1 - 0.9**step)), (mean, square)

    return _climb(model, x, y, threat, budget, samples, sigma, objective, signs, rule, 2, generator, queries)


def _climb(
    model: Model,
    x: Images,
    y: Labels,
    threat: Threat,
    budget: int,
    samples: int,
    sigma: float,
    objective: str | Objective,
    direction: Callable[..., Tensor],
    rule: Rule,
    keeps: int,
    generator: Generator,
    queries: Tensor | None,
) -> Images:
    if threat.norm == "l1":
        raise InputError("nes and spsa support linf and l2, got l1")
    if budget < 1:
        raise InputError(f"budget must be at least 1, got {budget}")
    if samples < 2 or samples % 2:
        raise InputError(f"samples come in pairs: they must be an even number of at least 2, got {samples}")
    if not sigma > 0:
        raise InputError(f"sigma must be above 0, got {sigma}")
    ascends = objective_of(objective)
    x_adv = x.detach().clone()
    check(x, y)
    with inference(model), torch.inference_mode():
        best = margin(answer(model, x), y)
        if queries is not None:
            queries += 1
        # From here on, all but x_adv and best is of the images still standing, which are at `rows` of the batch.
        rows = (best <= 0).nonzero().squeeze(1)
        x, y = x[rows], y[rows]
        here, kept = x, (torch.zeros_like(x),) * keeps
        for step in range(1, (budget - 1) // (samples + 1) + 1):
            if not len(rows):
                break
            grad = _gradient(model, here, y, samples // 2, sigma, ascends, direction, take(generator, rows))
            here, kept = rule(here, grad, kept, step)
            here = threat.project(here, x)
            value = margin(answer(model, here), y)
            if queries is not None:
                queries[rows] += samples + 1
            better = value > best[rows]
            x_adv[rows[better]], best[rows[better]] = here[better], value[better]
            stands = value <= 0
            if not stands.all():
                rows, x, y, here, *kept = (each[stands] for each in (rows, x, y, here, *kept))
                kept = tuple(kept)
    return x_adv


def _gradient(
    model: Model,
    x: Images,
    y: Labels,
    pairs: int,
    sigma: float,
    ascends: Objective,
    direction: Callable[..., Tensor],
    generator: Generator,
) -> Images:
    """The mean of (f(x + σu) − f(x − σu)) / 2σ · u over ``pairs`` of random directions u; what f sees is clipped.

    No more than ``CHUNK`` points are held, or one pair for each image.
    """
    grad = torch.zeros_like(x)
    together = max(CHUNK // (2 * len(x)), 1)
    for first in range(0, pairs, together):
        # One pair a draw and an addition: how many fit depends on the other images, and must change nothing.
        drawn = [direction(x, generator, *x.shape[1:]) for _ in range(min(together, pairs - first))]
        points = torch.cat([torch.add(x, u, alpha=step).clamp_(0, 1) for u in drawn for step in (sigma, -sigma)])
        value = ascends(answer(model, points), y.repeat(2 * len(drawn))).view(-1, 2, len(x))
        for u, (ahead, behind) in zip(drawn, value, strict=True):
            grad.addcmul_(u, (ahead - behind)[:, None, None, None])
    return grad.div_(2 * sigma * pairs)
