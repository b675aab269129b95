"""Bounds by intervals (IBP), by linear relaxation (CROWN), and by relaxation with optimised slopes (alpha-CROWN).

Sources: Gowal et al. 2018 (IBP); Zhang et al. 2018 (CROWN), in the backward form over a graph of Xu et al. 2020; Xu et
al. 2021 (alpha-CROWN).

What is guaranteed. Every bound that is computed with ``mass`` is a bound of the network in real arithmetic: of the
function that the ONNX file describes, with its float32 weights taken exactly. The slopes of the relaxation may be any
numbers in their range, so they are searched for without that care; then the bound that counts is computed, in float32
or float64, and what its own rounding can amount to is taken off it. That amount is the sum, over all operators that
the form passed, of |coefficient| times the largest sum of absolute terms that the operator can produce on the region
(``mass``), times ``Network.rounding``: at least twice the length of the operator's sums in units of the last place.
Sums over a whole value, which are longest, are taken in float64. ONNX Runtime computes in float32 and may differ from
the real function by about 1e-6 of its intermediate values; a certificate says nothing about differences of that size.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fdml.certify.graph import Network
from fdml.certify.operators import Activation, Affine
from fdml.certify.region import Region, exact_inner, inner
from fdml.certify.relax import Lines, lines_of

MEMORY = 2**27
"""Bytes that the linear forms of one chunk may take."""


@dataclass
class Bounds:
    """Bounds of the activations' inputs over d regions, float64: for each activation node (d, *shape) lower and upper.

    ``mass`` bounds, for each node, the sum of absolute terms in its computation.
    """

    region: Region
    before: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    mass: dict[int, Tensor] = field(default_factory=dict)

    def lines(self, network: Network, dtype: torch.dtype) -> dict[int, Lines]:
        """The default lines of every activation."""
        return {i: lines_of(_kind(network, i), lower, upper).to(dtype) for i, (lower, upper) in self.before.items()}

    def single_mass(self) -> dict[int, Tensor]:
        """``mass`` in float32."""
        return {i: mass.float() for i, mass in self.mass.items()}

    def rows(self, index: Tensor) -> "Bounds":
        """The bounds of some of the regions."""
        return Bounds(
            self.region.rows(index),
            {i: (lower[index], upper[index]) for i, (lower, upper) in self.before.items()},
            {i: mass[index] for i, mass in self.mass.items()},
        )


def _kind(network: Network, i: int) -> str:
    operator = network.nodes[i].operator
    assert isinstance(operator, Activation)
    return operator.kind


def backward(
    network: Network,
    node: int,
    form: Tensor,
    lines: Mapping[int, Lines],
    region: Region,
    *,
    multipliers: Mapping[int, Tensor] | None = None,
    watch: Callable[[int, Tensor], None] | None = None,
    mass: Mapping[int, Tensor] | None = None,
) -> Tensor:
    """A lower bound over each region of form · (value of ``node``), (s, d), for forms (s, d, *shape).

    ``multipliers`` are added to the forms at the inputs of activations, (d, *shape): those of split constraints.
    ``watch`` sees the form at each activation's output and, as node 0, at the input. With ``mass`` the rounding of the
    computation is taken off. The forms are in the dtype of ``network``, the bound is in float64.
    """
    s, d = form.shape[:2]
    zeros = torch.zeros(s, d, dtype=torch.float64, device=form.device)
    forms, total, error = {node: form}, zeros, zeros
    dot = inner if mass is None else exact_inner
    for i in range(node, 0, -1):
        if (form := forms.pop(i, None)) is None:  # pyright: ignore[reportAssignmentType]
            continue
        operator, inputs = network.nodes[i].operator, network.nodes[i].inputs
        if mass is not None:
            error = error + network.rounding[i] * inner(form.abs(), mass[i].to(form.dtype))
        if isinstance(operator, Activation):
            if watch is not None:
                watch(i, form)
            line = lines[i]
            above, below = form.clamp_min(0), form.clamp_max(0)
            total = total + dot(below, line.upper_shift)
            if line.lower_shift is not None:
                total = total + dot(above, line.lower_shift)
            form = above * line.lower_slope + below * line.upper_slope
            if multipliers is not None and i in multipliers:
                form = form + multipliers[i]
            parts = [form]
        else:
            assert isinstance(operator, Affine)
            flat = form.reshape(s * d, *form.shape[2:])
            if (constant := operator.constant(flat)) is not None:
                total = total + constant.view(s, d)
            parts = [part.reshape(s, d, *part.shape[1:]) for part in operator.back(flat)]
        for j, part in zip(inputs, parts, strict=True):
            forms[j] = forms[j] + part if j in forms else part
    form = forms[0].flatten(2)
    if watch is not None:
        watch(0, form)
    total = total + region.minimum(form, dot)
    if mass is not None:
        error = error + network.rounding[0] * inner(form.abs(), region.magnitude)
        # The error is itself rounded, and so is the sum of the parts.
        total = total - 1.05 * error - len(network.nodes) * 2.0**-50 * total.abs()
    return total


def interval(network: Network, region: Region) -> tuple[Tensor, Tensor]:
    """Bounds of the outputs (d, m) by interval arithmetic, rounding covered."""
    boxes = _forward(network, region, None)[1]
    return boxes[-1][0].flatten(1), boxes[-1][1].flatten(1)


def intervals(network: Network, region: Region) -> Bounds:
    """Bounds of every activation's input by interval arithmetic."""
    return _forward(network, region, None)[0]


