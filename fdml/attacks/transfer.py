"""Attacks made to transfer: crafted on a surrogate, meant for another model.

They climb the surrogate's loss with momentum and return the last point. They do not stop where the surrogate is fooled:
a point well beyond its boundary transfers better than one just across.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fdml.attacks.objective import Model, Objective, check, look, objective_of
from fdml.errors import InputError
from fdml.inference import inference
from fdml.losses import Labels
from fdml.randomness import Generator, uniform
from fdml.threat import Images, Threat


def mi_fgsm(
    model: Model,
    x: Images,
    y: Labels,
    threat: Threat,
    *,
    steps: int = 10,
    step_size: float | None = None,
    decay: float = 1.0,
    objective: str | Objective = "ce",
    generator: Generator = None,
) -> Images:
    """FGSM iterated with momentum (Dong et al. 2018, algorithm 1; for l2 its section 3.3).

    The momentum is ``decay`` times itself plus the gradient divided by its l1 norm. ``step_size`` is in pixel units of
    the norm (default eps / steps). Nothing is random.

    Raises ``InputError`` for the l1 norm, steps below 1, and a step size or decay that is negative or not finite.
    """
    _check(threat, steps, step_size, decay)
    ascends = objective_of(objective)
    check(x, y)
    with inference(model):
        return _climb(lambda x_adv: look(model, x_adv, y, ascends)[2], x, threat, steps, step_size, decay)


def di_ti(
    model: Model,
    x: Images,
    y: Labels,
    threat: Threat,
    *,
    steps: int = 10,
    step_size: float | None = None,
    decay: float = 1.0,
    probability: float = 0.5,
    smallest: float = 0.85,
    kernel: int | None = None,
    objective: str | Objective = "ce",
    generator: Generator = None,
) -> Images:
    """MI-FGSM on diverse inputs (Xie et al. 2019) with a translation-invariant gradient (Dong et al. 2019, eq. 8).

    Before each step every image is, with ``probability``, shrunk to a random size from ``smallest`` of its sides up to
    the whole and laid at a random place on black. The gradient is then smoothed by a Gaussian of ``kernel`` pixels a
    side, an odd number, sigma a sixth of it. By default it is the paper's share of the image, 15 pixels for 299, and at
    least 5 from 16 pixels on; smaller images are not smoothed. ``probability=0, kernel=1`` is ``mi_fgsm``.

    Raises ``InputError`` as ``mi_fgsm`` does, for a probability outside [0, 1], ``smallest`` outside (0, 1], and an
    even kernel.
    """
    _check(threat, steps, step_size, decay)
    side = min(x.shape[2:])
    if kernel is None:
        kernel = max(2 * (side // 40) + 1, 5 if side >= 16 else 1)
    if not 0 <= probability <= 1:
        raise InputError(f"probability must lie in [0, 1], got {probability}")
    if not 0 < smallest <= 1:
        raise InputError(f"smallest must be a share of the side above 0 and at most 1, got {smallest}")
    if kernel < 1 or kernel % 2 == 0:
        raise InputError(f"kernel must be an odd number of pixels, got {kernel}")
    ascends = objective_of(objective)

    def gradient(x_adv: Images) -> Images:
        if probability == 0:
            return _smooth(look(model, x_adv, y, ascends)[2], kernel)
        draw = uniform(x_adv, generator, 4)
        with torch.enable_grad():
            source = x_adv.detach().requires_grad_()
            diverse = torch.where(draw[:, :1, None, None] < probability, _shrink(source, draw[:, 1:], smallest), source)
        outer = look(model, diverse, y, ascends)[2]
        return _smooth(torch.autograd.grad(diverse, source, outer)[0], kernel)

    check(x, y)
    with inference(model):
        return _climb(gradient, x, threat, steps, step_size, decay)


def _check(threat: Threat, steps: int, step_size: float | None, decay: float) -> None:
    if threat.norm == "l1":
        raise InputError("mi-fgsm and di-ti support linf and l2, got l1")
    if steps < 1:
        raise InputError(f"steps must be at least 1, got {steps}")
    for name, value in (("step_size", step_size), ("decay", decay)):
        if value is not None and not 0 <= value < float("inf"):
            raise InputError(f"{name} must be a finite number of at least 0, got {value}")


def _climb(
    gradient: Callable[[Images], Images],
    x: Images,
    threat: Threat,
    steps: int,
    step_size: float | None,
    decay: float,
) -> Images:
    step_size = threat.eps / steps if step_size is None else step_size
    x_adv, momentum = x, torch.zeros_like(x)
    for _ in range(steps):
        grad = gradient(x_adv)
        # The mean in place of the sum: a constant factor, which a sign or a normalised step does not see.
        size = grad.abs().mean((1, 2, 3), keepdim=True).clamp(min=torch.finfo(grad.dtype).tiny)
        momentum = decay * momentum + grad / size
        x_adv = threat.project(threat.ascend(x_adv, momentum, step_size), x)
    return x_adv


def _shrink(x: Images, draw: Tensor, smallest: float) -> Images:
    """Each image resized (bilinear) to whole pixels and padded with black to its old size, by three numbers in [0, 1)
    of its own: (b, 3), the size and the place."""
    whole = torch.tensor(x.shape[:1:-1], dtype=x.dtype, device=x.device)  # width, height: the order of a grid
    inner = (whole * (smallest + (1 - smallest) * draw[:, :1])).round().clamp(min=1)
    corner = (draw[:, 1:] * (whole - inner + 1)).floor()
    scale = whole / inner
    theta = torch.cat([torch.diag_embed(scale), (scale * (1 - 2 * corner / whole) - 1)[:, :, None]], dim=2)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def _smooth(grad: Images, kernel: int) -> Images:
    """The convolution of each channel with a Gaussian of unit sum, black beyond the border."""
    if kernel == 1:
        return grad
    places = torch.arange(kernel, dtype=grad.dtype, device=grad.device) - kernel // 2
    line = torch.softmax(-(places**2) / (2 * (kernel / 6) ** 2), 0)
    channels = grad.shape[1]
    window = (line[:, None] * line).expand(channels, 1, kernel, kernel)
    return F.conv2d(grad, window, padding=kernel // 2, groups=channels)
