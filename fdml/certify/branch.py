"""Branch and bound over the signs of relus, with the multipliers of beta-CROWN (Wang et al. 2021)."""

import heapq
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fdml.certify.bounds import Bounds, backward
from fdml.certify.graph import Network
from fdml.certify.leaf import solved
from fdml.certify.relax import Lines
from fdml.certify.slopes import DECAY, RATE, Adam, Relaxation, _kind, proof_lines

BATCH = 256  # domains at once, at most
VALUES = 2**22  # elements of the largest layer over all domains of a batch
CANDIDATES = 8  # relus that are tried before one is split
QUEUE = 2**31  # bytes of the domains that wait


@dataclass
class Domain:
    """The part of the region where some relus' inputs have a known sign, for one problem.

    ``alpha``, ``beta`` (u,) float16 and ``split`` (u,) int8 are of the u relus that are unstable at the root; a split
    is 1 where the input is >= 0, −1 where it is <= 0. ``score`` says which relus to split next, best first.
    """

    problem: int
    bound: float
    alpha: Tensor
    beta: Tensor
    split: Tensor
    score: Tensor


@dataclass(frozen=True)
class Outcome:
    """``bound`` (k,): what is proved of each problem; ``domains``: how many were bounded; ``ended``: nothing is left
    that could be split or decided, or ``watch`` stopped the search."""

    bound: Tensor
    domains: int
    stopped: bool


class Branching:
    """The relus before ``node`` that are unstable over one region, and their bounds: what all domains share."""

    def __init__(self, network: Network, bounds: Bounds, node: int) -> None:
        assert len(bounds.region) == 1
        self.network, self.bounds, self.node = network, bounds, node
        self.relaxation, self.mass = Relaxation.of(network, bounds), bounds.single_mass()
        self.layers = [i for i in sorted(self.relaxation.unstable) if i < node]
        self.index = {i: self.relaxation.unstable[i].flatten().nonzero()[:, 0] for i in self.layers}
        self.sizes = [len(self.index[i]) for i in self.layers]
        # The largest distance of the chord from the relu: what a split of the relu can win, times its coefficient.
        parts = [self.relaxation.fixed[i].upper_shift.flatten()[self.index[i]] for i in self.layers]
        self.gap = torch.cat(parts) if parts else torch.zeros(0)

    def lines(self, alpha: Tensor, split: Tensor) -> dict[int, Lines]:
        """Lines for domains with slopes (d, u) and splits (d, u), float32 or, if ``alpha`` is, float64."""
        lines = dict(self.relaxation.fixed)
        if alpha.dtype == torch.float64:
            lines = proof_lines(self.network, self.bounds, {})
        for i, a, s in zip(self.layers, alpha.split(self.sizes, 1), split.split(self.sizes, 1), strict=True):
            line, shape = lines[i], self.network.nodes[i].shape
            sign, fixed = s.to(alpha.dtype), s != 0
            sloped = torch.where(fixed, sign.clamp_min(0), a)

            def spread(value: Tensor, part: Tensor, i: int = i, shape: tuple[int, ...] = shape) -> Tensor:
                whole = value.flatten(1).expand(len(part), -1)
                return whole.index_copy(1, self.index[i], part).view(-1, *shape)

            upper = line.upper_slope.flatten(1)[:, self.index[i]]
            shift = line.upper_shift.flatten(1)[:, self.index[i]]
            lines[i] = Lines(
                spread(line.lower_slope, sloped),
                None,
                spread(line.upper_slope, torch.where(fixed, sign.clamp_min(0), upper)),
                spread(line.upper_shift, torch.where(fixed, 0, shift)),
            )
        return lines

    def multipliers(self, beta: Tensor, split: Tensor) -> dict[int, Tensor]:
        """−β at the input of a relu that is split to >= 0, +β where it is split to <= 0: for β >= 0 a form that is at
        most the original one wherever the splits hold."""
        found = {}
        signed = -beta * split.to(beta.dtype)
        for i, part in zip(self.layers, signed.split(self.sizes, 1), strict=True):
            node = self.network.nodes[i]
            zeros = part.new_zeros(len(part), node.size)
            found[i] = zeros.index_copy(1, self.index[i], part).view(-1, *node.shape)
        return found

    def bound(
        self,
        form: Tensor,
        alpha: Tensor,
        beta: Tensor,
        split: Tensor,
        *,
        proof: bool = False,
        watch: Callable | None = None,
    ) -> Tensor:
        """Lower bounds (r, d) of forms (r, d, *shape) over domains, in the dtype of ``alpha``; with ``proof`` their
        rounding is taken off."""
        exact = alpha.dtype == torch.float64
        network = self.network if exact else self.network.single
        region = self.bounds.region if exact else self.relaxation.region
        return backward(
            network,
            self.node,
            form,
            self.lines(alpha, split),
            region.expand(form.shape[1]),
            multipliers=self.multipliers(beta, split),
            watch=watch,
            mass=(self.bounds.mass if exact else self.mass) if proof else None,
        )


