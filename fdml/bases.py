"""What the label, or a teacher in its place, says to the student: the methods that are compared, as pure functions.

Each is given the student's logits of the adversarial images x', and asks for those of others where it needs them, so
that no method pays for a pass that it does not use. A term is a mean over the batch, at its weight.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from fdml import losses
from fdml.guidance import Advice
from fdml.recipe import Recipe

HELPER = 2.0
"""How far beyond x' HAT's helper images lie, in units of the perturbation."""


@dataclass(frozen=True)
class Batch:
    """One step: ``x``, ``x_adv`` (b, c, h, w), labels ``y`` (b,), ``target`` (b, classes), the distribution to learn;
    ``forward`` gives the student's logits of more images, in training mode."""

    x: Tensor
    x_adv: Tensor
    y: Tensor
    target: Tensor
    advice: Advice | None
    forward: Callable[[Tensor], Tensor]


def ce(recipe: Recipe, batch: Batch, logits: Tensor) -> dict[str, Tensor]:
    """CE(S(x')) (Madry et al. 2018, eq. 2.1)."""
    return {"ce": F.cross_entropy(logits, batch.target)}


def trades(recipe: Recipe, batch: Batch, logits: Tensor) -> dict[str, Tensor]:
    """CE(S(x)) + beta KL(S(x) ‖ S(x')) (Zhang et al. 2019, eq. 5)."""
    clean = batch.forward(batch.x)
    drift = losses.kl_divergence(clean, logits)
    return {"ce": F.cross_entropy(clean, batch.target), "kl": recipe.beta * drift.mean()}


def mart(recipe: Recipe, batch: Batch, logits: Tensor) -> dict[str, Tensor]:
    """BCE(S(x')) + beta KL(S(x) ‖ S(x')) · (1 − p_y(x)) (Wang et al. 2020, eq. 11)."""
    clean = batch.forward(batch.x)
    drift = losses.kl_divergence(clean, logits)
    drift = drift * (1 - clean.softmax(1).gather(1, batch.y[:, None]).squeeze(1))
    return {"bce": losses.boosted_cross_entropy(logits, batch.y).mean(), "kl": recipe.beta * drift.mean()}


def alp(recipe: Recipe, batch: Batch, logits: Tensor) -> dict[str, Tensor]:
    """Half CE(S(x)), half CE(S(x')), + beta · the mean square of S(x) − S(x') (Kannan et al. 2018, eq. 1)."""
    clean = batch.forward(batch.x)
    both = (F.cross_entropy(clean, batch.target) + F.cross_entropy(logits, batch.target)) / 2
    return {"ce": both, "alp": recipe.beta * F.mse_loss(logits, clean)}


def hat(recipe: Recipe, batch: Batch, logits: Tensor) -> dict[str, Tensor]:
    """CE(S(x)) + beta KL(S(x) ‖ S(x')) + gamma CE(S(x + 2 (x' − x)), argmax T(x')) (Rade and Moosavi 2022, eq. 5)."""
    assert batch.advice is not None
    assert batch.advice.adversarial is not None
    helper = batch.x + HELPER * (batch.x_adv - batch.x)
    helped = F.cross_entropy(batch.forward(helper), batch.advice.adversarial.argmax(1))
    return trades(recipe, batch, logits) | {"helper": recipe.gamma * helped}


def rslad(recipe: Recipe, batch: Batch, logits: Tensor) -> dict[str, Tensor]:
    """5/6 KL(T(x) ‖ S(x')) + 1/6 KL(T(x) ‖ S(x)) (Zi et al. 2021, eq. 6), T robust; summed over the classes, where the
    published code has their mean."""
    assert batch.advice is not None
    clean = batch.forward(batch.x)
    adversarial = losses.kl_divergence(batch.advice.logits, logits).mean()
    return {
        "kl": 5 / 6 * adversarial,
        "kl_clean": 1 / 6 * losses.kl_divergence(batch.advice.logits, clean).mean(),
    }


BASES: dict[str, Callable[[Recipe, Batch, Tensor], dict[str, Tensor]]] = {
    "ce": ce,
    "trades": trades,
    "mart": mart,
    "alp": alp,
    "hat": hat,
    "rslad": rslad,
}
"""The terms by the name that a recipe's ``base`` has."""
