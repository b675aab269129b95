"""The search for counter-examples, and their confirmation by the ONNX model itself."""

import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fdml.certify.property import Clause, Property

ROWS = 128  # points that climb together
SMALL = torch.finfo(torch.float32).tiny


class Runner(Protocol):
    """The model itself: ``OnnxRunner``, or whatever else answers rows (b, n) with rows (b, m), float32."""

    def run(self, x: np.ndarray) -> np.ndarray: ...


def search(
    network: Callable[[Tensor], Tensor],
    prop: Property,
    *,
    steps: int = 100,
    restarts: int = 30,
    seed: int = 0,
    deadline: float | None = None,
    starts: Tensor | None = None,
) -> Iterator[Tensor]:
    """Points (k, n) of the region, float32, that ``network`` puts into a clause: candidates for ``confirm``.

    Projected gradient ascent towards each clause from each start: the objective is the smallest of the clause's rows.
    The starts are ``starts`` (s, n), then ``restarts`` of our own: the centre, corners and random points. ``network``
    takes (b, n) to (b, m), float32 and differentiable. Ends when every start has had its ``steps``, or at ``deadline``
    on the clock of ``time.monotonic``. The points depend on ``seed``, not on the time.
    """
    if not prop.clauses:
        return
    box = inside(prop)
    weight, offset = _stacked(prop.clauses)
    generator = torch.Generator().manual_seed(seed)
    points = _starts(prop, box, restarts, generator, starts)
    # Where the gradient of an objective leads nowhere, other directions of the outputs lead away.
    towards = torch.randn(len(points), weight.shape[2], generator=generator).to(points)
    told = len(points) - restarts
    # The first starts of all clauses come before the later starts of any.
    for pairs in torch.arange(len(points) * len(prop.clauses), device=points.device).split(ROWS):
        goal, start = pairs % len(prop.clauses), pairs // len(prop.clauses)
        x, odd = points[start], (start % 2 == 1)[:, None]

        def objective(x: Tensor, goal: Tensor = goal) -> Tensor:
            return (torch.einsum("brm,bm->br", weight[goal], network(x)) + offset[goal]).amin(1)

        if (spread := (start > told) & (start % 4 > 1)).any():
            x[spread] = _spread(network, x[spread], towards[start[spread]], prop, box, deadline)
        yield from _climb(objective, x, odd, prop, box, steps, deadline)
        if deadline is not None and time.monotonic() >= deadline:
            return


def confirm(runner: Runner, prop: Property, candidates: Tensor) -> tuple[np.ndarray, np.ndarray] | None:
    """A counter-example (x, y), float32 (n,) and (m,), or None if no candidate of (k, n) is one.

    The candidates are first moved to the nearest float32 points inside the region. y is what the ONNX model gives for x
    alone; that x is in the region (``inside``) and y in a clause is checked without any tolerance (rows in exact
    arithmetic, the radius in float64 rounded up). Of several the one deepest inside its clause is returned.
    """
    if not len(candidates):
        return None
    box = inside(prop)
    points = _into(candidates.detach().to(box[0].device), prop, box)
    points = points[_contains(prop, points, box)].cpu()
    depth = _depth(prop.clauses, runner.run(points.numpy()))
    for index in np.argsort(-depth, kind="stable"):
        if depth[index] < 0:
            break
        x = points[index].numpy()
        y = runner.run(x[None])[0]
        if np.isfinite(y).all() and any(_holds(clause, y) for clause in prop.clauses):
            return x, y
    return None


def inside(prop: Property) -> tuple[Tensor, Tensor]:
    """The box's bounds rounded inward to float32, (n,) each.

    An input with no float32 between its bounds (a decimal that a property file gives it as its only value) has the
    nearest one: the network takes float32, so it is the value that is meant.
    """
    lower, upper = prop.lower.float(), prop.upper.float()
    infinity = torch.full_like(lower, torch.inf)
    lower = torch.where(lower.double() < prop.lower, lower.nextafter(infinity), lower)
    upper = torch.where(upper.double() > prop.upper, upper.nextafter(-infinity), upper)
    narrow, nearest = lower > upper, ((prop.lower + prop.upper) / 2).float()
    return torch.where(narrow, nearest, lower), torch.where(narrow, nearest, upper)


def _climb(
    objective: Callable[[Tensor], Tensor],
    x: Tensor,
    plain: Tensor,
    prop: Property,
    box: tuple[Tensor, Tensor],
    steps: int,
    deadline: float | None,
) -> Iterator[Tensor]:
    """Ascends from each row of ``x``; yields rows when they first reach 0, and at the end the best of those.

    Steps are signs, which suit many inputs, or where ``plain`` (b, 1) the gradient itself, which suits few; in a ball
    all are gradients. They carry momentum and shrink to 0.
    """
    best, top = torch.full((len(x),), -torch.inf, device=x.device), x
    velocity = torch.zeros_like(x)
    for step in range(steps + 1):
        value, gradient = _slope(objective, x)
        better = value > best
        if (new := better & (value >= 0) & (best < 0)).any():
            yield x[new]
        best, top = torch.where(better, value, best), torch.where(better[:, None], x, top)
        if step == steps or (deadline is not None and time.monotonic() >= deadline):
            break
        velocity = 0.75 * velocity + gradient / gradient.abs().sum(1, keepdim=True).clamp_min(SMALL)
        x = _step(x, velocity, 0.5 * (1 - step / steps), plain, prop, box)
    if (found := best >= 0).any():
        yield top[found]