def branch(
    network: Network,
    bounds: Bounds,
    node: int,
    forms: Tensor,
    offsets: Tensor,
    *,
    deadline: float,
    watch: Callable[[Tensor], bool] = lambda points: False,
    steps: int = 15,
    limit: int | None = None,
) -> Outcome:
    """Proves that for each of k problems some row of forms (k, r, *shape) · (value of ``node``) + offsets (k, r) is
    above 0 everywhere on the region of ``bounds``.

    ``watch`` is given points (d, n) where the relaxations are least, and stops the search by True. Ends at ``deadline``
    (time.monotonic), after ``limit`` domains, or when no domain is left that can be split.
    """
    shared = Branching(network, bounds, node)
    rate = 0.1 * float(_coefficients(shared, forms).abs().mean() + 1e-12) if shared.layers else 0.1
    proved = torch.full((len(forms),), torch.inf, dtype=torch.float64)
    queue: list[tuple[float, int, Domain]] = []
    stuck: list[Domain] = []
    serial, done, stopped = itertools.count(), 0, False
    total = sum(shared.sizes)
    largest = max(item.size for item in network.nodes)
    batch = max(2, min(BATCH, VALUES // largest // forms.shape[1]))
    start = torch.cat(
        [shared.relaxation.fixed[i].lower_slope.flatten()[shared.index[i]] for i in shared.layers] or [torch.zeros(0)]
    )
    fresh = [
        Domain(k, -torch.inf, start.half(), torch.zeros(total).half(), torch.zeros(total, dtype=torch.int8), start)
        for k in range(len(forms))
    ]
    while fresh or queue:
        if not fresh:
            if stopped or time.monotonic() >= deadline or (limit is not None and done >= limit):
                break
            wanted = min(batch // 2, len(queue))
            if len(queue) * (5 * total + 500) < QUEUE:
                picked = [heapq.heappop(queue)[2] for _ in range(wanted)]
            else:  # those nearest to their proof, which leave no children behind
                queue.sort()
                picked = [queue.pop()[2] for _ in range(wanted)]
            fresh = _children(_ranked(shared, picked, forms, offsets, batch), batch)
        for at in range(0, len(fresh), batch):
            part = fresh[at : at + batch]
            bound, points, domains = _bounded(shared, part, forms, offsets, steps, rate, deadline)
            done += len(part)
            stopped = stopped or watch(points)
            for domain, value in zip(domains, bound.tolist(), strict=True):
                domain.bound = max(domain.bound, value)
                if value > 0:
                    proved[domain.problem] = min(proved[domain.problem], value)
                elif (domain.split == 0).any():
                    heapq.heappush(queue, (domain.bound, next(serial), domain))
                elif (value := _at_a_leaf(shared, domain, forms, offsets, watch)) > 0:
                    proved[domain.problem] = min(proved[domain.problem], value)
                else:
                    domain.bound = max(domain.bound, value)
                    stuck.append(domain)
        fresh = []
    for domain in [*stuck, *fresh, *(item[2] for item in queue)]:
        proved[domain.problem] = min(proved[domain.problem], domain.bound)
    return Outcome(proved, done, stopped)


def _at_a_leaf(shared: Branching, domain: Domain, forms: Tensor, offsets: Tensor, watch: Callable) -> float:
    """The proved bound of a domain without an unstable relu, by the multipliers of its linear program."""
    network, relaxation = shared.network, shared.relaxation
    if shared.bounds.region.radius is not None or any(
        _kind(network, i) != "relu" for i in network.activations if i < shared.node
    ):
        return domain.bound
    active, split = {}, {}
    parts = dict(zip(shared.layers, domain.split.split(shared.sizes), strict=True))
    for i in (i for i in network.activations if i < shared.node):
        sign = torch.zeros(network.nodes[i].size, dtype=torch.int8)
        on = relaxation.fixed[i].lower_slope.flatten().double()
        if i in parts:
            sign[shared.index[i]] = parts[i]
            on[shared.index[i]] = (parts[i] > 0).double()
        active[i], split[i] = on.view(network.nodes[i].shape), sign.view(network.nodes[i].shape)
    region, form = shared.bounds.region, forms[domain.problem]
    box = region.lower[0], region.upper[0]
    found = solved(network, shared.node, form, offsets[domain.problem], box, active, split)
    if found is None:
        return domain.bound
    weight, multipliers, x = found
    watch(x[None].float())
    # One form, the weighted sum of the rows: where it is above 0, some row is.
    beta = torch.cat([multipliers[i].flatten()[shared.index[i]] for i in shared.layers])[None]
    total = weight.sum().clamp_min(1e-9)
    share, offset = weight / total, offsets[domain.problem]
    one = torch.einsum("r,r...->...", share, form)[None, None]
    value = shared.bound(one, torch.zeros_like(beta), beta / total, domain.split[None], proof=True) + share @ offset
    # The sum of the rows is itself rounded.
    size = (form.flatten(1).abs() @ shared.bounds.mass[shared.node].flatten() + offset.abs()).sum()
    return max(domain.bound, float(value - 1e-14 * len(offset) * size))


def _coefficients(shared: Branching, forms: Tensor) -> Tensor:
    """The forms at the unstable relus under the default slopes."""
    found: dict[int, Tensor] = {}

    def keep(i: int, form: Tensor) -> None:
        if i in shared.index:
            found[i] = form.flatten(2)[:, :, shared.index[i]].flatten()

    fast = shared.network.single
    form = forms.float().flatten(0, 1)[:, None]
    backward(fast, shared.node, form, shared.relaxation.fixed, shared.relaxation.region, watch=keep)
    return torch.cat(list(found.values())) if found else torch.zeros(1)


def _ranked(shared: Branching, domains: list[Domain], forms: Tensor, offsets: Tensor, batch: int) -> list[Domain]:
    """The domains with their best relus in the order of what a split at each is worth: the sum of the bounds of the two
    halves, with the slopes of the whole (filtered smart branching, De Palma et al. 2021). A proved half counts as 0."""
    # A relu that has its sign is no candidate.
    counts = [min(CANDIDATES, int((domain.split == 0).sum())) for domain in domains]
    tried = [(d, relu) for d, count in zip(domains, counts, strict=True) for relu in d.score[:count].tolist()]
    worth = []
    for at in range(0, len(tried), batch):
        part = tried[at : at + batch]
        problem = torch.tensor([domain.problem for domain, _ in part])
        alpha = torch.stack([domain.alpha for domain, _ in part]).float()
        beta = torch.stack([domain.beta for domain, _ in part]).float()
        relus = torch.tensor([relu for _, relu in part])[:, None]
        form, offset = forms[problem].transpose(0, 1).float(), offsets[problem].T
        halves = []
        for sign in (1, -1):
            split = torch.stack([domain.split for domain, _ in part]).scatter(1, relus, sign)
            with torch.no_grad():
                halves.append((shared.bound(form, alpha, beta, split) + offset).amax(0))
        worth.append(halves[0].clamp_max(0) + halves[1].clamp_max(0))
    found = torch.cat(worth).split(counts)
    for domain, value in zip(domains, found, strict=True):
        order = value.argsort(descending=True)
        domain.score = torch.cat([domain.score[: len(order)][order], domain.score[len(order) :]])
    return domains


def _children(domains: list[Domain], batch: int) -> list[Domain]:
    """Each domain split at its best relus: at one, or where there are few domains at several."""
    levels = max(1, min(4, (batch // 8 // len(domains)).bit_length()))
    found = []
    for domain in domains:
        free = int((domain.split == 0).sum())
        chosen = domain.score[: min(levels, free)].tolist()
        for signs in itertools.product((1, -1), repeat=len(chosen)):
            split = domain.split.clone()
            split[chosen] = torch.tensor(signs, dtype=torch.int8)
            found.append(Domain(domain.problem, domain.bound, domain.alpha, domain.beta, split, domain.score))
    return found


def _bounded(
    shared: Branching,
    domains: list[Domain],
    forms: Tensor,
    offsets: Tensor,
    steps: int,
    rate: float,
    deadline: float,
) -> tuple[Tensor, Tensor, list[Domain]]:
    """Proved bounds (d,), the relaxations' minimisers (d, n), and the domains with their new slopes and scores."""
    problem = torch.tensor([domain.problem for domain in domains])
    exact_form, offset = forms[problem].transpose(0, 1), offsets[problem].T
    form = exact_form.float()
    alpha = torch.stack([domain.alpha for domain in domains]).float()
    beta = torch.stack([domain.beta for domain in domains]).float()
    split = torch.stack([domain.split for domain in domains])
    best = torch.full((len(domains),), -torch.inf, dtype=torch.float64)
    kept = [alpha.clone(), beta.clone()]
    ascents = [Adam(alpha), Adam(beta)]
    score, points = torch.zeros_like(alpha), form.new_zeros(len(domains), shared.network.inputs)
    if not shared.layers:
        steps = 0
    for step in range(steps + 1):
        watch = _Watch(shared) if step == steps else None
        leaves = [alpha.requires_grad_(), beta.requires_grad_()]
        with torch.enable_grad():
            rows = shared.bound(form, alpha, beta, split, watch=watch) + offset
            value = rows.amax(0)
            last = step == steps or time.monotonic() >= deadline or bool((value > 1e-6).all())
            if last and watch is None:
                watch = _Watch(shared)
                with torch.no_grad():
                    shared.bound(form, alpha, beta, split, watch=watch)
            gradients = [] if last else torch.autograd.grad(rows.sum(), leaves)
        alpha, beta, value = alpha.detach(), beta.detach(), value.detach()
        better = (value > best)[:, None]
        kept = [torch.where(better, new, old) for new, old in zip((alpha, beta), kept, strict=True)]
        best = torch.maximum(best, value)
        if last:
            assert watch is not None
            score = watch.score(rows.detach())
            points = watch.points(shared, rows.detach())
            break
        decay = DECAY**step
        alpha = ascents[0].step(alpha, gradients[0], RATE * decay).clamp(0, 1)
        beta = ascents[1].step(beta, gradients[1], rate * decay).clamp_min(0)
    alpha, beta = kept
    score = torch.where(split == 0, score, -1)
    order = score.argsort(1, descending=True)[:, :8]
    proof = (shared.bound(form, alpha, beta, split, proof=True) + offset).amax(0)
    if (near := (best > 0) & ~(proof > 0)).any():  # it is rounding that keeps these from their proof
        exact = shared.bound(exact_form[:, near], alpha[near].double(), beta[near].double(), split[near], proof=True)
        proof[near] = (exact + offset[:, near]).amax(0)
    ready = [
        Domain(d.problem, d.bound, a, b, s, o)
        for d, a, b, s, o in zip(domains, alpha.half(), beta.half(), split, order, strict=True)
    ]
    return proof, points, ready


class _Watch:
    """The forms that a pass met at the unstable relus and at the input."""

    def __init__(self, shared: Branching) -> None:
        self.index, self.gap, self.forms = shared.index, shared.gap, {}
        self.input = torch.zeros(0)

    def __call__(self, i: int, form: Tensor) -> None:
        if i == 0:
            self.input = form.detach()
        elif i in self.index:
            self.forms[i] = form.detach().flatten(2)[:, :, self.index[i]]

    def score(self, rows: Tensor) -> Tensor:
        """What splitting each relu may win (d, u): the chord's distance from the relu times the coefficient, where that
        is negative and so makes the chord count; elsewhere the slope below has been optimised, and little is won."""
        if not self.forms:
            return rows.new_zeros(rows.shape[1], 0)
        form = torch.cat([self.forms[i] for i in sorted(self.forms)], 2)
        return (self.gap * torch.where(form < 0, -form, 1e-3 * form)).amax(0)

    def points(self, shared: Branching, rows: Tensor) -> Tensor:
        region = shared.relaxation.region.expand(rows.shape[1])
        best = rows.argmax(0)
        return region.minimiser(self.input)[best, torch.arange(rows.shape[1])]
