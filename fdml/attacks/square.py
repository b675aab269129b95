"""Square Attack: random search with square-shaped changes, by queries alone (Andriushchenko et al. 2020)."""

import math
from bisect import bisect_left
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fdml.attacks.apgd_l1 import project_l1
from fdml.attacks.objective import Model, Objective, answer, check, objective_of
from fdml.errors import InputError
from fdml.inference import inference
from fdml.losses import Labels, PerImage, margin
from fdml.randomness import Generator, Streams, take, uniform
from fdml.threat import Images, Threat

# After each of these proposals the share of the image that a square covers is halved: the paper's schedule, as the
# reference package applies it to 5,000 of them.
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
_SCHEDULED = 5000

# Proposals whose random numbers are drawn at once: one call of the counter hash costs as much as ten small ones.
_BLOCK = 64


def square(
    model: Model,
    x: Images,
    y: Labels,
    threat: Threat,
    *,
    budget: int = 5000,
    p: float = 0.8,
    objective: str | Objective = "margin",
    restarts: int = 1,
    rescale: bool = True,
    generator: Generator = None,
    queries: Int[Tensor, " b"] | None = None,
) -> Images:
    """Square Attack (Andriushchenko et al. 2020, algorithms 1 to 3; for l1, Croce and Hein 2021, appendix).

    A restart, of the images not fooled yet, spends at most ``budget`` queries on each: the look at the clean image (in
    the first one), a start, and budget − 2 proposals. ``p`` is the share of the image that the first squares cover; it
    is halved by the schedule for 5,000 proposals, which ``rescale`` stretches or shrinks to the number there are. A
    proposal that changes nothing in an image is not shown to the model, because the answer is known. How often each
    image was shown is added to ``queries``.

    Returns the first misclassified point of an image, or else the one of largest objective; the image itself where it
    is misclassified already. With ``Streams`` each image has squares of its own. With a ``torch.Generator`` or None
    all images share them, drawn in the order and shapes of the reference package, autoattack: seeded alike, both take
    the same way at n_queries = budget − 2, since the reference counts neither the clean look nor the start.

    Raises ``InputError`` for a budget or restarts below 1, p outside (0, 1] and an unknown objective.
    """
    if budget < 1 or restarts < 1:
        raise InputError(f"budget and restarts must be at least 1, got budget={budget}, restarts={restarts}")
    if not 0 < p <= 1:
        raise InputError(f"p must be above 0 and at most 1, got {p}")
    ascends = objective_of(objective)
    proposals = budget - 2
    shares = [p / 2 ** _halvings(step, proposals if rescale else _SCHEDULED) for step in range(proposals)]
    x_adv = x.detach().clone(memory_format=torch.contiguous_format)
    check(x, y)
    with inference(model), torch.inference_mode():
        value, fooled = _judge(model, x, y, ascends)
        if queries is not None:
            queries += 1
        left = (~fooled).nonzero().squeeze(1)
        for _ in range(restarts if budget > 1 else 0):
            if not len(left):
                break
            end = _search(model, x[left], y[left], threat, shares, ascends, take(generator, left))
            better = end.fooled | (end.value > value[left])
            x_adv[left[better]] = end.x[better]
            value[left[better]] = end.value[better]
            if queries is not None:
                queries[left] += end.shown
            left = left[~end.fooled]
    return x_adv


class _End(NamedTuple):
    """Where a search ended: the point, its objective, whether it is misclassified, how often the image was shown."""

    x: Images
    value: PerImage
    fooled: Bool[Tensor, " b"]
    shown: Int[Tensor, " b"]

    def put(self, rows: Tensor, x: Tensor, value: Tensor, shown: Tensor) -> None:
        self.x[rows], self.value[rows], self.shown[rows] = x.view(-1, *self.x.shape[1:]), value, shown


