"""HopSkipJump: a minimal-norm attack that sees labels alone (Chen, Jordan and Wainwright 2020)."""

import math
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fdml.attacks.objective import CHUNK, Model, answer, check
from fdml.errors import InputError
from fdml.inference import inference
from fdml.losses import Labels
from fdml.randomness import Generator, normal, take, uniform
from fdml.threat import Images, Threat

# Directions drawn at once: a constant, since an image's numbers must not depend on how many fit.
_DRAWN = 8

# Of the distance between two points; float32 tells no finer shares of it apart.
_FINEST = 2.0**-20


def hopskipjump(
    model: Model,
    x: Images,
    y: Labels,
    norm: str,
    *,
    budget: int = 5000,
    first: int = 100,
    gamma: float = 1.0,
    tries: int = 100,
    starts: Float[Tensor, "_ _ _ _"] | None = None,
    enough: float | None = None,
    generator: Generator = None,
    queries: Int[Tensor, " b"] | None = None,
) -> Images:
    """HopSkipJump (Chen et al. 2020, algorithm 2), of the model's answers the arg max alone. For linf and l2.

    It begins with the image's own one of ``starts`` (b, c, h, w) where that is misclassified, else with the first of
    ``tries`` images of uniform noise that is: every other one coarser than pixels, since a model may give one class to
    all noise of one grain. The t-th estimate of the boundary's normal takes ``first`` · √t queries; ``gamma`` scales
    how closely the boundary is looked for, and from how near. No image is shown more than ``budget`` times, the clean
    look included; how often each one was is added to ``queries``.

    Returns the nearest misclassified image found, in [0, 1], drawn away from the boundary by a thousandth of its
    distance; the image itself where none was found, and where it is misclassified already. An image is done once its
    perturbation is at most ``enough``.

    Raises ``InputError`` for another norm, a budget, first or tries below 1, a gamma of 0, a negative ``enough`` and
    ``starts`` of another shape.
    """
    if norm not in ("linf", "l2"):
        raise InputError(f"hopskipjump supports linf and l2, got {norm}")
    if min(budget, first, tries) < 1:
        raise InputError(f"budget, first and tries must be at least 1, got {budget}, {first} and {tries}")
    if not gamma > 0:
        raise InputError(f"gamma must be above 0, got {gamma}")
    if enough is not None and not enough >= 0:
        raise InputError(f"enough must be a distance of at least 0, got {enough}")
    if starts is not None and starts.shape != x.shape:
        raise InputError(f"starts must be one an image, {tuple(x.shape)}, got {tuple(starts.shape)}")
    x_adv = x.detach().clone()
    check(x, y)
    with inference(model), torch.inference_mode():
        # The last query is for the point that is returned.
        oracle = _Oracle(model, y, budget - 1)
        rows = (~oracle.wrong(torch.arange(len(x), device=x.device), x)).nonzero().squeeze(1)
        rows, point = _start(oracle, rows, x, starts, tries, generator)
        _approach(oracle, rows, x, x_adv, point, norm, first, gamma, enough, generator)
        _stand_off(oracle, rows, x, x_adv, norm, enough)
    if queries is not None:
        queries += oracle.asked
    return x_adv


