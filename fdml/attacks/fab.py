"""FAB: the nearest misclassified image, by a walk along the linearised decision boundary (Croce and Hein 2020)."""

import math
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fdml.attacks.objective import CHUNK, Model, answer, check
from fdml.attacks.projection import DUAL, TO_HYPERPLANE, length
from fdml.errors import InputError, unknown
from fdml.inference import inference
from fdml.losses import Labels, Logits, PerImage, margin
from fdml.randomness import Generator, normal, take, uniform
from fdml.threat import Images

Classes = Int[Tensor, "b k"]
"""Some classes for each image."""

ROWS = 512
"""Walks that go on at a time: a bound on memory."""

RADIUS = {"linf": 0.3, "l2": 1.0, "l1": 5.0}
"""norm -> the radius of random restarts where none is given: that of the published code."""


def fab(
    model: Model,
    x: Images,
    y: Labels,
    norm: str,
    *,
    steps: int = 100,
    restarts: int = 1,
    targeted: bool = True,
    targets: int = 9,
    eps: float | None = None,
    alpha_max: float = 0.1,
    eta: float = 1.05,
    beta: float = 0.9,
    search: int = 3,
    enough: float | None = None,
    forward: Model | None = None,
    generator: Generator = None,
) -> Images:
    """Fast adaptive boundary attack: "Minimally distorted adversarial examples…" (Croce and Hein 2020), algorithm 1.

    Each step projects the point it is at, and the image, on the linearised boundary inside [0, 1], and goes to a
    mixture of the two, overshot by ``eta``; from a misclassified point it falls back towards the image by ``beta``.
    ``targeted`` (FAB-T of AutoAttack) takes a walk to each of the ``targets`` most likely other classes, one gradient a
    step; otherwise each step heads for the nearest class, one gradient for every class. Each restart but the first
    begins at random, ``eps`` / 2 away (pixel units of the norm; default ``RADIUS``). ``search`` forward passes at the
    end, the paper's final search, look between each point found and its image; AutoAttack omits them (``search=0``).

    Returns the nearest misclassified image found, in [0, 1]; the image itself where none was, and where it is
    misclassified already. An image is done, at once, when its perturbation is at most ``enough``. ``forward`` gives
    the same logits as the model, faster, and serves where no gradient is needed.

    Raises ``InputError`` for an unknown norm, and for steps, restarts or targets below 1.
    """
    if norm not in TO_HYPERPLANE:
        raise unknown("norm", str(norm), TO_HYPERPLANE)
    if min(steps, restarts, targets) < 1:
        given = f"steps={steps}, restarts={restarts}, targets={targets}"
        raise InputError(f"steps, restarts and targets must be at least 1, got {given}")
    forward = model if forward is None else forward
    limit = 0.0 if enough is None else enough
    reach = (RADIUS[norm] if eps is None else eps) / 2
    walk = partial(_walk, model, forward, norm=norm, steps=steps, alpha_max=alpha_max, eta=eta, beta=beta, limit=limit)
    check(x, y)
    with inference(model), inference(forward), torch.no_grad():
        logits = answer(forward, x)
        best = x.clone()
        radius = x.new_zeros(len(x)).masked_fill_(logits.argmax(1) == y, torch.inf)
        for classes in _walks(likely(logits, y), targets if targeted else None):
            for restart in range(restarts):
                left = (radius > limit).nonzero().squeeze(1)
                if not len(left):
                    break
                for part in left.split(max(1, ROWS // classes.shape[1])):
                    start = x[part, None].expand(-1, classes.shape[1], -1, -1, -1)
                    if restart:
                        start = _around(start, norm, reach, take(generator, part))
                    found, distance = walk(start, x[part], y[part], classes[part])
                    nearer = distance < radius[part]
                    best[part[nearer]], radius[part[nearer]] = found[nearer], distance[nearer]
        left = ((radius > limit) & radius.isfinite()).nonzero().squeeze(1)
        if search and len(left):
            best[left] = tighten(forward, best[left], x[left], y[left], norm, search)
    return best


def likely(logits: Logits, y: Labels) -> Classes:
    """All classes but ``y``, the most likely first."""
    return logits.scatter(1, y[:, None], -torch.inf).argsort(1, descending=True)[:, :-1]


def nearest_boundary(
    model: Model, x: Images, y: Labels, classes: Classes, norm: str
) -> tuple[PerImage, Float[Tensor, "b d"]]:
    """The linearised boundary nearest to ``x`` among those between ``y`` and each of ``classes`` (b, k).

    Returns its gap, z_k − z_y, and the gap's gradient by the image. One forward pass, and a backward pass a class.
    """
    if len(x) > CHUNK and x.device.type == "cpu":
        parts = zip(*(rows.tensor_split(math.ceil(len(x) / CHUNK)) for rows in (x, y, classes)), strict=True)
        found = [nearest_boundary(model, some, theirs, heads, norm) for some, theirs, heads in parts]
        return torch.cat([gap for gap, _ in found]), torch.cat([w for _, w in found])
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(x)
    values = logits.detach().to(x.dtype)
    gaps = values.gather(1, classes) - values.gather(1, y[:, None])
    against, grads = torch.zeros_like(logits).scatter_(1, y[:, None], -1), []
    for k, chosen in enumerate(classes.split(1, dim=1), start=1):
        kept = k < classes.shape[1]
        grads += torch.autograd.grad(logits, x, against.scatter(1, chosen, 1), retain_graph=kept)
    w = torch.stack(grads, 1).flatten(2)
    rows = torch.arange(len(x), device=x.device)
    nearest = (gaps.abs() / (length(w, DUAL[norm]) + 1e-12)).argmin(1)
    return gaps[rows, nearest], w[rows, nearest]


def tighten(forward: Model, x_adv: Images, x: Images, y: Labels, norm: str, steps: int) -> Images:
    """The nearest misclassified point that ``steps`` forward passes find between ``x_adv``, which is one, and ``x``.

    Regula falsi on the margin, as FAB's final search, along a way whose length grows in proportion: straight in l2 and
    l1; in linf the pixels of ``x_adv`` that went a third of its distance or more all go at the same pace, which costs
    no distance and measured 1.5% nearer than straight.
    """
    away = (x_adv - x).flatten(1)
    reach = length(away, norm)[:, None]

    def at(way: Tensor) -> Tensor:
        gone = (3 * away).clamp(-way * reach, way * reach) if norm == "linf" else way * away
        return _images((x.flatten(1) + gone).clamp_(0, 1), x)

    def value(points: Tensor) -> Tensor:
        return margin(answer(forward, points), y)[:, None]

    short, far = torch.zeros_like(reach), torch.ones_like(reach)
    at_short, at_far = value(x), value(x_adv)
    tiny = torch.finfo(reach.dtype).tiny
    for _ in range(steps):
        root = short + (far - short) * (-at_short / (at_far - at_short).clamp(min=tiny))
        # A little on the far side, where rounding and curvature seldom make the point fall short.
        way = root + 0.1 * (far - root)
        points = at(way)
        found = value(points)
        wrong = found > 0
        x_adv = torch.where(wrong[..., None, None], points, x_adv)
        far, at_far = torch.where(wrong, way, far), torch.where(wrong, found, at_far)
        short, at_short = torch.where(wrong, short, way), torch.where(wrong, at_short, found)
    return x_adv


def _walks(others: Classes, targets: int | None) -> list[Tensor]:
    """Groups of walks that each image goes side by side: the classes that each walk heads for, (b, walks, k).

    Most images that fall at all fall to the most likely class: it goes first. What is left is few images, which a
    processor is slow at, so all their other targets go at once.
    """
    if targets is None:
        return [others[:, None]]
    chosen = others[:, :targets, None]
    return [group for group in (chosen[:, :1], chosen[:, 1:]) if group.shape[1]]


def _walk(
    model: Model,
    forward: Model,
    start: Float[Tensor, "b walks c h w"],
    x: Images,
    y: Labels,
    classes: Int[Tensor, "b walks k"],
    *,
    norm: str,
    steps: int,
    alpha_max: float,
    eta: float,
    beta: float,
    limit: float,
) -> tuple[Images, PerImage]:
    """The nearest misclassified point that an image's walks came to, and its distance: infinite where there is none.

    All walks of an image end when one has come within ``limit``.
    """
    walks = classes.shape[1]
    owner = torch.arange(len(x), device=x.device).repeat_interleave(walks)
    # Where the walk is, and the image: both are projected in one go.
    pair = torch.stack((start.reshape(len(owner), -1), x.flatten(1)[owner]))
    y, classes = y[owner], classes.flatten(0, 1)
    best, radius = pair[1].clone(), torch.full_like(pair[1, :, 0], torch.inf)
    going = torch.arange(len(owner), device=x.device)
    for _ in range(steps):
        gap, w = nearest_boundary(model, _images(pair[0], x), y, classes, norm)
        gaps = torch.stack((gap, gap - (w * (pair[0] - pair[1])).sum(1)))
        move = TO_HYPERPLANE[norm](pair, w, gaps)
        near, far = length(move, norm).clamp(min=1e-8)
        alpha = (near / (near + far)).clamp(max=alpha_max)
        there = torch.add(pair, move, alpha=eta)
        point = torch.lerp(there[0], there[1], alpha[:, None]).clamp_(0, 1)
        wrong = answer(forward, _images(point, x)).argmax(1) != y
        distance = length(point - pair[1], norm)
        nearer = wrong & (distance < radius[going])
        best[going[nearer]], radius[going[nearer]] = point[nearer], distance[nearer]
        pair[0] = torch.lerp(point, pair[1], (1 - beta) * wrong.to(point.dtype)[:, None])
        reached = radius.view(-1, walks).amin(1)
        on = (reached[owner[going]] > limit).nonzero().squeeze(1)
        if len(on) < len(going):
            going, y, classes, pair = going[on], y[on], classes[on], pair[:, on]
            if not len(on):
                break
    distance, which = radius.view(-1, walks).min(1)
    nearest = torch.arange(len(x), device=x.device) * walks + which
    return _images(best[nearest], x), distance


def _around(x: Float[Tensor, "b walks c h w"], norm: str, reach: float, generator: Generator) -> Tensor:
    """A random point at ``reach`` from each image, clipped to [0, 1]."""
    shape = x.shape[1:]
    noise = 2 * uniform(x, generator, *shape) - 1 if norm == "linf" else normal(x, generator, *shape)
    size = length(noise.flatten(2), norm)[..., None, None, None]
    return (x + reach * noise / size).clamp_(0, 1)


def _images(rows: Float[Tensor, "r d"], like: Images) -> Float[Tensor, "r c h w"]:
    """Rows of pixels as images, laid out in memory as ``like``."""
    last = like.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    return rows.view(-1, *like.shape[1:]).contiguous(memory_format=layout)