def _search(
    model: Model, x: Images, y: Labels, threat: Threat, shares: list[float], ascends: Objective, generator: Generator
) -> _End:
    c, h, w = x.shape[1:]
    linf, apart = threat.norm == "linf", isinstance(generator, Streams)
    frames = {share: _Frame.of(share, x, threat.norm, apart) for share in set(shares)}
    propose = _level if linf else _bump
    # The random numbers of a proposal. linf: a corner, and a sign a channel. Else two corners, whether to transpose,
    # and signs that are each image's own in the reference too, which draws them for the images that stand then.
    common, own = (2 + c, 0) if linf else (5, c)
    block = _BLOCK if apart or not own else 1

    start = _stripes(x, threat, generator) if linf else _tiles(x, threat, generator)
    end = _End(start, *_judge(model, start, y, ascends), torch.ones_like(y))
    # From here on, all is of the images still standing, which are at `rows` of the batch.
    rows = (~end.fooled).nonzero().squeeze(1)
    x, y, best, value, shown = x.flatten(2)[rows], y[rows], start.flatten(2)[rows], end.value[rows], end.shown[rows]
    for begun in range(0, len(shares), block):
        if not len(rows):
            break
        ahead = [frames[share] for share in shares[begun : begun + block]]
        moves = _Moves.of(_draw(x, take(generator, rows), len(ahead), common, own), ahead, c)
        for step, frame in enumerate(ahead):
            moved, proposed = propose(x, best, moves.at(step), frame, threat)
            if not len(moved):
                continue
            shown[moved] += 1
            new_value, hit = _judge(model, proposed.unflatten(2, (h, w)), y.index_select(0, moved), ascends)
            better = ((new_value > value.index_select(0, moved)) | hit).nonzero().squeeze(1)
            if not len(better):
                continue
            accepted = moved[better]
            best[accepted], value[accepted] = proposed.index_select(0, better), new_value[better]
            if hit.any():
                end.fooled[rows[moved[hit]]] = True
                stands = ~end.fooled[rows]
                end.put(rows[~stands], best[~stands], value[~stands], shown[~stands])
                rows, x, y, best, value, shown = (each[stands] for each in (rows, x, y, best, value, shown))
                moves = moves.narrow(stands)
    end.put(rows, best, value, shown)
    return end


def _judge(model: Model, x: Images, y: Labels, ascends: Objective) -> tuple[PerImage, Bool[Tensor, " b"]]:
    """The objective, and which answers are wrong."""
    logits = answer(model, x)
    wrong = margin(logits, y)
    return wrong if ascends is margin else ascends(logits, y), wrong > 0


