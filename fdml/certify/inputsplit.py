"""Branch and bound over the inputs: for few inputs better than over the relus."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from fdml.certify.bounds import MEMORY, backward, crown
from fdml.certify.graph import Network
from fdml.certify.region import Region

BATCH = 512  # boxes at once, at most


def split_inputs(
    network: Network,
    region: Region,
    forms: Tensor,
    offsets: Tensor,
    *,
    deadline: float,
    watch: Callable[[Tensor], None] = lambda points: None,
) -> tuple[Tensor, int]:
    """Proves that for each of k problems some row of forms (k, r, *shape) · outputs + offsets (k, r) is above 0
    everywhere on the one box of ``region``, by CROWN on ever smaller boxes.

    Returns the proved bounds (k,) and the number of boxes that were bounded. A box is halved along the input whose
    width times coefficient, summed over the undecided problems, is largest. ``watch`` is given points (b, n) of the
    boxes. Ends at ``deadline`` (time.monotonic), or when no box is left that float64 can halve.
    """
    assert len(region) == 1
    assert region.radius is None
    problems, rows = forms.shape[:2]
    proved = torch.full((problems,), torch.inf, dtype=torch.float64)
    largest = max(node.size for node in network.nodes)
    batch = max(1, min(BATCH, MEMORY // (64 * largest * max(8, problems * rows))))
    wait = [region.lower, region.upper]
    least = torch.full((1,), -torch.inf, dtype=torch.float64)
    stuck = torch.full((problems,), torch.inf, dtype=torch.float64)
    known = torch.full((1, problems), -torch.inf, dtype=torch.float64)
    done = 0
    while len(least) and time.monotonic() < deadline:
        # The least bound first: it is where a counter-example may be, and what the result waits for.
        order = least.argsort() if len(least) > batch else torch.arange(len(least))
        now, later = order[:batch], order[batch:]
        boxes = Region(wait[0][now], wait[1][now])
        found, weight = _bounded(network, boxes, forms, offsets)
        found = torch.maximum(found, known[now])
        done += len(now)
        proved = torch.minimum(proved, torch.where(found > 0, found, torch.inf).amin(0))
        open_ = (found <= 0).any(1)
        boxes, found, weight = boxes.rows(open_), found[open_], weight[open_]
        if len(boxes):
            watch(((boxes.lower + boxes.upper) / 2).float())
        middle = (boxes.lower + boxes.upper) / 2
        can = (middle > boxes.lower) & (middle < boxes.upper)
        whole = ~can.any(1)
        if whole.any():
            stuck = torch.minimum(stuck, found[whole].amin(0))
        axis = torch.where(can, weight * (boxes.upper - boxes.lower), -1).argmax(1, keepdim=True)[~whole]
        boxes, found, middle = boxes.rows(~whole), found[~whole], middle[~whole]
        cut = middle.gather(1, axis)
        lower, upper = boxes.lower.scatter(1, axis, cut), boxes.upper.scatter(1, axis, cut)
        wait = [
            torch.cat([wait[0][later], boxes.lower, lower]),
            torch.cat([wait[1][later], upper, boxes.upper]),
        ]
        known = torch.cat([known[later], found, found])
        least = known.amin(1)
    for rest in (known, stuck[None]):
        if len(rest):
            proved = torch.minimum(proved, rest.amin(0))
    return proved, done


def _bounded(network: Network, region: Region, forms: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds (d, k) of the problems on each box, and the inputs' weights in those that are undecided, (d, n)."""
    bounds = crown(network, region)
    problems, rows = forms.shape[:2]
    seen: list[Tensor] = []

    def keep(i: int, form: Tensor) -> None:
        if i == 0:
            seen.append(form.abs())

    form = forms.flatten(0, 1)[:, None].expand(-1, len(region), *forms.shape[2:])
    lines = bounds.lines(network, torch.float64)
    found = backward(network, len(network.nodes) - 1, form, lines, region, watch=keep, mass=bounds.mass)
    found = found.view(problems, rows, -1) + offsets[:, :, None]
    found = found.amax(1).T
    weight = seen[0].view(problems, rows, len(region), -1).sum(1)
    return found, torch.einsum("kdn,dk->dn", weight, (found <= 0).double())