def crown(network: Network, region: Region, *, deadline: float | None = None) -> Bounds:
    """Bounds of every activation's input by intervals, and where those leave it unstable by CROWN, until ``deadline``
    (time.monotonic)."""

    def refine(bounds: Bounds, i: int, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        return _refined(network, bounds, i, lower, upper, deadline)

    return _forward(network, region, refine)[0]


Refine = Callable[[Bounds, int, Tensor, Tensor], tuple[Tensor, Tensor]]


def _forward(network: Network, region: Region, refine: Refine | None) -> tuple[Bounds, list[tuple[Tensor, Tensor]]]:
    """The bounds and the boxes of all nodes; ``refine`` may tighten those of each activation's input."""
    assert network.dtype == torch.float64 == region.lower.dtype
    bounds = Bounds(region)
    shape = network.nodes[0].shape
    boxes = [(region.lower.reshape(-1, *shape), region.upper.reshape(-1, *shape))]
    sizes = [region.magnitude.reshape(-1, *shape)]
    bounds.mass[0] = sizes[0]
    for i, node in enumerate(network.nodes[1:], 1):
        operator = node.operator
        if isinstance(operator, Activation):
            (j,) = node.inputs
            lower, upper = boxes[j]
            if refine is not None:
                lower, upper = refine(bounds, i, lower, upper)
                upper = torch.maximum(lower, upper)
            bounds.before[i] = (lower, upper)
            low, high = operator.interval((lower, upper))
            mass = torch.maximum(lower.abs(), upper.abs()) + 1
            eps = network.rounding[i]
            low, high = low - eps * mass * (operator.kind != "relu"), high + eps * mass
        else:
            assert isinstance(operator, Affine)
            low, high = operator.interval(*(boxes[j] for j in node.inputs))
            mass = operator.magnitude(*(sizes[j] for j in node.inputs))
            eps = network.rounding[i]
            low, high = low - eps * mass, high + eps * mass
        bounds.mass[i] = mass
        boxes.append((low, high))
        sizes.append(torch.maximum(low.abs(), high.abs()))
    return bounds, boxes


def _unstable(kind: str, lower: Tensor, upper: Tensor) -> Tensor:
    """Where a tighter bound of the input would change the relaxation, (d, *shape)."""
    return (lower < 0) & (upper > 0) if kind == "relu" else upper - lower > 1e-6


def _chosen(unstable: Tensor) -> Tensor:
    """For each region the flat indices of its marked neurons, (s, d), filled up with neurons that are not marked."""
    most = int(unstable.flatten(1).sum(1).max())
    return unstable.flatten(1).to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most].T


