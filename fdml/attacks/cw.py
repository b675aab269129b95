"""Carlini and Wagner's attack for l2 (2017, "Towards Evaluating the Robustness of Neural Networks")."""

import torch

from fdml.attacks.objective import Model, look
from fdml.attacks.projection import length
from fdml.attacks.within import Nearest
from fdml.errors import InputError
from fdml.inference import inference
from fdml.losses import Labels, margin
from fdml.randomness import Generator
from fdml.threat import Images


def cw(
    model: Model,
    x: Images,
    y: Labels,
    norm: str = "l2",
    *,
    steps: int = 100,
    rounds: int = 6,
    step_size: float = 0.05,
    enough: float | None = None,
    generator: Generator = None,
) -> Images:
    """Adam descends |δ|² + c · [−margin]₊ over w with x + δ = (1 + tanh w) / 2, and c is searched for (section VI.A).

    Each of the ``rounds`` starts from x, has at most ``steps`` gradients, and is over for an image whose loss stagnates
    for a tenth of them; then c is halved between the least that fooled and the largest that did not, or grows tenfold.
    The first c is four times the one that a linear model needs, so that it fits any scale of the logits. tanh w is
    stretched a little and clipped, so that black and white pixels, where its slope is 0, can move.

    Returns the nearest misclassified image found, in [0, 1], drawn towards x as far as it stays misclassified; x itself
    where none was found, and where it is misclassified already. An image is done once its perturbation is at most
    ``enough``. Nothing is drawn from ``generator``.

    Raises ``InputError`` for any norm but l2, steps or rounds below 1, and a negative ``enough``.
    """
    if norm != "l2":
        raise InputError(f"cw supports l2, got {norm}")
    if steps < 1 or rounds < 1:
        raise InputError(f"steps and rounds must be at least 1, got steps={steps}, rounds={rounds}")
    if not 0 < step_size < float("inf"):
        raise InputError(f"step_size must be a finite number above 0, got {step_size}")
    nearest = Nearest(x, y, norm, enough)
    weight = torch.zeros_like(nearest.distance)
    low, high = torch.zeros_like(weight), torch.full_like(weight, torch.inf)
    with inference(model):
        for round_ in range(rounds):
            rows = nearest.remaining()
            if not len(rows):
                break
            fooled = _descend(model, nearest, weight, steps, step_size, first=round_ == 0)
            high = torch.where(fooled, torch.minimum(high, weight), high)
            low = torch.where(fooled, low, torch.maximum(low, weight))
            weight = torch.where(high < torch.inf, (low + high) / 2, 10 * low)
        return nearest.closer(model)

SHRINK = 0.99
BEGIN = 4.0

def _descend(model, nearest, weight, steps, step_size, first):
    ever = torch.zeros_like(weight, dtype=torch.bool)
    rows = nearest.remaining()
    x, y, c = nearest.x[rows], nearest.y[rows], weight[rows]
    w = torch.atanh((2 * x - 1) * SHRINK)
    limit = torch.atanh(torch.tensor(SHRINK))
    first_moment, second_moment = torch.zeros_like(x), torch.zeros_like(x)
    before = torch.full_like(c, torch.inf)
    interval = max(1, steps // 10)
    x_adv, slope = x, (1 - ((2*x-1)*SHRINK)**2) / (2*SHRINK)
    for step in range(steps):
        logits, value, grad = look(model, x_adv, y, margin)
        distance = nearest.threat.distance(x_adv, x)
        fooled, going = nearest.see(rows, x_adv, distance, logits)
        ever[rows] |= fooled
        if step == 0 and first:
            c = BEGIN * 2 * value.abs() / length(grad.flatten(1), "l2").square().clamp(min=1e-12)
            weight[rows] = c
        if step % interval == 0:
            loss = distance.square() + c * (-value).clamp(min=0)
            going = going & (loss < 0.9999 * before)
            before = loss
        if not bool(going.all()):
            rows, x, y, c, w, first_moment, second_moment, before, x_adv, slope, value, grad = (t[going] for t in (rows, x, y, c, w, first_moment, second_moment, before, x_adv, slope, value, grad))
            if not len(rows): break
        pull = 2 * (x_adv - x) - grad * torch.where(value <= 0, c, 0.)[:, None, None, None]
        pull = pull * slope
        first_moment.lerp_(pull, 0.1)
        second_moment.mul_(0.999).addcmul_(pull, pull, value=0.001)
        k = step + 1
        w = w - (step_size / (1 - 0.9**k)) * first_moment / (second_moment.sqrt() / (1 - 0.999**k)**.5 + 1e-12)
        w = w.clamp_(-limit, limit)
        t = w.tanh()
        x_adv = (t / SHRINK + 1).div_(2).clamp_(0, 1)
        slope = (1 - t * t) / (2 * SHRINK)
    return ever
