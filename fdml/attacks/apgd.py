"""Auto-PGD, untargeted and targeted (Croce and Hein 2020); what l1 changes is in ``apgd_l1``."""

import dataclasses
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fdml.attacks.apgd_l1 import climb_l1
from fdml.attacks.objective import Best, Model, Objective, answer, check, look, objective_of
from fdml.errors import InputError, unknown
from fdml.inference import inference
from fdml.losses import Labels, PerImage, cross_entropy, margin, targeted_dlr
from fdml.randomness import Generator, Streams, normal, take, uniform
from fdml.threat import Images, Threat


def apgd(
    model: Model,
    x: Images,
    y: Labels,
    threat: Threat,
    *,
    steps: int = 100,
    restarts: int = 1,
    objective: str | Objective = "ce",
    start: Images | None = None,
    keep: str = "first",
    wide: bool = True,
    generator: Generator = None,
) -> Images:
    """Momentum, and a step that halves where the objective stops growing (Croce and Hein 2020, algorithm 1).

    Constants are the paper's: first step 2 eps, momentum 0.75, rho 0.75, checkpoints at 22% of the steps and then at
    intervals shrinking by 3% down to 6%. ``keep="first"`` lets an image go once it is fooled; one that never is comes
    back at its point of largest margin. ``keep="best"`` goes on, for the largest margin of all points visited.
    ``start`` replaces the random start of the first restart.

    In l1 the steps are sparse (Croce and Hein 2021), and ``wide`` spends 60% of them in balls of 3 and 2 eps first, as
    the published standard evaluation does; ``wide=False`` stays in the ball of eps throughout. Other norms ignore it.

    Raises ``InputError`` for steps or restarts below 1 and an unknown objective or keep.
    """
    _check(steps, restarts)
    if keep not in ("first", "best"):
        raise unknown("keep", keep, ("first", "best"))
    ascends = objective_of(objective)
    climb = partial(climb_l1, wide=wide) if threat.norm == "l1" else _climb
    check(x, y)
    with inference(model):
        best = Best(x)
        rows = torch.arange(len(x), device=x.device)
        for restart in range(restarts):
            if restart:
                rows = (best.value <= 0).nonzero().squeeze(1)
            if not len(rows):
                break
            begin = start
            if begin is None or restart:
                begin = _start(x[rows], threat, take(generator, rows))
            best.see(rows, *climb(model, begin, x[rows], y[rows], y[rows], threat, steps, ascends, keep == "first"))
    return best.x


def apgd_targeted(
    model: Model,
    x: Images,
    y: Labels,
    threat: Threat,
    *,
    steps: int = 100,
    restarts: int = 1,
    targets: int = 9,
    objective: str = "dlr",
    wide: bool = True,
    generator: Generator = None,
) -> Images:
    """APGD towards each of the ``targets`` classes that the model finds likeliest after y (Croce and Hein 2020, 4.2).

    ``objective`` is ``dlr`` (their targeted loss, section 4.1) or ``ce``. An image leaves once any target fooled it.
    With ``Streams`` all targets but the likeliest are attacked in one batch; any other generator draws in the order of
    the published code, target after target. ``wide`` is as in ``apgd``.

    Raises ``InputError`` for steps, restarts or targets below 1 and an unknown objective.
    """
    _check(steps, restarts)
    if targets < 1:
        raise InputError(f"targets must be at least 1, got {targets}")
    if objective not in TARGETED:
        raise unknown("targeted objective", objective, TARGETED)
    climb = partial(climb_l1, wide=wide) if threat.norm == "l1" else _climb
    check(x, y)
    with inference(model):
        clean = answer(model, x)
        # In the order of the logits, as the published code has it: y is the first where the model is right.
        likely = clean.scatter(1, y[:, None], torch.inf).argsort(1, descending=True)[:, 1 : targets + 1]
        count = likely.shape[1]
        together = isinstance(generator, Streams)
        groups = [[0], list(range(1, count))] if together else [[place] for place in range(count)]
        best = Best(x)
        for _ in range(restarts):
            for group in groups:
                rows = (best.value <= 0).nonzero().squeeze(1)
                for part in rows.split(_TOGETHER) if group and len(rows) else ():
                    images = part.repeat_interleave(len(group))
                    places = torch.tensor(group, device=x.device).repeat(len(part))
                    own = generator[part].fork(len(group)) if isinstance(generator, Streams) else generator
                    begin = _start(x[images], threat, own)
                    compared = torch.stack([y[images], likely[images, places]], 1)
                    aim, copies = TARGETED[objective], len(group)
                    found, value = climb(
                        model, begin, x[images], y[images], compared, threat, steps, aim, copies=copies
                    )
                    value, place = value.view(len(part), -1).max(1)
                    at = torch.arange(len(part), device=x.device)
                    best.see(part, found.view(len(part), -1, *x.shape[1:])[at, place], value)
    return best.x


