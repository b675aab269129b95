"""What the label, or a teacher in its place, says to the student: the methods that are compared, as pure functions.

Each is given the student's answers to the adversarial images x' and to those that ``further`` names for it, so that
no method pays for a pass that it does not use. A term is a mean over the batch, at its weight.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from fdml import losses
from fdml.recipe import Recipe
from fdml.train_batch import TrainBatch

HELPER = 2.0
"""How far beyond x' HAT's helper images lie, in units of the perturbation."""

Taps = dict[str, Tensor]


@dataclass(frozen=True)
class Step:
    """One step as a method sees it: the batch, the student's ``logits`` and ``taps`` of x', and ``target``
    (b, classes), the distribution to learn.

    ``others`` are the student's logits and taps of the images of ``further``, in that order; ``peer`` gives the logits
    of the network that is trained beside it; ``gather`` the rows of all processes. ``names`` are those of the taps, the
    pooled features' last.
    """

    batch: TrainBatch
    logits: Tensor
    taps: Taps
    target: Tensor
    others: tuple[tuple[Tensor, Taps], ...]
    peer: Callable[[Tensor], Tensor]
    gather: Callable[[Tensor], Tensor]
    names: tuple[str, ...]


def further(recipe: Recipe, batch: TrainBatch) -> list[Tensor]:
    """The images, beside x', of which a recipe's base asks what the student makes."""
    x = batch.x
    if recipe.base == "hat":
        return [x + HELPER * (batch.x_adv - x), x]
    if recipe.base == "tla":
        return [_given(batch.beside)]
    if recipe.base == "agkd-bml":
        return [x, _given(batch.beside)]
    return [] if recipe.base == "ce" or (recipe.base == "lbgat" and not recipe.beta) else [x]


def ce(recipe: Recipe, step: Step) -> dict[str, Tensor]:
    """CE(S(x')) (Madry et al. 2018, eq. 2.1)."""
    return {"ce": F.cross_entropy(step.logits, step.target)}


def trades(recipe: Recipe, step: Step) -> dict[str, Tensor]:
    """CE(S(x)) + beta KL(S(x) ‖ S(x')) (Zhang et al. 2019, eq. 5)."""
    clean, _ = step.others[-1]
    drift = losses.kl_divergence(clean, step.logits)
    return {"ce": F.cross_entropy(clean, step.target), "kl": recipe.beta * drift.mean()}


def mart(recipe: Recipe, step: Step) -> dict[str, Tensor]:
    """BCE(S(x')) + beta KL(S(x) ‖ S(x')) · (1 − p_y(x)) (Wang et al. 2020, eq. 11)."""
    clean, _ = step.others[-1]
    bce = losses.boosted_cross_entropy(step.logits, step.batch.y).mean()
    return {"bce": bce, "kl": recipe.beta * _doubtful_drift(step, clean)}


def alp(recipe: Recipe, step: Step) -> dict[str, Tensor]:
    """Half CE(S(x)), half CE(S(x')), + beta · the mean square of S(x) − S(x') (Kannan et al. 2018, eq. 1)."""
    clean, _ = step.others[-1]
    both = (F.cross_entropy(clean, step.target) + F.cross_entropy(step.logits, step.target)) / 2
    return {"ce": both, "alp": recipe.beta * F.mse_loss(step.logits, clean)}


def hat(recipe: Recipe, step: Step) -> dict[str, Tensor]:
    """CE(S(x)) + beta KL(S(x) ‖ S(x')) + gamma CE(S(x + 2 (x' − x)), argmax T(x')) (Rade and Moosavi 2022, eq. 5)."""
    batch = step.batch
    assert batch.advice is not None
    assert batch.advice.adversarial is not None
    helper, _ = step.others[0]
    helped = F.cross_entropy(helper, batch.advice.adversarial.argmax(1))
    return trades(recipe, step) | {"helper": recipe.gamma * helped}


def rslad(recipe: Recipe, step: Step) -> dict[str, Tensor]:
    """5/6 KL(T(x) ‖ S(x')) + 1/6 KL(T(x) ‖ S(x)) (Zi et al. 2021, eq. 6), T robust; summed over the classes, where the
    published code has their mean."""
    assert step.batch.advice is not None
    answer = step.batch.advice.logits
    clean, _ = step.others[-1]
    return {
        "kl": 5 / 6 * losses.kl_divergence(answer, step.logits).mean(),
        "kl_clean": 1 / 6 * losses.kl_divergence(answer, clean).mean(),
    }


def tla(recipe: Recipe, step: Step) -> dict[str, Tensor]:
    """CE(S(x')) + gamma · (triplet(x', x + noise, n) + triplet(x', c, n)) on pooled features (Mao et al. 2019).

    The noise is uniform in the ball, c an image of the class, n the nearest of another class. The published code looks
    for c in the whole training set and for n among 500 images more; here both are images of the batch, through the
    same noise, so that one pass serves all three.
    """
    batch = step.batch
    assert batch.choice is not None
    _, taps = step.others[0]
    pooled = step.names[-1]
    anchor, own = step.taps[pooled], taps[pooled]
    everyone, labels = step.gather(own), step.gather(batch.y)
    chance = batch.choice[:, : len(labels)].masked_fill(labels != batch.y[:, None], -1.0)
    pairs = [
        losses.triplet(anchor, positive, everyone, batch.y, None, labels, margin=recipe.margin).loss
        for positive in (own, everyone[chance.argmax(1)])
    ]
    return ce(recipe, step) | {"triplet": recipe.gamma * (pairs[0] + pairs[1])}


def agkd_bml(recipe: Recipe, step: Step) -> dict[str, Tensor]:
    """CE(S(x')) − log(1 − max_{k≠y} p_k(x')) + beta KL(S(x) ‖ S(x')) · (1 − p_y(x)) + A(x', x) + A(b', b)
    + gamma · triplet(x', x, b') (Wang et al. 2021, with the terms of MART, as in the published code).

    x' is attacked towards the class c that x is most confused with; b is an image of c, b' the same attacked towards
    y; A is the distance between the student's attention map and the teacher's.
    """
    batch = step.batch
    assert batch.advice is not None
    assert batch.beside_advice is not None
    (clean, clean_taps), (_, backward) = step.others
    spatial, pooled = step.names[-2:]
    attention = losses.attention_distance(step.taps[spatial], batch.advice.taps[spatial])
    attention = attention + losses.attention_distance(backward[spatial], batch.beside_advice.taps[spatial])
    features = (seen[pooled] for seen in (step.taps, clean_taps, backward))
    return ce(recipe, step) | {
        "bce": losses.wrong_confidence(step.logits, batch.y).mean(),
        "kl": recipe.beta * _doubtful_drift(step, clean),
        "attention": attention,
        "triplet": recipe.gamma * losses.ranked(*features, margin=recipe.margin, norm_weight=3e-3).loss,
    }


def lbgat(recipe: Recipe, step: Step) -> dict[str, Tensor]:
    """The mean square of S(x') − T(x), + CE(T(x)), + beta KL(S(x) ‖ S(x')), T learning beside S (Cui et al. 2021)."""
    natural = step.peer(step.batch.x)
    found = {"mse": F.mse_loss(step.logits, natural), "ce": F.cross_entropy(natural, step.target)}
    if recipe.beta:
        clean, _ = step.others[-1]
        found["kl"] = recipe.beta * losses.kl_divergence(clean, step.logits).mean()
    return found


def _given(images: Tensor | None) -> Tensor:
    assert images is not None
    return images


def _doubtful_drift(step: Step, clean: Tensor) -> Tensor:
    """KL(S(x) ‖ S(x')), each image's by how much S(x) doubts its label."""
    doubt = 1 - clean.softmax(1).gather(1, step.batch.y[:, None]).squeeze(1)
    return (losses.kl_divergence(clean, step.logits) * doubt).mean()


BASES: dict[str, Callable[[Recipe, Step], dict[str, Tensor]]] = {
    "ce": ce,
    "trades": trades,
    "mart": mart,
    "alp": alp,
    "hat": hat,
    "rslad": rslad,
    "tla": tla,
    "agkd-bml": agkd_bml,
    "lbgat": lbgat,
}
"""The terms by the name that a recipe's ``base`` has."""
