"""How an attack looks at a model: the objectives it ascends, their gradients by the input, the best point so far."""

from collections.abc import Callable

import torch
from torch import Tensor

from fdml.errors import unknown
from fdml.losses import Logits, PerImage, cross_entropy, dlr, margin
from fdml.threat import Images

Model = Callable[[Tensor], Tensor]
Objective = Callable[[Tensor, Tensor], Tensor]
"""Logits (b, classes) and what they are compared with, one a row (labels, say), to a value an image: (b,)."""

OBJECTIVES: dict[str, Objective] = {"ce": cross_entropy, "margin": margin, "dlr": dlr}
"""What an attack ascends, per image, by name."""


def objective_of(objective: str | Objective) -> Objective:
    """The objective of that name; raises ``InputError`` for an unknown one. A function is returned as it is."""
    if not isinstance(objective, str):
        return objective
    if objective not in OBJECTIVES:
        raise unknown("objective", objective, OBJECTIVES)
    return OBJECTIVES[objective]


def look(model: Model, x: Images, y: Tensor, objective: Objective) -> tuple[Logits, PerImage, Images]:
    """The logits, the objective and its gradient, each image's own: the sum over the batch keeps them apart."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(x)
        value = objective(logits, y)
        (grad,) = torch.autograd.grad(value.sum(), x)
    return logits.detach(), value.detach(), grad


class Best:
    """The point of largest value seen so far, per image."""

    def __init__(self, x: Images, value: PerImage) -> None:
        self.x, self.value = x.clone(), value.clone()

    def see(self, x: Images, value: PerImage) -> None:
        """Keeps ``x`` where its value is the largest so far."""
        better = value > self.value
        self.x[better] = x[better]
        self.value = torch.maximum(self.value, value)