def _targeted_dlr(logits: Tensor, y_and_target: Tensor) -> PerImage:
    return targeted_dlr(logits, y_and_target[:, 0], y_and_target[:, 1])


def _targeted_ce(logits: Tensor, y_and_target: Tensor) -> PerImage:
    return -cross_entropy(logits, y_and_target[:, 1])


TARGETED: dict[str, Objective] = {"dlr": _targeted_dlr, "ce": _targeted_ce}
"""What a targeted attack ascends; it is compared with (b, 2) pairs of the label and the target."""

_TOGETHER = 128
"""Images whose targets are attacked in one batch: what bounds the memory, and nothing else."""


def _check(steps: int, restarts: int) -> None:
    if steps < 1 or restarts < 1:
        raise InputError(f"steps and restarts must be at least 1, got steps={steps}, restarts={restarts}")


@dataclass
class _State:
    """One row for each image that is still attacked."""

    rows: Tensor
    x: Images
    y: Labels
    compared: Tensor
    x_adv: Images
    previous: Images
    value: PerImage
    grad: Images
    # The point of highest objective so far, from where a halved step goes on.
    top: Images
    top_value: PerImage
    top_grad: Images
    step: Tensor
    rises: PerImage
    value_at_check: PerImage
    halved: Tensor

    def keep(self, stays: Tensor) -> None:
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name)[stays])


def _climb(
    model: Model,
    start: Images,
    x: Images,
    y: Labels,
    compared: Tensor,
    threat: Threat,
    steps: int,
    ascends: Objective,
    leave: bool = True,
    copies: int = 1,
) -> tuple[Images, PerImage]:
    """One run: each image's point of largest margin, and the margin. ``leave``: the batch holds every image ``copies``
    times in a row, and all of them leave it once one is fooled."""
    interval = max(int(0.22 * steps), 1)
    shortest, shrink = max(int(0.06 * steps), 1), max(int(0.03 * steps), 1)
    rows = torch.arange(len(x), device=x.device)
    best = Best(start)
    logits, value, grad = look(model, start, compared, ascends)
    best.see(rows, start, margin(logits, y))
    s = _State(
        rows=rows,
        x=x,
        y=y,
        compared=compared,
        x_adv=start,
        previous=start,
        value=value,
        grad=grad,
        top=start.clone(),
        top_value=value.clone(),
        top_grad=grad.clone(),
        step=torch.full((len(x), 1, 1, 1), 2 * threat.eps, dtype=x.dtype, device=x.device),
        rises=torch.zeros_like(value),
        value_at_check=value.clone(),
        halved=torch.ones_like(value, dtype=torch.bool),
    )
    since_check = 0
    for index in range(steps):
        if leave:
            fooled = (best.value > 0).view(-1, copies).any(1)[s.rows // copies]
            if bool(fooled.any()):
                s.keep(~fooled)
            if not len(s.rows):
                break
        moved, s.previous = s.x_adv - s.previous, s.x_adv
        ahead = threat.project(s.x_adv + s.step * threat.ascend(torch.zeros_like(s.grad), s.grad, 1.0), s.x)
        mix = 0.75 if index else 1.0
        s.x_adv = threat.project(s.x_adv + mix * (ahead - s.x_adv) + (1 - mix) * moved, s.x)
        if index == steps - 1:
            best.see(s.rows, s.x_adv, margin(answer(model, s.x_adv), s.y))
            break
        last_value = s.value
        logits, s.value, s.grad = look(model, s.x_adv, s.compared, ascends)
        best.see(s.rows, s.x_adv, margin(logits, s.y))
        s.rises += s.value > last_value
        higher = s.value > s.top_value
        s.top[higher], s.top_grad[higher] = s.x_adv[higher], s.grad[higher]
        s.top_value = torch.maximum(s.top_value, s.value)
        since_check += 1
        if since_check == interval:
            stuck = ~s.halved & (s.value_at_check >= s.top_value)
            s.halved = (s.rises <= 0.75 * interval) | stuck
            s.value_at_check = s.top_value.clone()
            s.step[s.halved] /= 2
            halved = s.halved[:, None, None, None]
            s.x_adv, s.grad = torch.where(halved, s.top, s.x_adv), torch.where(halved, s.top_grad, s.grad)
            s.rises = torch.zeros_like(s.rises)
            since_check, interval = 0, max(interval - shrink, shortest)
    return best.x, best.value


def _start(x: Images, threat: Threat, generator: Generator) -> Images:
    """The reference's start: a random direction scaled to the boundary of the ball, clipped to [0, 1]; in l1, where
    ``climb_l1`` projects it, the whole of the noise."""
    if threat.norm == "linf":
        noise = 2 * uniform(x, generator, *x.shape[1:]) - 1
        scale = noise.abs().flatten(1).amax(1)
    else:
        noise = normal(x, generator, *x.shape[1:])
        if threat.norm == "l1":
            return x + noise
        scale = noise.flatten(1).norm(dim=1)
    return (x + threat.eps * noise / scale[:, None, None, None]).clamp_(0, 1)
