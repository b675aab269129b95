"""The search for the relaxation's lower slopes, and the multipliers of splits, that give the best bound.

Everything here runs in float32 and proves nothing: what it finds is handed to ``bounds.backward`` in float64.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fdml.certify.bounds import (
    Bounds,
    _chosen,
    _forward,
    _unit_forms,
    _unstable,
    backward,
    rows_at_once,
)
from fdml.certify.graph import Network
from fdml.certify.operators import Activation
from fdml.certify.region import Region
from fdml.certify.relax import Lines, relu_lines

RATE, DECAY = 0.1, 0.98  # Adam's, as Xu et al. 2021


@dataclass
class Relaxation:
    """The lines of all activations over d regions, float32, with the lower slopes of relus left open."""

    region: Region
    fixed: dict[int, Lines]
    unstable: dict[int, Tensor]  # of the relus with an unstable neuron, (d, *shape)

    @classmethod
    def of(cls, network: Network, bounds: Bounds) -> "Relaxation":
        fixed = bounds.lines(network, torch.float32)
        relus = [i for i in fixed if _kind(network, i) == "relu"]
        unstable = {i: (bounds.before[i][0] < 0) & (bounds.before[i][1] > 0) for i in relus}
        return cls(bounds.region.single(), fixed, {i: mask for i, mask in unstable.items() if mask.any()})

    def lines(self, alphas: Mapping[int, Tensor]) -> dict[int, Lines]:
        lines = dict(self.fixed)
        for i, alpha in alphas.items():
            line = self.fixed[i]
            slope = torch.where(self.unstable[i], alpha, line.lower_slope)
            lines[i] = Lines(slope, None, line.upper_slope, line.upper_shift)
        return lines

    def start(self, rows: int, before: int) -> dict[int, Tensor]:
        """The default slopes (rows, d, *shape) of the relus before node ``before``."""
        return {
            i: self.fixed[i].lower_slope.expand(rows, *self.fixed[i].lower_slope.shape).clone()
            for i in self.unstable
            if i < before
        }


def _kind(network: Network, i: int) -> str:
    operator = network.nodes[i].operator
    assert isinstance(operator, Activation)
    return operator.kind


def ascend(
    network: Network,
    node: int,
    form: Tensor,
    relaxation: Relaxation,
    alphas: dict[int, Tensor],
    *,
    steps: int,
    offset: Tensor | None = None,
    deadline: float | None = None,
) -> Tensor:
    """Improves ``alphas`` in place for the forms (s, d, *shape) of ``node``; returns the last bounds seen, (s, d).

    ``offset`` (s, d) is added to the bounds; a form whose bound is above 0 is not improved further, and with an offset
    the search ends once all are. ``network`` is in float32.
    """
    if not alphas:
        with torch.no_grad():
            found = backward(network, node, form, relaxation.lines({}), relaxation.region)
        return found if offset is None else found + offset
    leaves = list(alphas.values())
    for leaf in leaves:
        leaf.requires_grad_(True)
    optimiser = torch.optim.Adam(leaves, lr=RATE, fused=True)
    for step in range(steps + 1):
        with torch.enable_grad():
            found = backward(network, node, form, relaxation.lines(alphas), relaxation.region)
            if offset is not None:
                found = found + offset
                if (found > 0).all():
                    break
            if step == steps or (deadline is not None and time.monotonic() >= deadline):
                break
            (-found.sum()).backward()
        optimiser.step()
        optimiser.zero_grad()
        optimiser.param_groups[0]["lr"] *= DECAY
        for leaf in leaves:
            leaf.data.clamp_(0, 1)
    for leaf in leaves:
        leaf.requires_grad_(False).grad = None
    return found.detach()


def proof_lines(network: Network, bounds: Bounds, alphas: Mapping[int, Tensor]) -> dict[int, Lines]:
    """The lines in float64 with the slopes ``alphas`` found in float32."""
    lines = bounds.lines(network, torch.float64)
    return lines | {i: relu_lines(*bounds.before[i], alpha.double()) for i, alpha in alphas.items()}


def tightened(network: Network, bounds: Bounds, *, steps: int, deadline: float | None = None) -> Bounds:
    """alpha-CROWN for the inputs of the activations: each neuron that is unstable gets slopes of its own for its lower
    and for its upper bound, layer by layer, so that every layer profits from those before it."""
    fast = network.single

    def refine(found: Bounds, i: int, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        (j,) = network.nodes[i].inputs
        lower = torch.maximum(lower, bounds.before[i][0])
        upper = torch.minimum(upper, bounds.before[i][1])
        unstable = _unstable(_kind(network, i), lower, upper)
        relaxation = Relaxation.of(network, found)
        if not unstable.any() or not relaxation.unstable:
            return lower, upper
        low, high = lower.flatten(1).clone(), upper.flatten(1).clone()
        for part in _chosen(unstable).split(max(1, rows_at_once(network, len(lower), 4) // 4)):
            for sign in (1, -1):
                if deadline is not None and time.monotonic() >= deadline:
                    break
                form = _unit_forms(part, network.nodes[j].shape, sign, torch.float32)
                alphas = relaxation.start(len(part), j)
                ascend(fast, j, form, relaxation, alphas, steps=steps, deadline=deadline)
                lines = proof_lines(network, found, alphas)
                value = sign * backward(network, j, form.double(), lines, found.region, mass=found.mass)
                target, better = (low, torch.maximum) if sign > 0 else (high, torch.minimum)
                target.scatter_(1, part.T, better(target.gather(1, part.T), value.T))
        return low.view_as(lower), high.view_as(upper)

    return _forward(network, bounds.region, refine)[0]


def optimised(
    network: Network,
    bounds: Bounds,
    form: Tensor,
    offset: Tensor,
    *,
    steps: int,
    deadline: float | None = None,
) -> Tensor:
    """Proved lower bounds (s, d) of forms (s, d, *shape) of the output plus ``offset`` (s, d), by alpha-CROWN with the
    given bounds of the activations' inputs."""
    last, relaxation = len(network.nodes) - 1, Relaxation.of(network, bounds)
    alphas = relaxation.start(len(form), last)
    ascend(
        network.single, last, form.float(), relaxation, alphas, steps=steps, offset=offset.float(), deadline=deadline
    )
    lines = proof_lines(network, bounds, alphas)
    return backward(network, last, form, lines, bounds.region, mass=bounds.mass) + offset
