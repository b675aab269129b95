"""Domains in which every relu has a known sign: the network is affine there, and a linear program decides."""

import numpy as np
import torch
from torch import Tensor

from fdml.certify.graph import Network
from fdml.certify.operators import Activation, Affine

PENALTY = 1e4  # of a broken constraint, relative to the largest number of the objective


def solved(
    network: Network,
    node: int,
    forms: Tensor,
    offset: Tensor,
    box: tuple[Tensor, Tensor],
    active: dict[int, Tensor],
    split: dict[int, Tensor],
) -> tuple[Tensor, dict[int, Tensor], Tensor] | None:
    """The least x of the largest row of forms (r, *shape) · (value of ``node``) + offset (r,), where relus are on as
    ``active`` says, (*shape) each, and x keeps the signs in ``split``, (*shape) in {−1, 0, 1}.

    Returns weights (r,) of the rows, a multiplier for each split and x (n,); they prove a bound when they are put into
    the backward pass, whatever this solver's own rounding is. None if the solver fails.
    """
    from scipy.optimize import linprog  # takes a second to import, and is seldom needed

    n = network.inputs
    # The affine maps, from the images of 0 and of the unit vectors.
    points = torch.cat([torch.zeros(1, n, dtype=torch.float64), torch.eye(n, dtype=torch.float64)])
    values = {0: points.reshape(-1, *network.nodes[0].shape)}
    rows, signs = [], []
    for i, item in enumerate(network.nodes[1 : node + 1], 1):
        if isinstance(item.operator, Activation):
            value = values[item.inputs[0]]
            kept = split[i].flatten()
            rows.append(value.flatten(1)[:, kept != 0])
            signs.append(kept[kept != 0].double())
            values[i] = value * active[i]
        else:
            assert isinstance(item.operator, Affine)
            values[i] = item.operator.forward(*(values[j] for j in item.inputs))
    goal = values[node].flatten(1) @ forms.flatten(1).T
    shift = (goal[0] + offset).numpy()
    slope = (goal[1:] - goal[0]).T.numpy()
    constraint, sign = torch.cat(rows, 1), torch.cat(signs)
    base = (constraint[0] * sign).numpy()
    tilt = ((constraint[1:] - constraint[0]) * sign).T.numpy()
    # Variables x, t, s: the least t + PENALTY s for which row(x) <= t and sign · value(x) >= −s.
    one, zero = np.ones, np.zeros
    above = np.block(
        [[slope, -one((len(shift), 1)), zero((len(shift), 1))], [-tilt, zero((len(base), 1)), -one((len(base), 1))]]
    )
    scale = max(1.0, float(np.abs(slope).max(initial=0)), float(np.abs(shift).max(initial=0)))
    limits = [*zip(box[0].tolist(), box[1].tolist(), strict=True), (None, None), (0, None)]
    found = linprog(
        [*[0.0] * n, 1.0, PENALTY * scale], above, np.concatenate([-shift, base]), bounds=limits, method="highs"
    )
    if found.status != 0:
        return None
    duals = torch.from_numpy(-found.ineqlin.marginals).clamp_min(0)
    weight, rest = duals[: len(shift)], duals[len(shift) :]
    multipliers = {}
    for i, kept in split.items():
        flat = torch.zeros(kept.numel(), dtype=torch.float64)
        count = int((kept != 0).sum())
        flat[kept.flatten() != 0], rest = rest[:count], rest[count:]
        multipliers[i] = flat.view_as(kept)
    return weight, multipliers, torch.from_numpy(found.x[:n])
