"""Carlini and Wagner's l2 attack (2017, "Towards Evaluating the Robustness of Neural Networks")."""

import math

import torch
from jaxtyping import Bool
from torch import Tensor

from fdml.attacks.objective import Model, answer, check, look
from fdml.attacks.within import Nearest, narrow
from fdml.errors import InputError
from fdml.inference import inference
from fdml.losses import Labels, PerImage, margin
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
    """Adam descends |δ|² + c · [−margin]₊ over w, where x + δ = (1 + tanh w) / 2, for several c (section VI.A).

    Each of the ``rounds`` takes at most ``steps`` gradients, and ends for an image whose loss does not fall in a tenth
    of them; then c is bisected, or grows tenfold where none has fooled the model. What differs from the paper: the
    first c is four times what a linear model needs, whatever the scale of its logits; a round begins at the nearest
    point found, with steps in w of at most ``step_size`` that fit its distance and fall to a tenth; and tanh w is
    stretched and clipped, since black and white pixels, where its slope is 0, would never move.

    Returns the nearest misclassified image found, in [0, 1], drawn towards x as far as it stays misclassified; x itself
    where none was found, and where it is misclassified already. An image is done once its perturbation is at most
    ``enough``. Nothing is drawn from ``generator``.

    Raises ``InputError`` for any norm but l2, steps or rounds below 1, a step size that is not positive, and a negative
    ``enough``.
    """
    if norm != "l2":
        raise InputError(f"cw supports l2, got {norm}")
    if steps < 1 or rounds < 1:
        raise InputError(f"steps and rounds must be at least 1, got steps={steps}, rounds={rounds}")
    if not 0 < step_size < float("inf"):
        raise InputError(f"step_size must be a finite number above 0, got {step_size}")
    check(x, y)
    nearest = Nearest(x, y, norm, enough)
    with inference(model):
        logits, value, grad = look(model, nearest.x, y, margin)
        nearest.see(nearest.remaining(), nearest.x, torch.zeros_like(value), logits)
        c = 4 * 2 * value.abs() / grad.square().sum((1, 2, 3)).clamp_(min=1e-12)
        low, high = torch.zeros_like(c), torch.full_like(c, torch.inf)
        for _ in range(rounds):
            fooled = _descend(model, nearest, c, steps, step_size)
            low, high = torch.where(fooled, low, c), torch.where(fooled, c, high)
            c = torch.where(high < torch.inf, (low + high) / 2, 10 * c)
        return nearest.closer(model)


_STRETCH = 0.8
"""The tanh of w that stands for a white pixel."""


def _descend(model: Model, nearest: Nearest, c: PerImage, steps: int, step_size: float) -> Bool[Tensor, " b"]:
    """One round, which shows ``nearest`` all that it visits; for each image, whether the model was fooled."""
    ever = torch.zeros_like(c, dtype=torch.bool)
    rows = nearest.remaining()
    x, y, x_adv, distance, c = (all_[rows] for all_ in (nearest.x, nearest.y, nearest.x_adv, nearest.distance, c))
    tanh = (2 * x_adv - 1) * _STRETCH
    w, largest = tanh.atanh(), math.atanh(_STRETCH)
    # A step in which every grey pixel moves is a tenth of the distance.
    size = (0.1 * distance / x.shape[1:].numel() ** 0.5 * 2 / _STRETCH).clamp_(max=step_size)
    first, second = torch.zeros_like(w), torch.zeros_like(w)
    loss = torch.full_like(c, torch.inf)
    interval = max(1, steps // 10)
    for step in range(steps):
        if not len(rows):
            return ever
        logits, value, grad = look(model, x_adv, y, margin)
        distance = nearest.threat.distance(x_adv, x)
        fooled, going = nearest.see(rows, x_adv, distance, logits)
        ever[rows] |= fooled
        if step % interval == 0:
            before, loss = loss, distance.square() + c * (-value).clamp_(min=0)
            going = going & (loss < 0.9999 * before)
        rows, x, y, c, x_adv, tanh, w, size, first, second, loss, value, grad = narrow(
            going, rows, x, y, c, x_adv, tanh, w, size, first, second, loss, value, grad
        )
        grad = 2 * (x_adv - x) - grad * torch.where(value <= 0, c, 0)[:, None, None, None]
        # Adam knows no scale: the constant factor of the derivative by w may be left out.
        grad.mul_(1 - tanh.square())
        first.mul_(0.9).add_(grad, alpha=0.1)
        second.mul_(0.999).addcmul_(grad, grad, value=0.001)
        rate = (1 - 0.9 * step / steps) * (1 - 0.999 ** (step + 1)) ** 0.5 / (1 - 0.9 ** (step + 1)) * size
        w = torch.addcmul(w, first / second.sqrt().add_(1e-12), rate[:, None, None, None], value=-1)
        tanh = w.clamp_(-largest, largest).tanh()
        x_adv = ((tanh / _STRETCH + 1) / 2).clamp_(0, 1)
    fooled, _ = nearest.see(rows, x_adv, nearest.threat.distance(x_adv, x), answer(model, x_adv))
    ever[rows] |= fooled
    return ever
