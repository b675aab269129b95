"""The Fast Minimum-Norm attack (Pintor et al. 2021), with a direction that anneals from linf to the norm attacked."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fdml.attacks.objective import Model, Objective, answer, check, look, objective_of
from fdml.attacks.projection import DUAL, length
from fdml.attacks.within import Nearest, narrow
from fdml.errors import InputError
from fdml.inference import inference
from fdml.losses import Labels
from fdml.randomness import Generator
from fdml.threat import Images


def fmn(
    model: Model,
    x: Images,
    y: Labels,
    norm: str,
    *,
    steps: int = 100,
    objective: str | Objective = "margin",
    annealed: bool = True,
    enough: float | None = None,
    generator: Generator = None,
) -> Images:
    """Steps of ascent on a ball whose radius shrinks where the image is fooled and grows where it is not (algorithm 1).

    What differs from the paper: until a first point is found the radius never shrinks; a step is a share of the radius,
    so that no scale is built in; and it is the steepest one in l_q, where 1/q grows from 0 to that of the norm attacked
    (for l1, to near it; ``annealed=False``: from the start). That at first all pixels count alike finds far nearer
    points on networks trained against linf.

    ``steps`` counts gradients. Returns the nearest misclassified image found, in [0, 1], drawn towards x as far as it
    stays misclassified; x itself where none was found, and where it is misclassified already. An image is done once
    its perturbation is at most ``enough``, and is not looked for on a smaller ball. Nothing is drawn from
    ``generator``.

    Raises ``InputError`` for an unknown norm or objective, steps below 1, and a negative ``enough``.
    """
    if steps < 1:
        raise InputError(f"steps must be at least 1, got {steps}")
    nearest = Nearest(x, y, norm, enough)
    ascends = objective_of(objective)
    check(x, y)
    with inference(model):
        search(model, nearest, steps, ascends, annealed)
        return nearest.closer(model)


class _Schedule(NamedTuple):
    first: float
    last: float
    """The first step and the last, in radii."""
    inverse: float
    """The last 1/q: for l1 just short of 1, since a single pixel at a time is too few."""
    until: float
    """The share of the steps after which 1/q is the last."""


_SCHEDULES = {
    "linf": _Schedule(0.5, 0.005, 0.0, 1.0),
    "l2": _Schedule(2.0, 0.02, 0.5, 0.7),
    "l1": _Schedule(1.0, 0.3, 0.98, 1.0),
}
_RATES = 0.1, 0.001
"""By what share the radius changes in the first step, and in the last."""
_SPARSE = 0.3
"""The 1/q from which steps are sparse enough for the l1 ball to be projected on: earlier, that would undo them."""


def search(model: Model, nearest: Nearest, steps: int, objective: Objective, annealed: bool) -> None:
    """One run from the clean images, which shows ``nearest`` all that it visits."""
    norm, schedule = nearest.threat.norm, _SCHEDULES[nearest.threat.norm]
    rows = nearest.remaining()
    if not len(rows):
        return
    x, y = nearest.x[rows], nearest.y[rows]
    x_adv, distance = x, torch.zeros_like(nearest.distance[rows])
    radius, best = distance, distance + torch.inf
    largest = length(torch.maximum(x, 1 - x).flatten(1), norm)
    for step in range(steps):
        logits, value, grad = look(model, x_adv, y, objective)
        fooled, going = nearest.see(rows, x_adv, distance, logits)
        best = torch.where(fooled, torch.minimum(best, distance), best)
        rows, x, y, x_adv, distance, radius, best, largest, fooled, value, grad = narrow(
            going, rows, x, y, x_adv, distance, radius, best, largest, fooled, value, grad
        )
        if not len(rows):
            return
        cosine = (1 + math.cos(math.pi * step / steps)) / 2
        rate = _RATES[1] + (_RATES[0] - _RATES[1]) * cosine
        to_boundary = value.abs() / length(grad.flatten(1), DUAL[norm]).clamp_(min=1e-12)
        wider = radius * (1 + rate)
        wider = torch.where(best < torch.inf, wider, torch.maximum(wider, distance + to_boundary))
        radius = torch.where(fooled, torch.minimum(radius * (1 - rate), best), wider)
        radius = radius.clamp(min=nearest.threat.eps).minimum(largest)
        inverse = schedule.inverse * (min(1.0, step / (schedule.until * steps)) if annealed else 1.0)
        size = (schedule.last + (schedule.first - schedule.last) * cosine) * radius
        delta = x_adv - x + _steepest(x_adv, grad, norm, inverse) * size[:, None, None, None]
        x_adv = (x + _onto(delta, radius, norm, inverse)).clamp_(0, 1)
        distance = nearest.threat.distance(x_adv, x)
    nearest.see(rows, x_adv, distance, answer(model, x_adv))


def _steepest(x_adv: Images, grad: Images, norm: str, inverse: float) -> Images:
    """The steepest ascent in l_q, 1/q = ``inverse``, of length 1 in the norm; pixels that [0, 1] holds stay."""
    stuck = ((x_adv >= 1) & (grad > 0)) | ((x_adv <= 0) & (grad < 0))
    direction = grad.masked_fill(stuck, 0)
    if inverse == 0:
        direction = direction.sign()
    else:
        direction = direction / direction.abs().amax((1, 2, 3), keepdim=True).clamp(min=torch.finfo(grad.dtype).tiny)
        if inverse != 0.5:
            direction = direction.sign() * direction.abs().pow_(inverse / (1 - inverse))
    return direction / length(direction.flatten(1), norm).clamp_(min=1e-12)[:, None, None, None]


def _onto(delta: Images, radius: Tensor, norm: str, inverse: float) -> Images:
    """On the ball of each image's radius: clipped to it in linf, scaled to its surface in l2, and in l1 at first.

    Otherwise the projection on the l1 ball (Duchi et al. 2008, figure 1).
    """
    radius = radius[:, None]
    flat = delta.flatten(1)
    if norm == "linf":
        return flat.clamp(-radius, radius).view_as(delta)
    if norm == "l2" or inverse < _SPARSE:
        return (flat * (radius / length(flat, norm)[:, None].clamp(min=1e-12))).view_as(delta)
    size = flat.abs()
    ordered = size.sort(dim=1, descending=True).values
    level = (ordered.cumsum(1) - radius) / torch.arange(1, flat.shape[1] + 1, dtype=flat.dtype, device=flat.device)
    count = (ordered > level).sum(1, keepdim=True).clamp(min=1)
    return (flat.sign() * (size - level.gather(1, count - 1).clamp_(min=0)).clamp_(min=0)).view_as(delta)