def _unit_forms(index: Tensor, shape: tuple[int, ...], sign: int, dtype: torch.dtype) -> Tensor:
    """Forms (s, d, *shape) that are ``sign`` at ``index`` (s, d) and 0 elsewhere."""
    size = int(torch.tensor(shape).prod())
    form = torch.zeros(*index.shape, size, dtype=dtype, device=index.device)
    return form.scatter_(2, index[:, :, None], sign).view(*index.shape, *shape)


def _refined(
    network: Network, bounds: Bounds, i: int, lower: Tensor, upper: Tensor, deadline: float | None
) -> tuple[Tensor, Tensor]:
    (j,) = network.nodes[i].inputs
    unstable = _unstable(_kind(network, i), lower, upper)
    if not unstable.any() or (bounds.region.radius is None and _exact(network, j)):
        return lower, upper
    index, fast = _chosen(unstable), network.single
    lines, mass, region = bounds.lines(network, fast.dtype), bounds.single_mass(), bounds.region.single()
    low, high = lower.flatten(1).clone(), upper.flatten(1).clone()
    for part in index.split(rows_at_once(network, len(lower), 4)):
        for sign in (1, -1):
            if deadline is not None and time.monotonic() >= deadline:
                break
            form = _unit_forms(part, network.nodes[j].shape, sign, fast.dtype)
            found = sign * backward(fast, j, form, lines, region, mass=mass)
            target, better = (low, torch.maximum) if sign > 0 else (high, torch.minimum)
            target.scatter_(1, part.T, better(target.gather(1, part.T), found.T))
    return low.view_as(lower), high.view_as(upper)


def rows_at_once(network: Network, d: int, size: int) -> int:
    """How many forms for each of d regions fit into ``MEMORY``."""
    return max(1, MEMORY // (4 * size * d * max(node.size for node in network.nodes)))


def _exact(network: Network, j: int) -> bool:
    """Whether intervals give node j's exact range on a box: at most one operator that sums lies on its way."""
    sums = 0
    while j:
        operator, inputs = network.nodes[j].operator, network.nodes[j].inputs
        if len(inputs) != 1 or isinstance(operator, Activation):
            return False
        assert operator is not None
        sums += operator.terms > 1
        j = inputs[0]
    return sums <= 1


def margins(network: Network, bounds: Bounds, weight: Tensor) -> Tensor:
    """Lower bounds of weight · outputs over each region, (d, r), for weights (d, r, m), with the default lines."""
    form = weight.transpose(0, 1).reshape(weight.shape[1], weight.shape[0], *network.nodes[-1].shape)
    lines = bounds.lines(network, torch.float64)
    return backward(network, len(network.nodes) - 1, form, lines, bounds.region, mass=bounds.mass).T


def crown_margins(network: Network, lower: Tensor, upper: Tensor, labels: Tensor) -> Tensor:
    """A proved lower bound (b,) of output[label] − max of the others, over each box of (b, n).

    By intervals with the last layer taken backward, and by CROWN where that does not reach 0.
    """
    region = Region(lower.double(), upper.double())
    eye = torch.eye(network.outputs, dtype=torch.float64)
    weight = eye[labels][:, None] - eye
    largest = max(node.size for node in network.nodes)
    found = torch.full((len(lower),), -torch.inf, dtype=torch.float64)
    for bound in (intervals, crown):
        left = (~(found > 0)).nonzero()[:, 0]
        for rows in left.split(max(1, MEMORY // (64 * largest))):
            value = margins(network, bound(network, region.rows(rows)), weight[rows])
            value = value.scatter(1, labels[rows, None], torch.inf).amin(1)
            found[rows] = torch.maximum(found[rows], value)
    return found
