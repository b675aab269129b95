"""How an attack looks at a model: the objectives it ascends, their gradients by the input, the best point so far."""

from collections.abc import Callable

import torch
from torch import Tensor

from fdml.errors import InputError, unknown
from fdml.losses import Logits, PerImage, cross_entropy, dlr, margin
from fdml.threat import Images

Model = Callable[[Tensor], Tensor]
Objective = Callable[[Tensor, Tensor], Tensor]
"""Logits (b, classes) and what they are compared with, one a row (labels, say), to a value an image: (b,)."""

OBJECTIVES: dict[str, Objective] = {"ce": cross_entropy, "margin": margin, "dlr": dlr}
"""What an attack ascends, per image, by name."""


def check(x: Tensor, y: Tensor) -> None:
    """Raises ``InputError`` for what no attack can take: images that are not float (b, c, h, w) in [0, 1], labels that
    are not one class index an image."""
    if x.ndim != 4 or not x.is_floating_point():
        raise InputError(f"images must be float (b, c, h, w) in [0, 1], got {x.dtype} {tuple(x.shape)}")
    if y.shape != x.shape[:1] or y.is_floating_point() or y.dtype == torch.bool:
        raise InputError(f"labels must be whole numbers ({len(x)},), one an image, got {y.dtype} {tuple(y.shape)}")
    if not len(x):
        return
    low, high = x.aminmax()
    if not (low >= 0 and high <= 1):
        hint = "; divide 8-bit pixels by 255" if high > 1 else ""
        raise InputError(f"images must be in [0, 1], got values from {float(low):g} to {float(high):g}{hint}")
    if y.min() < 0:
        raise InputError(f"labels must be at least 0, got {int(y.min())}")


def objective_of(objective: str | Objective) -> Objective:
    """The objective of that name; raises ``InputError`` for an unknown one. A function is returned as it is."""
    if not isinstance(objective, str):
        return objective
    if objective not in OBJECTIVES:
        raise unknown("objective", objective, OBJECTIVES)
    return OBJECTIVES[objective]


CHUNK = 64
"""Images that a CPU looks at together: more no longer fit its caches (docs/results.md)."""


def look(model: Model, x: Images, y: Tensor, objective: Objective) -> tuple[Logits, PerImage, Images]:
    """The logits, the objective and its gradient, each image's own: the sum over the batch keeps them apart."""
    if len(x) > CHUNK and x.device.type == "cpu":
        parts = [look(model, part, other, objective) for part, other in zip(*_parts(x, y), strict=True)]
        logits, value, grad = (torch.cat(found) for found in zip(*parts, strict=True))
        return logits, value, grad
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(x)
        value = objective(logits, y)
        (grad,) = torch.autograd.grad(value.sum(), x)
    return logits.detach(), value.detach(), grad


def answer(model: Model, x: Images) -> Logits:
    """The logits alone, without a graph."""
    with torch.no_grad():
        if len(x) > CHUNK and x.device.type == "cpu":
            return torch.cat([model(part) for part in _parts(x)[0]])
        return model(x)


def _parts(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Each tensor in the fewest parts of at most ``CHUNK`` rows, all of about one size."""
    return [tensor.tensor_split(-(-len(tensor) // CHUNK)) for tensor in tensors]


class Best:
    """The point of largest value seen so far, per image."""

    def __init__(self, x: Images) -> None:
        self.x = x.clone()
        self.value = torch.full((len(x),), -torch.inf, dtype=x.dtype, device=x.device)

    def see(self, rows: Tensor, x: Images, value: PerImage) -> None:
        """Keeps ``x``, a candidate for each of the images ``rows``, where its value is the largest so far."""
        better = value > self.value[rows]
        rows = rows[better]
        self.x[rows], self.value[rows] = x[better], value[better]
