"""Lines below and above an activation on an interval: the linear relaxation."""

from dataclasses import dataclass

import torch
from torch import Tensor

STEPS = 40  # bisections for a tangent


@dataclass(frozen=True)
class Lines:
    """lower_slope·x + lower_shift <= f(x) <= upper_slope·x + upper_shift for every x of the interval, elementwise,
    (d, *shape); a lower slope of (s, d, *shape) has one for each linear form. A lower shift of None is 0."""

    lower_slope: Tensor
    lower_shift: Tensor | None
    upper_slope: Tensor
    upper_shift: Tensor

    def to(self, dtype: torch.dtype) -> "Lines":
        return Lines(
            self.lower_slope.to(dtype),
            None if self.lower_shift is None else self.lower_shift.to(dtype),
            self.upper_slope.to(dtype),
            self.upper_shift.to(dtype),
        )


def lines_of(kind: str, lower: Tensor, upper: Tensor) -> Lines:
    """The lines for an activation whose input lies in [lower, upper]."""
    return relu_lines(lower, upper) if kind == "relu" else _curve_lines(kind, lower, upper)


def relu_lines(lower: Tensor, upper: Tensor, alpha: Tensor | None = None) -> Lines:
    """The chord above, and below a line through the origin of slope ``alpha`` in [0, 1]; without ``alpha`` the slope 0
    or 1 that leaves the smaller area (Zhang et al. 2018, section 3.3)."""
    unstable = (lower < 0) & (upper > 0)
    active = (lower >= 0).to(lower)
    width = torch.where(unstable, upper - lower, 1)
    slope = torch.where(unstable, upper / width, active)
    shift = torch.where(unstable, torch.maximum(-slope * lower, upper - slope * upper), 0)
    if alpha is None:
        alpha = (upper > -lower).to(lower)
    return Lines(torch.where(unstable, alpha, active), None, slope, shift)


def _curve_lines(kind: str, lower: Tensor, upper: Tensor) -> Lines:
    """For sigmoid and tanh: both are convex below 0, concave above, and f(x) − f(0) is odd."""
    slope, shift = _curve_above(kind, lower, upper)
    # By the symmetry f(−x) = 2 f(0) − f(x), a line above on [−u, −l] gives one below on [l, u].
    mirrored, other = _curve_above(kind, -upper, -lower)
    twice = 1.0 if kind == "sigmoid" else 0.0
    return Lines(mirrored, twice - other, slope, shift)


def _curve_above(kind: str, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """(slope, shift) of a line above the curve on [lower, upper].

    Where the curve is concave on the interval, the tangent in its middle; elsewhere the chord, if it lies above, or
    the tangent at a point d >= 0 that passes above (lower, f(lower)): on the concave side a tangent lies above, and on
    the convex side the difference of line and curve is concave, so that its ends, 0 and lower, decide.
    """
    f = getattr(torch, kind)

    def slope_at(x: Tensor) -> Tensor:
        y = f(x)
        return y * (1 - y) if kind == "sigmoid" else 1 - y * y

    low, high = lower.clamp_min(0), upper.clamp_min(0)
    # The tangent at `high` passes above lower, or the chord lies above the curve.
    chord = slope_at(upper) * (lower - upper) + f(upper) < f(lower)
    chord |= upper <= 0
    for _ in range(STEPS):
        middle = (low + high) / 2
        above = slope_at(middle) * (lower - middle) + f(middle) >= f(lower)
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    touch = torch.maximum(high, (lower + upper) / 2)
    wide = upper - lower > 1e-9
    straight = torch.where(wide, (f(upper) - f(lower)) / torch.where(wide, upper - lower, 1), 0)
    slope = torch.where(chord, straight, slope_at(touch))
    # The largest of the three: rounding then leaves the line below at none of the points that decide.
    shift = torch.maximum(f(lower) - slope * lower, f(upper) - slope * upper)
    shift = torch.where(chord, shift, torch.maximum(shift, f(touch) - slope * touch))
    return slope, shift + 8 * torch.finfo(lower.dtype).eps * (1 + (slope * lower).abs() + (slope * upper).abs())
