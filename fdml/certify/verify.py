"""The verdict on a property: searches for a counter-example and bounds in turn, the cheap ones first."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fdml.certify.bounds import Bounds, crown, margins
from fdml.certify.branch import branch
from fdml.certify.graph import Network
from fdml.certify.inputsplit import split_inputs
from fdml.certify.property import Clause, Property
from fdml.certify.region import Region
from fdml.certify.search import Runner, confirm, inside, search
from fdml.certify.slopes import optimised, tightened

FEW_INPUTS = 20
"""Up to so many inputs the box is split, beyond it the relus."""
PATIENCE = 2.0
"""Seconds of splitting after which the thorough search for a counter-example has its turn."""


@dataclass(frozen=True)
class Verdict:
    """What was found out about properties.

    ``status`` is certified, falsified, unknown (nothing is left to try) or timeout. ``bound`` is the least, over
    clauses and regions, of the margin that is proved to keep the outputs out of the clause: above 0 for all that is
    certified; −inf where nothing was proved. ``x`` (n,) and ``y`` (m,) are the counter-example, which the ONNX model
    itself confirmed. ``method`` is what decided, or was tried last: interval, crown, alpha-crown, branch-and-bound,
    input-split or pgd. ``domains`` is how many parts of the region were bounded.
    """

    status: str
    bound: float
    x: np.ndarray | None
    y: np.ndarray | None
    method: str
    domains: int
    seconds: float


def verify(
    network: Network,
    properties: Sequence[Property],
    *,
    runner: Runner | None = None,
    timeout: float,
    seed: int = 0,
    attack: bool = True,
    split: bool = True,
    watch: Callable[[str, float, int], None] | None = None,
) -> Verdict:
    """Whether all ``properties`` hold of ``network``, within ``timeout`` seconds.

    Without ``runner``, the ONNX model itself, no counter-example can be confirmed and none is sought. ``split`` False
    ends after alpha-CROWN. ``watch`` is told the method, the bound so far and the domains so far.
    """
    return _Verification(network, runner if attack else None, timeout, seed, split, watch).run(properties)


class _Found(Exception):  # noqa: N818 — a way out of nested loops
    def __init__(self, x: np.ndarray, y: np.ndarray, method: str) -> None:
        self.x, self.y, self.method = x, y, method


class _Verification:
    def __init__(
        self,
        network: Network,
        runner: Runner | None,
        timeout: float,
        seed: int,
        split: bool,
        watch: Callable[[str, float, int], None] | None,
    ) -> None:
        self.begun = time.monotonic()
        self.network, self.runner, self.seed, self.split = network, runner, seed, split
        self.deadline = self.begun + timeout
        self.watch = watch or (lambda method, bound, domains: None)
        self.method, self.domains = "interval", 0
        self.bounds: list[float] = []

    def run(self, properties: Sequence[Property]) -> Verdict:
        status, x, y = "certified", None, None
        try:
            with torch.no_grad():
                bounds = [self._prove(prop) for prop in properties]
            bound = min(bounds, default=torch.inf)
            if not bound > 0:
                status = "timeout" if time.monotonic() >= self.deadline else "unknown"
        except _Found as found:
            status, bound, x, y, self.method = "falsified", -torch.inf, found.x, found.y, found.method
        return Verdict(status, bound, x, y, self.method, self.domains, time.monotonic() - self.begun)

    def _late(self) -> bool:
        return time.monotonic() >= self.deadline

    def _prove(self, prop: Property) -> float:
        """The least margin proved over the clauses of one property."""
        self._attack(prop, 30, 6, self.seed)
        region = Region.of([prop])
        # What counts as a counter-example lies in what is proved: an input with one decimal value has its float32.
        lower, upper = (bound.double() for bound in inside(prop))
        region = replace(
            region,
            lower=torch.minimum(region.lower, lower[None]),
            upper=torch.maximum(region.upper, upper[None]),
        )
        if not prop.clauses:
            return torch.inf
        forms, offsets = _problems(self.network, prop.clauses)
        last = len(self.network.nodes) - 1

        def told(method: str, proof: Tensor) -> Tensor:
            self.method = method
            self.domains += 1
            self.watch(method, float(proof.min()), self.domains)
            return proof

        began = time.monotonic()
        bounds = crown(self.network, region, deadline=self.deadline)
        took = time.monotonic() - began
        proof = told("crown", _margin(self.network, bounds, forms, offsets))
        few = self.network.inputs <= FEW_INPUTS and prop.radius is None
        for tight in (False,) if few else (False, True):
            left = ~(proof > 0)
            if not left.any() or self._late():
                return float(proof.min())
            if tight:
                # A step costs about half of what CROWN did; splits want the larger part of the time.
                steps = int(min(20, 2 * 0.4 * (self.deadline - time.monotonic()) / took))
                if not steps:
                    continue
                bounds = tightened(self.network, bounds, steps=steps, deadline=self.deadline)
                plain = _margin(self.network, bounds, forms[left], offsets[left])
                proof[left] = torch.maximum(proof[left], plain)
                left = ~(proof > 0)
                if not left.any() or self._late():
                    return float(proof.min())
            rows = forms[left].flatten(0, 1)[:, None]
            found = optimised(
                self.network, bounds, rows, offsets[left].flatten()[:, None], steps=30, deadline=self.deadline
            )
            best = found.view(int(left.sum()), -1).amax(1)
            proof[left] = torch.maximum(proof[left], best)
            told("alpha-crown", proof)
        left = ~(proof > 0)
        if not left.any() or not self.split or self._late():
            return float(proof.min())
        if few:
            self.method = "input-split"

            def check(points: Tensor) -> None:
                self._try(prop, points, "input-split")

            found, count = split_inputs(
                self.network, region, forms[left], offsets[left], deadline=self.deadline, watch=check
            )
            self.domains += count
            proof[left] = torch.maximum(proof[left], found)
            return float(proof.min())
        self.method = "branch-and-bound"
        patient_until = time.monotonic() + PATIENCE

        def look(points: Tensor) -> bool:
            nonlocal patient_until
            self._try(prop, points, "branch-and-bound")
            if time.monotonic() > patient_until:
                patient_until = torch.inf
                self._attack(prop, 100, 30, self.seed + 1, starts=points[:10])
            return False

        outcome = branch(self.network, bounds, last, forms[left], offsets[left], deadline=self.deadline, watch=look)
        self.domains += outcome.domains
        proof[left] = torch.maximum(proof[left], outcome.bound)
        return float(proof.min())

    def _attack(self, prop: Property, steps: int, restarts: int, seed: int, starts: Tensor | None = None) -> None:
        if self.runner is None:
            return
        settings = {"steps": steps, "restarts": restarts, "seed": seed, "deadline": self.deadline}
        with torch.enable_grad():
            found = search(self.network.single, prop, **settings, starts=starts)
            for points in found:
                self._confirm(prop, points, "pgd")

    def _try(self, prop: Property, points: Tensor, method: str) -> None:
        """Confirms the points that the network in float32 puts into a clause."""
        if self.runner is None:
            return
        y = self.network.single.forward(points).double()
        depth = torch.stack([(y @ c.weight.T + c.offset).amin(1) for c in prop.clauses]).amax(0)
        if (depth >= 0).any():
            self._confirm(prop, points[depth >= 0], method)

    def _confirm(self, prop: Property, points: Tensor, method: str) -> None:
        assert self.runner is not None
        if (found := confirm(self.runner, prop, points)) is not None:
            raise _Found(*found, method)


def _problems(network: Network, clauses: Sequence[Clause]) -> tuple[Tensor, Tensor]:
    """Forms (k, r, *shape) of the output and offsets (k, r): above 0 in one row means outside the clause. Clauses of
    fewer rows repeat their last."""
    most = max(len(clause.offset) for clause in clauses)
    index = [torch.arange(most).clamp_max(len(clause.offset) - 1) for clause in clauses]
    forms = torch.stack([-clause.weight[i] for clause, i in zip(clauses, index, strict=True)])
    offsets = torch.stack([-clause.offset[i] for clause, i in zip(clauses, index, strict=True)])
    return forms.view(len(clauses), most, *network.nodes[-1].shape), offsets


def _margin(network: Network, bounds: Bounds, forms: Tensor, offsets: Tensor) -> Tensor:
    found = margins(network, bounds, forms.flatten(2).flatten(0, 1)[None])
    return (found.view_as(offsets) + offsets).amax(1)