@final
class _Oracle:
    """Says whether points are misclassified, and counts what it was asked about each image."""

    def __init__(self, model: Model, y: Labels, budget: int) -> None:
        self.model, self.y, self.budget = model, y, budget
        self.asked = torch.zeros_like(y)

    def wrong(self, rows: Int[Tensor, " n"], points: Images) -> Bool[Tensor, " n"]:
        """About points that belong to the images ``rows``, of which any may come several times."""
        self.asked.index_add_(0, rows, torch.ones_like(rows))
        if not len(rows):
            return torch.zeros_like(rows, dtype=torch.bool)
        return answer(self.model, points).argmax(1) != self.y[rows]

    def left(self, rows: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        return self.budget - self.asked[rows]


def _start(
    oracle: _Oracle, rows: Tensor, x: Images, starts: Images | None, tries: int, generator: Generator
) -> tuple[Int[Tensor, " n"], Float[Tensor, "n c h w"]]:
    """A misclassified point for each of the images ``rows`` for which one was found, and which these are."""
    c, h, w = x.shape[1:]
    point, found = x.clone(), torch.zeros_like(oracle.y, dtype=torch.bool)
    grains = max(int(math.log2(min(h, w))), 1)
    for attempt in range(tries if starts is None else tries + 1):
        rows = rows[~found[rows] & (oracle.left(rows) > 0)]
        if not len(rows):
            break
        if starts is not None and attempt == 0:
            point[rows] = starts[rows]
        else:
            # Every second attempt is the paper's, noise of single pixels; the others go through the coarser grains.
            grain = 2 ** (1 + attempt // 2 % grains) if attempt % 2 else 1
            noise = uniform(x[rows], take(generator, rows), c, -(-h // grain), -(-w // grain))
            point[rows] = F.interpolate(noise, scale_factor=float(grain))[:, :, :h, :w]
        found[rows] = oracle.wrong(rows, point[rows])
    rows = found.nonzero().squeeze(1)
    return rows, point[rows]


def _approach(
    oracle: _Oracle,
    rows: Tensor,
    clean: Images,
    x_adv: Images,
    point: Float[Tensor, "n c h w"],
    norm: str,
    first: int,
    gamma: float,
    enough: float | None,
    generator: Generator,
) -> None:
    """Algorithm 2 from a misclassified ``point`` for each of the images ``rows``; the nearest goes to ``x_adv``."""
    x = clean[rows]
    measure = Threat(norm, 0.0).distance
    # The paper's theta: the share of a distance up to which the boundary is looked for.
    numbers = x.shape[1:].numel()
    theta = gamma / numbers ** (1.5 if norm == "l2" else 2)
    halvings = math.ceil(-math.log2(min(max(theta, _FINEST), 0.5)))
    best = torch.full((len(x),), torch.inf, dtype=x.dtype, device=x.device)
    moved = torch.ones_like(rows, dtype=torch.bool)
    step = 0
    while True:
        at = moved.nonzero().squeeze(1)
        point[at] = _boundary(oracle, rows[at], x[at], point[at], norm, halvings)
        distance = measure(point, x)
        nearer = distance < best
        x_adv[rows[nearer]], best = point[nearer], best.minimum(distance)

        step += 1
        samples = (oracle.left(rows) - halvings - 1).clamp(max=int(first * math.sqrt(step)))
        on = (samples > 0) & (best > (enough or 0.0))
        if not on.any():
            return
        rows, x, point, best, distance, samples = (each[on] for each in (rows, x, point, best, distance, samples))
        looks_at = distance * theta * numbers ** (0.5 if norm == "l2" else 1)
        radius = looks_at if step > 1 else torch.full_like(distance, 0.1)
        normals = _normals(oracle, rows, point, radius, samples, norm, generator)
        point, moved = _jump(oracle, rows, point, normals, distance / math.sqrt(step), halvings, norm)


def _stand_off(oracle: _Oracle, rows: Tensor, x: Images, x_adv: Images, norm: str, enough: float | None) -> None:
    """Draws what was found away from the boundary, where rounding in other company would change its answer.

    By a thousandth of the distance, where that is misclassified too; but what is near enough stays so.
    """
    delta = x_adv[rows] - x[rows]
    share = torch.full_like(delta[:, 0, 0, 0], 1 + 1e-3)
    if enough is not None:
        near = Threat(norm, 0.0).distance(x_adv[rows], x[rows])
        share = torch.where(near <= enough, share.minimum(enough / near), share)
    shown = (x[rows] + share[:, None, None, None] * delta).clamp_(0, 1)
    wrong = oracle.wrong(rows, shown)
    x_adv[rows[wrong]] = shown[wrong]


def _boundary(oracle: _Oracle, rows: Tensor, x: Images, point: Images, norm: str, halvings: int) -> Images:
    """Misclassified points near the boundary on the way from ``x`` to ``point``, by halving (algorithm 1)."""
    delta = point - x
    reach = delta.abs().amax((1, 2, 3))
    low, high = torch.zeros_like(reach), torch.ones_like(reach)

    def between(share: Tensor) -> Images:
        if norm == "l2":
            return (x + share[:, None, None, None] * delta).clamp_(0, 1)
        cut = (share * reach)[:, None, None, None]
        return (x + delta.clamp(-cut, cut)).clamp_(0, 1)

    nearest = point
    for _ in range(halvings):
        on = oracle.left(rows) > 0
        middle = (low + high) / 2
        shown = between(middle)
        wrong = torch.zeros_like(on)
        wrong[on] = oracle.wrong(rows[on], shown[on])
        high, low = torch.where(wrong, middle, high), torch.where(wrong | ~on, low, middle)
        nearest = torch.where(wrong[:, None, None, None], shown, nearest)
    return nearest


def _normals(
    oracle: _Oracle, rows: Tensor, point: Images, radius: Tensor, samples: Tensor, norm: str, generator: Generator
) -> Images:
    """The direction across the boundary, from the side on which ``samples`` steps of length ``radius`` end: the mean of
    the directions, weighed by how far each vote is from the mean vote."""
    total, plain, balance = torch.zeros_like(point), torch.zeros_like(point), torch.zeros_like(radius)
    number = torch.arange(_DRAWN, device=rows.device)
    for part in torch.arange(len(rows), device=rows.device).split(CHUNK):
        for begun in range(0, int(samples[part].amax()), _DRAWN):
            live = part[samples[part] > begun]
            here, length = point[live][:, None], radius[live][:, None, None, None, None]
            shape = (_DRAWN, *point.shape[1:])
            if norm == "l2":
                u = normal(point[live], take(generator, rows[live]), *shape)
            else:
                u = uniform(point[live], take(generator, rows[live]), *shape).mul_(2).sub_(1)
            u /= u.square().sum((2, 3, 4), keepdim=True).sqrt_()
            shown = (here + length * u).clamp_(0, 1)
            used = number + begun < samples[live][:, None]
            wrong = oracle.wrong(rows[live][:, None].expand_as(used)[used], shown[used])
            vote = torch.zeros_like(used, dtype=u.dtype)
            vote[used] = torch.where(wrong, 1.0, -1.0).to(u.dtype)
            # As the box lets it step.
            u = (shown - here) / length
            total[live] += (vote[:, :, None, None, None] * u).sum(1)
            plain[live] += (used[:, :, None, None, None] * u).sum(1)
            balance[live] += vote.sum(1)
    centred = total - (balance / samples)[:, None, None, None] * plain
    return torch.where((balance.abs() < samples)[:, None, None, None], centred, total)


def _jump(
    oracle: _Oracle, rows: Tensor, point: Images, normals: Images, length: Tensor, reserve: int, norm: str
) -> tuple[Images, Tensor]:
    """The step along the normals, halved until it ends in misclassification; and for which images it did."""
    if norm == "linf":
        direction = normals.sign()
    else:
        direction = normals / normals.square().sum((1, 2, 3), keepdim=True).sqrt().clamp(min=1e-30)
    point, moved = point.clone(), torch.zeros_like(rows, dtype=torch.bool)
    for _ in range(20):
        at = (~moved & (oracle.left(rows) > reserve)).nonzero().squeeze(1)
        if not len(at):
            break
        shown = (point[at] + length[at][:, None, None, None] * direction[at]).clamp_(0, 1)
        wrong = oracle.wrong(rows[at], shown)
        point[at[wrong]] = shown[wrong]
        moved[at[wrong]] = True
        length = length / 2
    return point, moved
