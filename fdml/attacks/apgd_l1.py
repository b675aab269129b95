"""What Auto-PGD does otherwise in the l1 norm: exact projection, sparse steps (Croce and Hein 2021, "Mind the box")."""

import dataclasses
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fdml.attacks.objective import Best, Model, Objective, answer, look
from fdml.losses import Labels, PerImage, margin
from fdml.threat import Images, Threat


def project_l1(x_adv: Images, x: Images, eps: float) -> Images:
    """The point nearest to ``x_adv``, by Euclidean distance, of all that are within eps of ``x`` in l1 and in [0, 1].

    Every pixel gives up the same amount of its move, and ends at the latest at 0 or 1. Clipping after a projection on
    the ball alone, as ``Threat.project`` does, wastes the part of eps that the clipping takes back. ``x`` is in [0, 1].
    """
    move = (x_adv - x).flatten(1)
    size, sign = move.abs(), move.sign()
    room = sign.clamp(min=0).sub_(x.flatten(1)).abs_()
    size = torch.minimum(size.sub(_level(size, size - room, eps)).clamp_(min=0), room)
    # The level is rounded, once for every pixel: what that leaves outside the ball goes by scale.
    size *= (eps / size.sum(1, keepdim=True).clamp(min=1e-12)).clamp(max=1)
    return (x + (sign * size).view_as(x)).clamp_(0, 1)


def _level(size: Float[Tensor, "b d"], over: Float[Tensor, "b d"], eps: float) -> Float[Tensor, "b 1"]:
    """The least t of at least 0 with Σ max(size − t, 0) − max(over − t, 0) <= eps, where over <= size.

    The sum falls with t and is piecewise linear: Newton's method, with bisection where that leaves the bracket, ends on
    the very piece that holds the solution. Sorting the ends of the pieces, as the published implementation does, takes
    several times as long.
    """
    ends = torch.stack([size, over], 1)
    low = level = torch.zeros_like(size[:, 0])
    high = size.amax(1)
    rounding = 4 * torch.finfo(size.dtype).eps
    while True:
        left = (ends - level[:, None, None]).clamp_(min=0)
        total, moving = left.sum(2), left.sign_().sum(2)
        excess = total[:, 0] - total[:, 1] - eps
        low, high = torch.where(excess > 0, level, low), torch.where(excess > 0, high, level)
        newton = level + excess / (moving[:, 0] - moving[:, 1])
        newton = torch.where((newton > low) & (newton < high), newton, (low + high) / 2)
        solved = (excess.abs() <= rounding * total[:, 0]) | (high - low <= rounding * high)
        if bool(solved.all()):
            return level[:, None]
        level = torch.where(solved, level, newton)


def climb_l1(
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
    *,
    wide: bool = True,
) -> tuple[Images, PerImage]:
    """One run, as ``apgd`` makes them: each image's point of largest margin, and the margin.

    ``leave``: the batch holds every image ``copies`` times in a row, and all of them leave it once one is fooled.
    ``wide``: 30% of the steps go in the ball of 3 eps and 30% in that of 2 eps; the next ball starts at the projection
    of the point where the objective was highest.
    """
    share = 3 * steps // 10 if wide else 0
    for eps in (3 * threat.eps, 2 * threat.eps) if share else ():
        _, start = _run(model, start, x, y, compared, eps, share, ascends)
    best, _ = _run(model, start, x, y, compared, threat.eps, steps - 2 * share, ascends, leave, copies)
    return best.x, best.value


@dataclass
class _State:
    """One row for each image that is still attacked."""

    rows: Tensor
    x: Images
    y: Labels
    compared: Tensor
    x_adv: Images
    grad: Images
    # The point of highest objective so far, from where a sparser step goes on.
    top: Images
    top_value: PerImage
    top_grad: Images
    step: Tensor
    # How many pixels share a step.
    count: Tensor
    # How many pixels of the top point had moved at the last checkpoint.
    moved: Tensor

    def keep(self, stays: Tensor) -> None:
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name)[stays])


def _run(
    model: Model,
    start: Images,
    x: Images,
    y: Labels,
    compared: Tensor,
    eps: float,
    steps: int,
    ascends: Objective,
    leave: bool = False,
    copies: int = 1,
) -> tuple[Best, Tensor]:
    """A run in one ball: the best points by margin, and the highest by objective of the images that did not leave.

    Constants are the published code's: the first step is eps, shared by a fifth of the pixels. Every 4% of the steps
    this becomes two thirds of the pixels that the highest point moved; where these are 5% fewer than at the last check,
    the image goes back there and to a step of eps, elsewhere the step shrinks by 1.5, down to eps / 10.
    """
    interval = max(int(0.04 * steps), 1)
    pixels = x.shape[1:].numel()
    start = project_l1(start, x, eps)
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
        grad=grad,
        top=start.clone(),
        top_value=value,
        top_grad=grad.clone(),
        step=torch.full((len(x), 1, 1, 1), eps, dtype=x.dtype, device=x.device),
        # In the smaller balls the published code asks for two thirds of the start's moved pixels, and counts those that
        # rounding moved: without them it would be too sparse, and weaker than this.
        count=torch.full_like(rows, -(-pixels // 5)),
        moved=torch.full_like(rows, pixels),
    )
    for index in range(1, steps + 1):
        if leave:
            fooled = (best.value > 0).view(-1, copies).any(1)[s.rows // copies]
            if bool(fooled.any()):
                s.keep(~fooled)
        if not len(s.rows):
            break
        s.x_adv = project_l1(s.x_adv + s.step * _direction(s.grad, s.count), s.x, eps)
        if index < steps:
            logits, value, s.grad = look(model, s.x_adv, s.compared, ascends)
        else:
            logits = answer(model, s.x_adv)
            value = ascends(logits, s.compared)
        best.see(s.rows, s.x_adv, margin(logits, s.y))
        higher = value > s.top_value
        s.top[higher], s.top_grad[higher] = s.x_adv[higher], s.grad[higher]
        s.top_value = torch.maximum(s.top_value, value)
        if index % interval == 0:
            moved = _moved(s.top, s.x)
            sparser = (moved < 0.95 * s.moved)[:, None, None, None]
            # Two thirds of two, rounded up, would stay two.
            s.count = torch.minimum((2 * moved + 2) // 3, moved - 1).clamp_(min=1)
            s.moved = moved
            s.step = torch.where(sparser, eps, (s.step / 1.5).clamp_(min=eps / 10))
            s.x_adv, s.grad = torch.where(sparser, s.top, s.x_adv), torch.where(sparser, s.top_grad, s.grad)
    return best, s.top


def _direction(grad: Images, count: Int[Tensor, " b"]) -> Images:
    """The signs of each image's ``count`` pixels of largest gradient, and as many more as tie, summing to 1."""
    size = grad.flatten(1).abs()
    least = size.topk(int(count.max()), dim=1).values.gather(1, count[:, None] - 1)
    signs = grad.flatten(1).sign() * (size >= least)
    return (signs / signs.abs().sum(1, keepdim=True).clamp_(min=1)).view_as(grad)


def _moved(x_adv: Images, x: Images) -> Int[Tensor, " b"]:
    """How many pixels moved, by more than a rounding."""
    return ((x_adv - x).abs() > 1e-6).flatten(1).sum(1)
