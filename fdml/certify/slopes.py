"""The search for the relaxation's lower slopes that give the best bound.

``ascend`` proves nothing: with the slopes that it finds, ``bounds.backward`` computes the bound that counts.
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


class Adam:
    """The steps of Kingma & Ba 2015, uphill. (torch's own optimiser takes two seconds to import.)"""

    def __init__(self, like: Tensor) -> None:
        self.first, self.second, self.count = torch.zeros_like(like), torch.zeros_like(like), 0

    def step(self, x: Tensor, gradient: Tensor, rate: float) -> Tensor:
        self.count += 1
        self.first.lerp_(gradient, 0.1)
        self.second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        scale = (1 - 0.999**self.count) ** 0.5
        return x + rate * scale / (1 - 0.9**self.count) * self.first / (self.second.sqrt() + 1e-12)


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

    ``offset`` (s, d) is added to the bounds; with it the search ends once all bounds are above 0. ``network`` is in
    float32.
    """
    if not alphas:
        with torch.no_grad():
            found = backward(network, node, form, relaxation.lines({}), relaxation.region)
        return found if offset is None else found + offset
    ascents = {i: Adam(alpha) for i, alpha in alphas.items()}
    step = 0
    while True:
        leaves = {i: alpha.requires_grad_() for i, alpha in alphas.items()}
        with torch.enable_grad():
            found = backward(network, node, form, relaxation.lines(leaves), relaxation.region)
            if offset is not None:
                found = found + offset
            ended = step == steps or (deadline is not None and time.monotonic() >= deadline)
            ended = ended or (offset is not None and bool((found > 0).all()))
            gradients = [] if ended else torch.autograd.grad(found.sum(), list(leaves.values()))
        for i, alpha in leaves.items():
            alphas[i] = alpha.detach()
        if ended:
            return found.detach()
        for i, gradient in zip(leaves, gradients, strict=True):
            alphas[i] = ascents[i].step(alphas[i], gradient, RATE * DECAY**step).clamp_(0, 1)
        step += 1


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
        low, high, mass = lower.flatten(1).clone(), upper.flatten(1).clone(), found.single_mass()
        for part in _chosen(unstable).split(max(1, rows_at_once(network, len(lower), 4) // 4)):
            for sign in (1, -1):
                if deadline is not None and time.monotonic() >= deadline:
                    break
                form = _unit_forms(part, network.nodes[j].shape, sign, torch.float32)
                alphas = relaxation.start(len(part), j)
                ascend(fast, j, form, relaxation, alphas, steps=steps, deadline=deadline)
                value = sign * backward(fast, j, form, relaxation.lines(alphas), relaxation.region, mass=mass)
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
