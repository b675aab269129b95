"""ALMA (Rony et al. 2021, "Augmented Lagrangian Adversarial Attacks"), from where short runs of FMN end."""

import torch
from torch import Tensor

from fdml.attacks.fmn import search
from fdml.attacks.objective import Model, answer, check, look
from fdml.attacks.projection import DUAL, length
from fdml.attacks.within import Nearest, narrow
from fdml.errors import InputError
from fdml.inference import inference
from fdml.losses import Labels, PerImage, dlr, margin
from fdml.randomness import Generator
from fdml.threat import Images


def alma(
    model: Model,
    x: Images,
    y: Labels,
    norm: str,
    *,
    steps: int = 200,
    enough: float | None = None,
    generator: Generator = None,
) -> Images:
    """The distance is descended under the constraint of a misclassified image, by the penalty P2 (algorithm 1).

    Constants are the paper's, but for these. A quarter of the steps goes to FMN with the margin, and 15% to FMN with
    DLR; the Lagrangian goes on from the nearer point of the two. The constraint is the margin, and distance and margin
    are measured in those of that point, so that the multiplier begins at 1, where it ends on a linear model, and the
    learning rate is a share of the distance, whatever the scale of logits and images.

    ``steps`` counts gradients. Returns the nearest misclassified image found, in [0, 1], drawn towards x as far as it
    stays misclassified; x itself where none was found, and where it is misclassified already. An image is done once
    its perturbation is at most ``enough``. Nothing is drawn from ``generator``.

    Raises ``InputError`` for any norm but l2 and l1, steps below 1, and a negative ``enough``.
    """
    if steps < 1:
        raise InputError(f"steps must be at least 1, got {steps}")
    nearest = Nearest(x, y, norm, enough)
    if norm not in _RATE:
        raise InputError(f"alma supports {' and '.join(_RATE)}, got {norm}")
    first, second = steps // 4, 3 * steps // 20
    check(x, y)
    with inference(model):
        if first:
            search(model, nearest, first, margin, annealed=True)
        if second:
            search(model, nearest, second, dlr, annealed=False)
        _refine(model, nearest, steps - first - second)
        return nearest.closer(model)


_RATE = {"l2": 1.0, "l1": 3.0}
"""The first learning rate: the norm of a step that moves all pixels alike, as a share of the distance."""
_PENALTY = 30.0
"""The first penalty parameter, rho."""
_SHORT = 1e-4
"""What the margin must be above 0."""


def _refine(model: Model, nearest: Nearest, steps: int) -> None:
    """The descent of the Lagrangian, which shows ``nearest`` all that it visits."""
    norm = nearest.threat.norm
    rows = nearest.remaining()
    if not len(rows):
        return
    x, y, x_adv = nearest.x[rows], nearest.y[rows], nearest.x_adv[rows]
    distance = nearest.threat.distance(x_adv, x)
    rho, mu = torch.full_like(distance, _PENALTY), torch.ones_like(distance)
    pixels = length(torch.ones_like(x[:1]).flatten(1), norm)
    # The first look sets these: the distance and the slope that the Lagrangian is in units of, what the constraint
    # lacked when it was last looked at, and the two averages of the gradient.
    unit = slope = before = distance
    square = momentum = x
    for step in range(steps):
        logits, value, grad = look(model, x_adv, y, margin)
        fooled, going = nearest.see(rows, x_adv, distance, logits)
        rows, x, y, x_adv, distance, rho, mu, unit, slope, before, square, momentum, fooled, value, grad = narrow(
            going, rows, x, y, x_adv, distance, rho, mu, unit, slope, before, square, momentum, fooled, value, grad
        )
        if not len(rows):
            return
        if step == 0:
            slope = length(grad.flatten(1), DUAL[norm]).clamp_(min=1e-12)
            unit = torch.where(distance > 0, distance, value.abs() / slope).clamp_(min=1e-12)
        lack = _SHORT - value / (unit * slope)
        if step == 0:
            before = lack
        elif step % 10 == 0:
            rho = torch.where(fooled | (lack < 0.95 * before), rho, 1.2 * rho)
            before = lack
        if step:
            mu = mu.lerp(_growth(lack, rho, mu), 0.1).clamp_(1e-6, 1e12)
        delta = x_adv - x
        pull = delta / distance.clamp(min=1e-12)[:, None, None, None] if norm == "l2" else delta.sign()
        grad = pull.addcmul_(grad, (_growth(lack, rho, mu) / slope)[:, None, None, None], value=-1)
        if step == 0:
            square = grad.square().mean((1, 2, 3), keepdim=True).expand_as(grad).clone()
            momentum = torch.zeros_like(grad)
        else:
            square.mul_(0.9).addcmul_(grad, grad, value=0.1)
        momentum.mul_(0.9).addcdiv_(grad, square.sqrt().add_(1e-12), value=0.1)
        rate = _RATE[norm] * 0.01 ** (step / steps) * unit / pixels
        x_adv = torch.addcmul(x_adv, momentum, rate[:, None, None, None], value=-1).clamp_(0, 1)
        distance = nearest.threat.distance(x_adv, x)
    nearest.see(rows, x_adv, distance, answer(model, x_adv))


def _growth(lack: Tensor, rho: Tensor, mu: Tensor) -> PerImage:
    """The derivative of the penalty P2 by what the constraint lacks."""
    over = rho * lack
    return torch.where(lack >= 0, mu * (1 + 2 * over) + over.square() / 2, mu / (1 - over.clamp(max=0)).square())