def _spread(
    network: Callable[[Tensor], Tensor],
    x: Tensor,
    towards: Tensor,
    prop: Property,
    box: tuple[Tensor, Tensor],
    deadline: float | None,
) -> Tensor:
    """Starts moved towards random directions of the outputs (b, m): Tashiro et al. 2020, equation 3."""
    for _ in range(10):
        if deadline is not None and time.monotonic() >= deadline:
            break
        _, gradient = _slope(lambda x: (network(x) * towards).sum(1), x)
        x = _step(x, gradient, 1.0, torch.zeros_like(x[:, :1], dtype=torch.bool), prop, box)
    return x


def _slope(objective: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        value = objective(x)
        (gradient,) = torch.autograd.grad(value.sum(), x)
    return value.detach(), gradient


def _step(
    x: Tensor, direction: Tensor, size: float, plain: Tensor, prop: Property, box: tuple[Tensor, Tensor]
) -> Tensor:
    """A step of ``size`` half-widths of the box, or radii of the ball, and back into the region."""
    if prop.radius is not None:
        direction = prop.radius * direction / direction.norm(dim=1, keepdim=True).clamp_min(SMALL)
    else:
        half = (box[1] - box[0]) / 2
        scaled = direction * half
        scaled = scaled / scaled.abs().amax(1, keepdim=True).clamp_min(SMALL)
        direction = half * torch.where(plain, scaled, direction.sign())
    return _into(x + size * direction, prop, box)


def _starts(
    prop: Property, box: tuple[Tensor, Tensor], restarts: int, generator: torch.Generator, given: Tensor | None
) -> Tensor:
    """``given``, the centre, then random points and corners in turn, all in the region."""
    lower, upper = box
    share = torch.rand(restarts, len(lower), generator=generator)
    share[2::2] = share[2::2].round()
    share[:1] = 0.5
    points = lower + share.to(lower.device) * (upper - lower)
    if given is not None:
        points = torch.cat([given.detach().to(points), points])
    return _into(points, prop, box)


def _stacked(clauses: tuple[Clause, ...]) -> tuple[Tensor, Tensor]:
    """Weights (clauses, r, m) and offsets (clauses, r), float32; clauses of fewer rows get rows that always hold."""
    most = max(len(clause.offset) for clause in clauses)
    first = clauses[0].weight
    weight = first.new_zeros(len(clauses), most, first.shape[1], dtype=torch.float32)
    offset = first.new_full((len(clauses), most), torch.inf, dtype=torch.float32)
    for index, clause in enumerate(clauses):
        weight[index, : len(clause.offset)] = clause.weight
        offset[index, : len(clause.offset)] = clause.offset
    return weight, offset


def _into(x: Tensor, prop: Property, box: tuple[Tensor, Tensor]) -> Tensor:
    """The rows of ``x`` as float32 points of the region."""
    if prop.radius is not None:
        assert prop.center is not None
        away = x.double() - prop.center
        # The millionth keeps the rounding to float32 from leaving the ball.
        scale = (1 - 1e-6) * prop.radius / away.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        x = torch.where(scale < 1, prop.center + scale * away, x.double())
    return torch.minimum(torch.maximum(x.float(), box[0]), box[1])


def _contains(prop: Property, x: Tensor, box: tuple[Tensor, Tensor]) -> Tensor:
    """Which rows of the float32 ``x`` are finite and in the region, (k,); ``box`` is what is ``inside`` of it."""
    exact = x.double()
    found = ((x >= box[0]) & (x <= box[1])).all(1)
    if prop.radius is not None:
        assert prop.center is not None
        # The relative error of a float64 norm of n terms is far below this factor.
        found &= (exact - prop.center).norm(dim=1) * (1 + 1e-12) <= prop.radius
    return found


def _depth(clauses: tuple[Clause, ...], y: np.ndarray) -> np.ndarray:
    """How far inside its best clause each row of ``y`` is, (k,): negative outside, −inf where it is not finite."""
    exact = y.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        depths = [
            (exact @ clause.weight.cpu().numpy().T + clause.offset.cpu().numpy()).min(1, initial=np.inf)
            for clause in clauses
        ]
    return np.where(np.isfinite(exact).all(1), np.max(depths, axis=0), -np.inf)


def _holds(clause: Clause, y: np.ndarray) -> bool:
    """Whether the clause holds at y (m,), in exact arithmetic."""
    for weights, offset in zip(clause.weight.tolist(), clause.offset.tolist(), strict=True):
        terms = (
            Fraction(weight) * Fraction(value) for weight, value in zip(weights, y.tolist(), strict=True) if weight
        )
        if sum(terms, Fraction(offset)) < 0:
            return False
    return True
