"""Controls: attacks that follow no gradient, to set beside those that do."""

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fdml.attacks.objective import Best, Model, answer, check
from fdml.errors import InputError
from fdml.inference import inference
from fdml.losses import Labels, margin
from fdml.randomness import Generator, normal, take
from fdml.threat import Images, Threat

Change = Callable[[Images, Tensor], Images]
"""Some images and their places in the batch, to a candidate for each of them."""


def noise(
    model: Model,
    x: Images,
    y: Labels,
    threat: Threat,
    *,
    draws: int = 100,
    generator: Generator = None,
) -> Images:
    """The worst of ``x`` and ``draws`` random points of the threat model: what chance alone finds.

    In turn a step of length eps along a random gradient (for linf a corner of the cube, for l2 a point of the sphere)
    and a random start of PGD. An image is left alone once it is fooled; one that never is comes back at the point of
    largest margin.

    Raises ``InputError`` for draws below 1.
    """
    if draws < 1:
        raise InputError(f"draws must be at least 1, got {draws}")

    def corner(x: Images, rows: Tensor) -> Images:
        return threat.project(threat.ascend(x, normal(x, take(generator, rows), *x.shape[1:]), threat.eps), x)

    def inside(x: Images, rows: Tensor) -> Images:
        return threat.random(x, take(generator, rows))

    return _worst(model, x, y, ((corner, inside)[number % 2] for number in range(draws)))


def spatial(
    model: Model,
    x: Images,
    y: Labels,
    *,
    degrees: float = 30.0,
    shift: float = 0.1,
    grid: tuple[int, int] = (31, 5),
) -> Images:
    """The worst of rotations and translations, by exhaustive search (Engstrom et al. 2019, section 3).

    ``grid`` is how many angles from −``degrees`` to ``degrees`` are tried, and how many shifts along each axis from
    −``shift`` to ``shift`` of the side: 31 x 5 x 5 = 775 by default, as in the paper, the farthest first. What comes
    from outside the image is black. A control: it leaves the pixel norms by design, and its result is inside [0, 1]
    only. An image is left alone once it is fooled; one that never is comes back at its largest margin, ``x`` included.

    Raises ``InputError`` for degrees outside [0, 180], a shift outside [0, 1] and a grid below 1.
    """
    if not 0 <= degrees <= 180 or not 0 <= shift <= 1:
        raise InputError(f"degrees must lie in [0, 180] and shift in [0, 1], got degrees={degrees}, shift={shift}")
    if min(grid) < 1:
        raise InputError(f"grid must be at least 1 angle and 1 shift, got {grid}")
    angles, shifts = (_spread(reach, count) for reach, count in zip((math.radians(degrees), shift), grid, strict=True))
    poses = [(angle, right, down) for angle in angles for right in shifts for down in shifts]
    poses.sort(key=lambda pose: sum(part * part for part in pose), reverse=True)
    return _worst(model, x, y, (_posed(*pose) for pose in poses))


def _worst(model: Model, x: Images, y: Labels, changes: Iterator[Change]) -> Images:
    best = Best(x)
    rows = torch.arange(len(x), device=x.device)
    check(x, y)
    with inference(model), torch.no_grad():
        best.see(rows, x, margin(answer(model, x), y))
        for change in changes:
            rows = rows[best.value[rows] <= 0]
            if not len(rows):
                break
            x_adv = change(x[rows], rows)
            best.see(rows, x_adv, margin(answer(model, x_adv), y[rows]))
    return best.x


def _spread(reach: float, count: int) -> list[float]:
    return [reach * (2 * place / (count - 1) - 1) for place in range(count)] if count > 1 else [0.0]


def _posed(angle: float, right: float, down: float) -> Change:
    """The images turned about their centre, then moved, by shares of their sides."""

    def pose(x: Images, _rows: Tensor) -> Images:
        (height, width), cos, sin = x.shape[2:], math.cos(angle), math.sin(angle)
        # From a place in the result back to its source; a grid runs over [−1, 1], so that a side is 2 long.
        across, along = sin * height / width, sin * width / height
        theta = x.new_tensor(
            [
                [cos, across, -2 * (cos * right + across * down)],
                [-along, cos, -2 * (cos * down - along * right)],
            ]
        )
        grid = F.affine_grid(theta[None], [1, 1, height, width], align_corners=False)
        return F.grid_sample(x, grid.expand(len(x), -1, -1, -1), align_corners=False).clamp_(0, 1)

    return pose
