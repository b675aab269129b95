"""One step's batch on its way to the student: augmented, its random numbers drawn, attacked, the teacher asked."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fdml.adversary import attack_start, draw_noise, inner_attack, most_confused, see_through
from fdml.data.augment import augment, cutmix
from fdml.data.dataset import Batch
from fdml.guidance import Advice, Teacher
from fdml.recipe import Recipe
from fdml.threat import Threat

Model = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class TrainBatch:
    """What the student learns from in one step: images ``x``, their adversarial ones ``x_adv`` (b, c, h, w; for clean
    training ``x`` itself), labels ``y`` (b,).

    ``label`` (b, classes) is the mixture where images were mixed, whose larger part has the label ``y``. ``beside`` are
    the images that a method looks at besides, ``beside_advice`` what the teacher says of the clean images they came
    from; ``choice`` (b, n), uniform in [0, 1), chooses among the n images of the batch.
    """

    x: Tensor
    x_adv: Tensor
    y: Tensor
    advice: Advice | None = None
    label: Tensor | None = None
    beside: Tensor | None = None
    beside_advice: Advice | None = None
    choice: Tensor | None = None


@dataclass(frozen=True)
class Drawn:
    """A batch with all its random numbers: the images ``x`` as augmented, their labels (``label`` as in ``TrainBatch``)
    and, where nothing changed them, places in the training set; where the attack starts, the noise that the student
    sees through (copies first), the move of the images beside, and the choice among images."""

    x: Tensor
    y: Tensor
    index: Tensor | None
    label: Tensor | None
    start: Tensor
    noise: Tensor | None
    move: Tensor | None
    choice: Tensor | None

    def take(self, rows: slice) -> "Drawn":
        """Some of the images, with what was drawn for them."""
        noise = None if self.noise is None else self.noise[:, rows]
        index, label, move, choice = (
            None if part is None else part[rows] for part in (self.index, self.label, self.move, self.choice)
        )
        return Drawn(self.x[rows], self.y[rows], index, label, self.start[rows], noise, move, choice)

    def split(self, parts: int) -> "list[Drawn]":
        """So many parts of one size, in order."""
        size = len(self.x) // parts
        return [self.take(slice(begin, begin + size)) for begin in range(0, len(self.x), size)]


def draw(recipe: Recipe, batch: Batch, classes: int, threat: Threat, generator: torch.Generator) -> Drawn:
    """Augments a batch and draws what the step needs: for the global batch, so that processes share one randomness."""
    x, y, label = augment(batch.x, recipe.augmentations, generator), batch.y, None
    if recipe.mixes:
        x, order, share = cutmix(x, generator)
        own, other = (F.one_hot(labels, classes).float() for labels in (y, y[order]))
        label = torch.lerp(other, own, share[:, None])
    index = None if recipe.augmentations or recipe.mixes else batch.index
    start, noise = attack_start(recipe, x, threat, generator), draw_noise(recipe, x, generator)
    move = choice = None
    if recipe.looks_beside:
        move = torch.empty_like(x).uniform_(-threat.eps, threat.eps, generator=generator)
        choice = torch.rand(len(x), recipe.batch_size, device=x.device, generator=generator)
    return Drawn(x, y, index, label, start, noise, move, choice)


def prepare(
    recipe: Recipe, model: Model, guide: Teacher | None, threat: Threat, drawn: Drawn, pool: tuple[Tensor, Tensor]
) -> TrainBatch:
    """Attacks the images with ``model`` as it is now, and asks the teacher. ``pool`` are the images and labels that a
    method's images beside are taken from."""
    x, y = _laid(drawn.x), drawn.y
    advice = guide.advise(x, drawn.index) if guide else None
    confused = most_confused(model, x, y) if recipe.looks_at_confused else None
    goal = confused if recipe.attack_target == "confused" else None
    label = y if drawn.label is None else drawn.label
    x_adv = inner_attack(recipe, model, x, _laid(drawn.start), label, threat, drawn.noise, advice, goal)
    if guide and advice:
        advice = guide.advise_beside(advice, x_adv)
    if drawn.noise is not None:
        x, x_adv, y, advice = see_through(drawn.noise, x, x_adv, y, advice)
    batch = TrainBatch(x, x_adv, y, advice, drawn.label, choice=drawn.choice)
    if drawn.move is None or drawn.choice is None:
        return batch
    if recipe.base == "tla":  # the clean image itself, moved
        return replace(batch, beside=threat.project(x + drawn.move, x))
    assert guide is not None
    assert confused is not None
    partner = _laid(_partner(pool, y, confused, drawn.choice))
    backward = inner_attack(recipe, model, partner, threat.project(partner + drawn.move, partner), y, threat, goal=y)
    return replace(batch, beside=backward, beside_advice=guide.advise(partner))


def _partner(pool: tuple[Tensor, Tensor], y: Tensor, confused: Tensor, choice: Tensor) -> Tensor:
    """For each image one of the pool that is of the class it is confused with; where the pool has none, of any class
    but its own."""
    images, labels = pool
    eligible = labels == confused[:, None]
    eligible = torch.where(eligible.any(1, keepdim=True), eligible, labels != y[:, None])
    return images[choice[:, : len(labels)].masked_fill(~eligible, -1.0).argmax(1)]


def _laid(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last)
