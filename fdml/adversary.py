"""The inner attack: the adversarial images that the student learns from."""

from collections.abc import Callable

import torch
from torch import Tensor

from fdml.attacks import n_fgsm, pgd
from fdml.recipe import Recipe
from fdml.threat import Threat


def attack_start(recipe: Recipe, x: Tensor, threat: Threat, generator: torch.Generator) -> Tensor:
    """Where the inner attack on ``x`` begins. Drawn for the global batch, so that processes share one randomness."""
    if recipe.attack == "none":
        return x
    if recipe.attack == "n-fgsm":
        return x + torch.empty_like(x).uniform_(-2 * threat.eps, 2 * threat.eps, generator=generator)
    if recipe.base == "trades":
        # The KL has no gradient at the clean image itself; the published code starts a hair beside it.
        return (x + 0.001 * torch.empty_like(x).normal_(generator=generator)).clamp_(0, 1)
    return threat.random(x, generator)


def inner_attack(
    recipe: Recipe, model: Callable[[Tensor], Tensor], x: Tensor, start: Tensor, y: Tensor, threat: Threat
) -> Tensor:
    """Adversarial images of ``x`` against ``model`` as it is: gradients of the input alone, BatchNorm in eval mode."""
    if recipe.attack == "none":
        return x
    with torch.autocast(x.device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
        return _attack(recipe, model, x, start, y, threat)


def _attack(
    recipe: Recipe, model: Callable[[Tensor], Tensor], x: Tensor, start: Tensor, y: Tensor, threat: Threat
) -> Tensor:
    if recipe.attack == "n-fgsm":
        return n_fgsm(model, x, y, threat, start=start)
    step_size = recipe.attack_step * threat.eps
    steps = recipe.attack_steps
    objective = "kl" if recipe.base == "trades" else "ce"
    return pgd(model, x, y, threat, steps=steps, step_size=step_size, objective=objective, start=start, keep="last")