def _halvings(step: int, proposals: int) -> int:
    return bisect_left(_HALVINGS, step * _SCHEDULED // proposals)


def _draw(like: Tensor, generator: Generator, steps: int, common: int, own: int) -> Tensor:
    """Uniform numbers (steps, b, common + own), with ``Streams`` all of each image's own.

    Else in the order of the reference: in each step ``common`` numbers for all images together, then ``own`` for each.
    """
    b = len(like)
    if isinstance(generator, Streams):
        return uniform(like, generator, steps, common + own).transpose(0, 1)
    drawn = uniform(like[:1], generator, steps, common + b * own)[0]
    shared = drawn[:, None, :common].expand(steps, b, common)
    return torch.cat([shared, drawn[:, common:].view(steps, b, own)], 2) if own else shared


def _signs(numbers: Tensor) -> Tensor:
    return (numbers >= 0.5).to(numbers.dtype).mul_(2).sub_(1)


class _Frame(NamedTuple):
    """A square of one size, laid on an image whose pixels are counted row by row."""

    pixels: Int[Tensor, " s"]
    """How far each is from that of the corner."""
    room: tuple[int, int]
    """How many places the corner may take, down and across."""
    width: int
    bumps: Float[Tensor, "2 s"]
    """What is laid inside it (l2 and l1), as it is and transposed."""

    @classmethod
    def of(cls, share: float, x: Images, norm: str, whole: bool) -> "_Frame":
        """The square that covers ``share`` of the images ``x``. ``whole``: it may touch the last row and column, as in
        the paper; in the reference it does not."""
        h, w = x.shape[2:]
        side = max(round(math.sqrt(share * h * w)), 1)
        if norm != "linf":
            side = max(side, 3) // 2 * 2 + 1
        side = min(side, h, w)
        across = torch.arange(side, device=x.device)
        bumps = x.new_empty(2, 0) if norm == "linf" else _bumps(side, norm, x)
        return cls((across[:, None] * w + across).flatten(), (h - side + whole, w - side + whole), w, bumps)

    def at(self, corner: Int[Tensor, " b"], channels: int) -> Int[Tensor, "b c s"]:
        """The pixels of the square in each channel."""
        return (corner[:, None] + self.pixels)[:, None].expand(-1, channels, -1)


class _Moves(NamedTuple):
    """What random numbers choose for the proposals of a block, or of one step of it: then without the first dimension.

    Laid out a block at a time, because so many small operations at each step would cost as much as a forward pass.
    """

    corners: Int[Tensor, "steps b squares"]
    turned: Int[Tensor, "steps b"]
    """1 where the bump is transposed."""
    signs: Float[Tensor, "steps b c"]

    @classmethod
    def of(cls, numbers: Tensor, frames: list[_Frame], channels: int) -> "_Moves":
        places, signs = numbers[..., :-channels], _signs(numbers[..., -channels:])
        room = numbers.new_tensor([frame.room for frame in frames])[:, None, None]
        corner = (places[..., : places.shape[2] // 2 * 2].unflatten(2, (-1, 2)) * room).long()
        return cls(corner[..., 0] * frames[0].width + corner[..., 1], (places[..., -1] > 0.5).long(), signs)

    def at(self, step: int) -> "_Moves":
        return _Moves(self.corners[step], self.turned[step], self.signs[step])

    def narrow(self, index: Tensor) -> "_Moves":
        return _Moves(self.corners[:, index], self.turned[:, index], self.signs[:, index])


def _stripes(x: Images, threat: Threat, generator: Generator) -> Images:
    """The start for linf: vertical stripes of ±eps."""
    _, c, _, w = x.shape
    signs = _signs(_draw(x, generator, 1, 0, c * w)[0]).view(-1, c, 1, w)
    return torch.add(x, signs, alpha=threat.eps).clamp_(0, 1)


def _level(x: Tensor, best: Tensor, moves: _Moves, frame: _Frame, threat: Threat) -> tuple[Tensor, Tensor]:
    """For linf, a square of +eps or −eps in each channel: the images that it changes, and these as changed."""
    at = frame.at(moves.corners[:, 0], x.shape[1])
    new = x.gather(2, at).add_(moves.signs[:, :, None], alpha=threat.eps).clamp_(0, 1)
    moved = (new != best.gather(2, at)).any((1, 2)).nonzero().squeeze(1)
    return moved, best.scatter(2, at, new).index_select(0, moved)


def _tiles(x: Images, threat: Threat, generator: Generator) -> Images:
    """The start for l2 and l1: five by five bumps of random sign, or as many as a small image holds."""
    c, h, w = x.shape[1:]
    side = max(h // 5, 1)
    first = max((h - side * 5) // 2, 0)
    bumps = _bumps(side, threat.norm, x).unflatten(1, (side, side))
    corners = [(first + i * side, first + j * side) for i in range(h // side) for j in range(w // side)]
    delta = torch.zeros_like(x)
    for (top, left), numbers in zip(corners, _draw(x, generator, len(corners), 1, c), strict=True):
        if top < h and left < w:
            bump = bumps[(numbers[:, 0] > 0.5).long()][:, None] * _signs(numbers[:, 1:])[:, :, None, None]
            delta[:, :, top : top + side, left : left + side] = bump[:, :, : h - top, : w - left]
    return _within(x.flatten(2), delta.flatten(2), threat).view_as(x)


def _bump(x: Tensor, best: Tensor, moves: _Moves, frame: _Frame, threat: Threat) -> tuple[Tensor, Tensor]:
    """For l2 and l1, a bump in one square, of the size that a second one gives up and eps leaves; all images change."""
    c, norm, eps = x.shape[1], threat.norm, threat.eps
    first, second = frame.at(moves.corners[:, 0], c), frame.at(moves.corners[:, 1], c)
    delta = best - x
    whole = _size(delta.flatten(1), norm)[:, :, None]
    old = delta.gather(2, first)
    delta.scatter_(2, first, 0.0)
    given_up = _size(delta.gather(2, second), norm)
    delta.scatter_(2, second, 0.0)
    had = _size(old, norm)
    new = frame.bumps[moves.turned][:, None] * moves.signs[:, :, None] + old / (had + 1e-12)
    if norm == "l2":
        size = ((eps**2 - whole.square()).clamp_(min=0) / c + had.square() + given_up.square()).sqrt()
    else:
        size = (eps - whole).clamp_(min=0) + (had + given_up) * c
    delta.scatter_(2, first, new * (size / (_size(new, norm) + 1e-12)))
    return torch.arange(len(x), device=x.device), _within(x, delta, threat)


def _bumps(side: int, norm: str, like: Tensor) -> Float[Tensor, "2 s"]:
    """The paper's eta (equation 2), of size 1: two peaks of opposite signs, one above the other; and its transpose."""
    eta = torch.cat([_peak(side // 2, side, norm), -_peak(side - side // 2, side, norm)]).to(like)
    eta /= _size(eta.flatten(), norm)
    return torch.stack([eta.flatten(), eta.T.flatten()])


def _peak(height: int, width: int, norm: str) -> Tensor:
    """Rings about the centre, the k-th of which is the sum of 1/i² (l2) or 1/i⁴ (l1) over i from k outwards."""
    rings = max(height, width) // 2 + 1
    heights = torch.arange(1, rings + 1).float() ** (-2 if norm == "l2" else -4)
    down, across = ((torch.arange(side) - side // 2).abs() for side in (height, width))
    peak = heights.flip(0).cumsum(0).flip(0)[torch.maximum(down[:, None], across)]
    return peak / _size(peak.flatten(), norm)


def _size(values: Tensor, norm: str) -> Tensor:
    """The l2 or l1 norm over the last dimension, which is kept."""
    return values.abs().sum(-1, keepdim=True) if norm == "l1" else values.square().sum(-1, keepdim=True).sqrt()


def _within(x: Tensor, delta: Tensor, threat: Threat) -> Tensor:
    """x + delta brought to the sphere and clipped (l2), or to the nearest point of ball and box together (l1)."""
    if threat.norm == "l2":
        return (x + delta * (threat.eps / (_size(delta.flatten(1), "l2")[:, :, None] + 1e-12))).clamp_(0, 1)
    return project_l1((x + delta)[..., None], x[..., None], threat.eps).squeeze(3)
