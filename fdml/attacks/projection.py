"""The shortest way to a hyperplane inside [0, 1], in linf, l2 and l1: what a step of FAB is made of.

Each function takes points ``x`` in [0, 1] (…, d), normals ``w`` and gaps (…,), and gives the shortest move ``d`` with
w · (x + d) = w · x − gap and x + d in [0, 1], up to rounding. Where the box ends before the hyperplane, it gives the
move that closes as much of the gap as the box allows. Pixels of zero weight never move. ``w`` broadcasts over ``x``, so
that several points may share one normal.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

Points = Float[Tensor, "*b d"]
Normals = Float[Tensor, "*#b d"]
PerPoint = Float[Tensor, "*b"]

DUAL = {"linf": "l1", "l2": "l2", "l1": "linf"}
"""norm -> the norm of a gradient that turns a gap into a distance, by division."""


def length(move: Points, norm: str) -> PerPoint:
    """The norm of each move."""
    if norm == "linf":
        return move.abs().amax(-1)
    return move.abs().sum(-1) if norm == "l1" else move.square().sum(-1).sqrt()


def to_hyperplane_linf(x: Points, w: Normals, gap: PerPoint) -> Points:
    """Every pixel moves by the same amount, or as far as [0, 1] lets it."""
    size, sign = w.abs(), w.sign()
    room = _room(x, sign, gap)
    level = _level(room, size * room, size, gap.abs())
    return _moved(x, sign, level * gap.sign())


def to_hyperplane_l2(x: Points, w: Normals, gap: PerPoint) -> Points:
    """Every pixel moves in proportion to its weight, or as far as [0, 1] lets it."""
    # Squares of small weights vanish in float32.
    scale = w.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(w.dtype).tiny)
    w, gap = w / scale, gap / scale.squeeze(-1)
    size = w.abs()
    room = _room(x, w.sign(), gap)
    level = _level(room / size, size * room, size.square(), gap.abs())
    return _moved(x, w, level * gap.sign())


def to_hyperplane_l1(x: Points, w: Normals, gap: PerPoint) -> Points:
    """The pixels of largest weight move as far as [0, 1] lets them, the last one as far as is needed."""
    sign = w.sign()
    size, order = w.abs().sort(-1, descending=True)
    order = order.expand_as(x)
    room = _room(x, sign, gap).gather(-1, order)
    stock = size * room
    needed = (gap.abs()[..., None] - (stock.cumsum(-1) - stock)).clamp_(min=0)
    # A pixel of no weight needs 0 / 0 or infinity: fmin and the zero sign pass over both.
    moved = torch.fmin(needed / size, room)
    return torch.empty_like(moved).scatter_(-1, order, moved) * sign * -gap.sign()[..., None]


TO_HYPERPLANE: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "linf": to_hyperplane_linf,
    "l2": to_hyperplane_l2,
    "l1": to_hyperplane_l1,
}


# Masks are floats here: on a CPU, torch's operations with booleans take five to twenty times as long.


def _room(x: Tensor, sign: Tensor, gap: Tensor) -> Tensor:
    """How far each pixel may move in the direction that closes the gap: to 0 where the weight's sign is the gap's."""
    return (sign * -gap.sign()[..., None]).clamp_(min=0).sub_(x).abs_()


def _moved(x: Tensor, direction: Tensor, level: Tensor) -> Tensor:
    return (x - direction * level[..., None]).clamp_(0, 1).sub_(x)


def _level(until: Tensor, stock: Tensor, rate: Tensor, gap: Tensor) -> Tensor:
    """The least t of at least 0 with Σ min(rate · t, stock) = gap, where stock = rate · until; (…,).

    The sum is concave and piecewise linear in t: Newton's method from the left never overshoots, and ends on the very
    piece that holds the solution after a handful of steps. Sorting the ends of the pieces, as the published
    implementation does, costs several times as much. The dtype's largest number where all of the stock is too little.
    """
    most = torch.finfo(gap.dtype).max
    level = torch.zeros_like(gap)
    mask, product = torch.empty_like(until), torch.empty_like(until)
    while True:
        torch.le(until, level[..., None], out=mask)
        left = gap - torch.mul(mask, stock, out=product).sum(-1)
        torch.gt(until, level[..., None], out=mask)
        free = torch.mul(mask, rate, out=product).sum(-1)
        # No piece left: 0 / 0, which fmax passes over, or infinity.
        higher = torch.fmax(level, left / free).clamp_(max=most)
        if torch.equal(higher, level):
            return level
        level = higher
