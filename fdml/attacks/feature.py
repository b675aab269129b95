"""Attacks in feature space, aimed at a defence that shapes its features, as FDML does.

Both look at a model's taps: ``feature`` drives an image towards the features of an image of another class, ``metric``
reverses the metric term of the training loss. Guides are images of known classes, a few dozen of each, that the model
saw in training or might have seen. They are an argument, so that no image's outcome depends on the rest of its batch.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fdml.attacks.objective import CHUNK, Best, Objective, answer, check, objective_of
from fdml.errors import InputError, unknown
from fdml.inference import inference
from fdml.losses import Labels, Logits, margin
from fdml.randomness import Generator, take
from fdml.threat import Images, Threat


@runtime_checkable
class Seen(Protocol):
    """What a model sees: ``logits`` (b, classes) and named features, in order of depth, each (b, …)."""

    @property
    def logits(self) -> Tensor: ...
    @property
    def taps(self) -> Mapping[str, Tensor]: ...


@runtime_checkable
class Tapped(Protocol):
    """A model that shows its features: ``model(x)`` are the logits of ``model.outputs(x)``."""

    def __call__(self, x: Tensor, /) -> Tensor: ...
    def outputs(self, x: Tensor, /) -> Seen: ...


Taps = dict[str, Tensor]
Aim = Callable[[Seen, Tensor, Taps], Tensor]
"""What is seen, the labels and a goal for each image, to the value (b,) to ascend."""


def feature(
    model: Tapped,
    x: Images,
    y: Labels,
    threat: Threat,
    *,
    guides: Float[Tensor, "n c h w"],
    guide_y: Int[Tensor, " n"],
    layer: str | None = None,
    targets: int = 3,
    steps: int = 50,
    step_size: float | None = None,
    mix: str | Objective | None = None,
    weight: float = 1.0,
    generator: Generator = None,
) -> Images:
    """Drives the features of x' towards those of an image of another class (after Sabour et al. 2016).

    Ascends ``weight`` · cos(tap(x'), tap(guide)), a tap taken as one vector: that of ``layer``, or the mean over all;
    ``mix`` (``ce``, ``dlr``, …) is added. An image tries, each from a random start, the guides that are nearest to it
    in the last tap, one of each of ``targets`` other classes; guides that the model answers wrongly come last.

    The step is ``step_size`` (pixel units of the norm, default 2 eps) and falls to 0 along half a cosine. An image is
    left alone once it is fooled; one that never is comes back at the point of largest margin, ``x`` included.

    Raises ``InputError`` for a model without ``outputs``, an unknown layer or mix, steps or targets below 1, a negative
    step size, and guides that hold no class other than an image's.
    """
    if targets < 1:
        raise InputError(f"targets must be at least 1, got {targets}")
    check(x, y)
    with inference(model):
        clean, known = _both(model, x, y, guides, guide_y)
        layers = clean.layers(layer)
        chosen = _nearest(clean, known, targets)

        def goals(rows: Tensor, attempt: int) -> Taps:
            with torch.no_grad():
                parts = [model.outputs(part).taps for part in guides[chosen[rows, attempt]].split(CHUNK)]
            return {name: F.normalize(torch.cat([_line(taps[name]) for taps in parts]), eps=1e-6) for name in layers}

        def near(seen: Seen, _y: Tensor, goal: Taps) -> Tensor:
            return torch.stack([_cosine(seen.taps[name], goal[name]) for name in layers]).mean(0)

        aim, attempts = _mixed(near, mix, weight), chosen.shape[1]
        return _attack(model, x, clean, threat, aim, goals, attempts, steps, step_size, generator)


def metric(
    model: Tapped,
    x: Images,
    y: Labels,
    threat: Threat,
    *,
    guides: Float[Tensor, "n c h w"],
    guide_y: Int[Tensor, " n"],
    layer: str | None = None,
    restarts: int = 1,
    steps: int = 50,
    step_size: float | None = None,
    mix: str | Objective | None = None,
    weight: float = 1.0,
    generator: Generator = None,
) -> Images:
    """Ascends the metric term that FDML descends: ``weight`` · (d(a, p) − d(a, n)).

    d is 1 − cos of pooled features, a is x', p the clean image, and n the guide nearest to x' among those of the
    confused class, the wrong class of largest logit at x'; it is found anew at every step. Guides of another class
    stand in for a class that has none, and guides that the model answers wrongly come last. The term is that of
    ``layer``, by default the last tap, where FDML has it; ``mix`` is added. Steps and result as in ``feature``.

    Raises ``InputError`` as ``feature`` does.
    """
    if restarts < 1:
        raise InputError(f"restarts must be at least 1, got {restarts}")
    check(x, y)
    with inference(model):
        clean, known = _both(model, x, y, guides, guide_y)
        name = list(clean.taps)[-1] if layer is None else clean.layers(layer)[0]

        def goals(rows: Tensor, _attempt: int) -> Taps:
            return {name: clean.taps[name][rows]}

        def apart(seen: Seen, y: Tensor, goal: Taps) -> Tensor:
            anchor = _unit(seen.taps[name])
            similar = anchor @ known.taps[name].T
            confused = seen.logits.detach().scatter(1, y[:, None], -math.inf).argmax(1)
            ranked = similar.detach() - known.doubt - 2 * _SURELY * (known.y != confused[:, None])
            nearest = ranked.masked_fill(known.y == y[:, None], -math.inf).argmax(1)
            return similar.gather(1, nearest[:, None]).squeeze(1) - (anchor * goal[name]).sum(1)

        aim = _mixed(apart, mix, weight)
        return _attack(model, x, clean, threat, aim, goals, restarts, steps, step_size, generator)


def feature_attacks(
    taps: Iterable[str], guides: Float[Tensor, "n c h w"], guide_y: Int[Tensor, " n"], **options: object
) -> dict[str, partial[Images]]:
    """The attacks of this module by name, for a model with these taps; ``options`` (``steps``, …) are common to all."""
    towards = partial(feature, guides=guides, guide_y=guide_y, **options)
    apart = partial(metric, guides=guides, guide_y=guide_y, **options)
    return {
        "feature-all": towards,
        **{f"feature-{name}": partial(towards, layer=name) for name in taps},
        "feature+ce": partial(towards, mix="ce"),
        "feature+dlr": partial(towards, mix="dlr"),
        "metric": apart,
        "metric+ce": partial(apart, mix="ce"),
        "metric+dlr": partial(apart, mix="dlr"),
    }


_SURELY = 4.0
"""More than two cosines can differ by."""


class _Known(NamedTuple):
    """Images as they are, seen once: the margin of each answer, and every tap pooled and scaled to length 1."""

    y: Tensor
    margin: Tensor
    taps: Taps

    @classmethod
    def of(cls, model: Tapped, x: Images, y: Labels) -> "_Known":
        with torch.no_grad():
            parts = [model.outputs(part) for part in x.split(CHUNK)]
            logits = torch.cat([seen.logits for seen in parts])
            taps = {name: torch.cat([_unit(seen.taps[name]) for seen in parts]) for name in parts[0].taps}
            return cls(y, margin(logits, y), taps)

    @property
    def doubt(self) -> Tensor:
        """What puts a guide that is answered wrongly behind every other."""
        return _SURELY * (self.margin > 0)

    def layers(self, layer: str | None) -> list[str]:
        if layer is not None and layer not in self.taps:
            raise unknown("layer", layer, self.taps)
        return list(self.taps) if layer is None else [layer]


def _both(
    model: Tapped, x: Images, y: Labels, guides: Float[Tensor, "n c h w"], guide_y: Int[Tensor, " n"]
) -> tuple[_Known, _Known]:
    """The images to attack, and the guides."""
    if not isinstance(model, Tapped):
        raise InputError(f"attacks in feature space need a model with outputs(x), got {type(model).__name__}")
    if len(guides) != len(guide_y):
        raise InputError(f"guides and guide_y must be as many, got {len(guides)} and {len(guide_y)}")
    lonely = (guide_y == y[:, None]).all(1)
    if lonely.any():
        raise InputError(f"guides hold no class other than {int(y[lonely][0])}, the label of an image to attack")
    return _Known.of(model, x, y), _Known.of(model, guides, guide_y)


def _nearest(clean: _Known, guides: _Known, targets: int) -> Int[Tensor, "b targets"]:
    """The nearest guide of each of the nearest other classes; the first once more where there are too few classes."""
    last = list(clean.taps)[-1]
    similar = clean.taps[last] @ guides.taps[last].T - guides.doubt
    similar = similar.masked_fill(guides.y == clean.y[:, None], -math.inf)
    classes = guides.y.unique()
    best = [similar.masked_fill(guides.y != label, -math.inf).max(1) for label in classes]
    value, index = (torch.stack(found, 1) for found in zip(*best, strict=True))
    value, order = value.topk(min(targets, len(classes)), 1)
    index = index.gather(1, order)
    return torch.where(value.isneginf(), index[:, :1], index)


def _unit(tap: Tensor) -> Float[Tensor, "b d"]:
    """A tap pooled over its places, as a vector of length 1."""
    return F.normalize(tap.flatten(2).mean(2) if tap.ndim > 2 else tap, dim=1, eps=1e-6)


def _line(tap: Tensor) -> Float[Tensor, "b d"]:
    """A whole tap as one vector, channels last: a view where that is how it lies in memory."""
    return tap.movedim(1, -1).flatten(1)


def _cosine(tap: Tensor, goal: Float[Tensor, "b d"]) -> Tensor:
    """Of a tap and a line of length 1. By hand: the backward pass of ``cosine_similarity`` takes four times as long."""
    line = _line(tap)
    return (line * goal).sum(1) / line.square().sum(1).clamp(min=1e-12).sqrt()


def _mixed(aim: Aim, mix: str | Objective | None, weight: float) -> Aim:
    if mix is None:
        return aim
    objective = objective_of(mix)
    return lambda seen, y, goal: weight * aim(seen, y, goal) + objective(seen.logits, y)


def _attack(
    model: Tapped,
    x: Images,
    clean: _Known,
    threat: Threat,
    aim: Aim,
    goals: Callable[[Tensor, int], Taps],
    attempts: int,
    steps: int,
    step_size: float | None,
    generator: Generator,
) -> Images:
    """``goals`` gives the goals of some of the images, by their places in the batch, at each attempt."""
    step_size = 2 * threat.eps if step_size is None else step_size
    if steps < 1:
        raise InputError(f"steps must be at least 1, got {steps}")
    if not 0 <= step_size < float("inf"):
        raise InputError(f"step_size must be a finite number of at least 0, in pixel units, got {step_size}")
    best = Best(x)
    rows = torch.arange(len(x), device=x.device)
    best.see(rows, x, clean.margin)
    for attempt in range(attempts):
        rows = rows[best.value[rows] <= 0]
        if not len(rows):
            break
        left, origin, y, goal = rows, x[rows], clean.y[rows], goals(rows, attempt)
        x_adv = threat.random(origin, take(generator, rows))
        for step in range(steps):
            logits, grad = _look(model, x_adv, y, goal, aim)
            value = margin(logits, y)
            best.see(left, x_adv, value)
            size = step_size * (1 + math.cos(math.pi * step / steps)) / 2
            x_adv = threat.project(threat.ascend(x_adv, grad, size), origin)
            if bool((value > 0).any()):
                stands = value <= 0
                left, origin, y, x_adv = (tensor[stands] for tensor in (left, origin, y, x_adv))
                goal = {name: tap[stands] for name, tap in goal.items()}
                if not len(left):
                    break
        else:
            best.see(left, x_adv, margin(answer(model, x_adv), y))
    return best.x


def _look(model: Tapped, x: Images, y: Labels, goal: Taps, aim: Aim) -> tuple[Logits, Images]:
    """The logits and each image's own gradient of the aim."""
    if len(x) > CHUNK and x.device.type == "cpu":
        count = -(-len(x) // CHUNK)
        split = {name: tap.tensor_split(count) for name, tap in goal.items()}
        parts = [
            _look(model, part, labels, {name: taps[number] for name, taps in split.items()}, aim)
            for number, (part, labels) in enumerate(zip(x.tensor_split(count), y.tensor_split(count), strict=True))
        ]
        logits, grad = (torch.cat(found) for found in zip(*parts, strict=True))
        return logits, grad
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        seen = model.outputs(x)
        (grad,) = torch.autograd.grad(aim(seen, y, goal).sum(), x)
    return seen.logits.detach(), grad
