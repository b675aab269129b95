"""What the student minimises: the label's term, feature distillation and the metric term, each at its weight."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from fdml import losses
from fdml.bases import BASES, Step, Taps, further
from fdml.guidance import Guided
from fdml.interval import Interval, box, margins
from fdml.models import RobustModel
from fdml.recipe import Recipe
from fdml.train_batch import TrainBatch
from fdml.world import World

LOGS = ("active", "d_ap", "d_an")
"""Beside the losses: the share of triplets whose hinge is active, and the mean distances to positive and negative."""


Runner = Callable[..., tuple[Tensor, Taps]]
"""From images to logits (b, classes) and taps."""


@dataclass
class Terms:
    """The terms of one step's loss, weighted, and what to log beside them."""

    losses: dict[str, Tensor] = field(default_factory=dict)
    logs: dict[str, Tensor] = field(default_factory=dict)

    def total(self) -> Tensor:
        """The loss."""
        return torch.stack(list(self.losses.values())).sum()


def objective(
    recipe: Recipe,
    runner: Runner,
    guided: Guided,
    batch: TrainBatch,
    done: float,
    world: World,
) -> Terms:
    """The loss of one batch when the share ``done`` of training is behind.

    ``runner`` is ``guided``, perhaps inside DistributedDataParallel: every pass whose gradient is to be averaged over
    processes begins there.

    With S the student, T the teacher and r the weight of guidance: the terms of the recipe's base (``fdml.bases``),
    then + r · fd · mean_l (1 − cos(S_l(x'), T_l(x))) + r · ml · triplet(S(x'), positive, confused negative).
    With interval bounds: (1 − ibp) times all that + ibp · CE(the worst logits of the box), as MTL-IBP (De Palma et al.
    2024); the statistics of the batch that the bounds are normalised by are those of x' (Shi et al. 2021).
    """
    terms = Terms()
    x, x_adv, y, advice = batch.x, batch.x_adv, batch.y, batch.advice
    bounds = None
    beside = further(recipe, batch)
    if recipe.ibp:
        bounds, taps = runner(box(x_adv, x, box_eps(recipe, done)))
        assert isinstance(bounds, Interval)
        logits = bounds.nominal
        taps = {name: tap.nominal for name, tap in taps.items() if isinstance(tap, Interval)}
        others = [runner(images) for images in beside]
    elif recipe.one_pass:
        (logits, taps), *others = _together(runner, [x_adv, *beside])
    else:
        (logits, taps), *others = [runner(images) for images in (x_adv, *beside)]
    target = losses.soft_target(
        y if batch.label is None else batch.label,
        logits.shape[1],
        smoothing=recipe.label_smoothing,
        answer=advice.logits if advice else None,
        weight=recipe.answer,
        temperature=recipe.temperature,
    )
    names, pooled = guided.model.tap_names, guided.model.tap_names[-1]
    step = Step(
        batch, logits, taps, target, tuple(others), lambda images: runner(images, peer=True)[0], world.gather, names
    )
    terms.losses = BASES[recipe.base](recipe, step)

    weight = guidance_weight(recipe, done)
    # An adapter stays in the loss, at the weight 0: DistributedDataParallel waits for the gradient of every weight.
    guides = advice is not None and (weight > 0 or len(guided.adapters) > 0)
    if recipe.fd and advice and guides:
        distances = [losses.feature_distance(taps[layer], advice.taps[layer]) for layer in recipe.layers]
        terms.losses["fd"] = weight * recipe.fd * torch.stack(distances).mean()
    if recipe.ml and advice and guides:
        # Positives are features of clean images, the teacher's or the student's own; negatives are among these, or
        # among what the student makes of the other adversarial images.
        positive = advice.taps[pooled] if recipe.positive == "teacher" else _clean_features(guided.model, x)
        candidates = world.gather(positive if recipe.negative == "clean" else taps[pooled])
        confused = losses.most_confused(logits.detach(), y)
        found = losses.triplet(taps[pooled], positive, candidates, y, confused, world.gather(y), margin=recipe.margin)
        terms.losses["ml"] = weight * recipe.ml * found.loss
        terms.logs = {"active": found.active, "d_ap": found.d_ap, "d_an": found.d_an}
    if bounds is not None:
        rest = {name: (1 - recipe.ibp) * loss for name, loss in terms.losses.items()} if recipe.ibp < 1 else {}
        terms.losses = rest | {"ibp": recipe.ibp * F.cross_entropy(margins(bounds, y), y)}
    return terms


def box_eps(recipe: Recipe, done: float) -> float:
    """The radius of the box when the share ``done`` of training is behind: 0 at first, slowly growing, then in
    proportion, without a kink (Xu et al. 2020)."""
    passed = min(1.0, done / recipe.ibp_warmup) if recipe.ibp_warmup else 1.0
    slow = 0.25
    grown = passed**4 if passed < slow else slow**4 + 4 * slow**3 * (passed - slow)
    return recipe.attack_radius * recipe.eps * grown / (slow**4 + 4 * slow**3 * (1 - slow))


def guidance_weight(recipe: Recipe, done: float) -> float:
    """r(t): the share of their weight that the teacher's terms have when the share ``done`` of training is behind."""
    passed = min(1.0, done / recipe.guidance_until) if recipe.guidance_until else 1.0
    return {"ramp": passed, "fade": 1.0 - passed, "hold": 1.0}[recipe.guidance]


def _together(runner: Runner, kinds: list[Tensor]) -> list[tuple[Tensor, Taps]]:
    """What the runner makes of each kind of images, (b, c, h, w) each, in one pass over all."""
    if len(kinds) == 1:
        return [runner(kinds[0])]
    logits, taps = runner(torch.cat(kinds))
    parts = {name: tap.chunk(len(kinds)) for name, tap in taps.items()}
    return [
        (part, {name: part_taps[place] for name, part_taps in parts.items()})
        for place, part in enumerate(logits.chunk(len(kinds)))
    ]


def _clean_features(model: RobustModel, x: Tensor) -> Tensor:
    """Pooled features of clean images by the running statistics: in training mode a clean batch would make these a
    mixture that describes neither kind of image."""
    model.eval()
    try:
        return model.outputs(x).taps[model.tap_names[-1]]
    finally:
        model.train()
