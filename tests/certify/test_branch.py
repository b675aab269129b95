import itertools
import time

import numpy as np
import pytest
import torch
from networks import dense
from scipy.optimize import Bounds as Limits
from scipy.optimize import LinearConstraint, milp
from torch import Tensor

from fdml.certify.bounds import crown
from fdml.certify.branch import branch
from fdml.certify.graph import Network
from fdml.certify.inputsplit import split_inputs
from fdml.certify.region import Region
from fdml.certify.slopes import tightened


def least(network: Network, region: Region, form: Tensor) -> float:
    """The exact minimum of form (m,) · outputs of a fully connected relu network, as a mixed-integer program: for
    z = relu(p), z >= 0, z >= p, z <= p − l (1 − a), z <= u a with a in {0, 1}."""
    bounds = crown(network, region)
    rows: list[tuple[np.ndarray, float, float]] = []
    low, high = region.lower[0].tolist(), region.upper[0].tolist()
    whole = [0] * len(low)
    current = np.eye(len(low))
    shift = np.zeros(len(low))
    places = np.arange(len(low))
    for i, node in enumerate(network.nodes[1:], 1):
        if i not in bounds.before:
            weight, bias = node.operator.weight.numpy(), node.operator.bias.numpy()  # pyright: ignore
            current, shift = weight, bias
            continue
        lower, upper = (bound[0].numpy() for bound in bounds.before[i])
        first = len(low)
        for k in range(len(lower)):
            low += [0.0, 0.0]
            high += [max(0.0, upper[k]), 1.0]
            whole += [0, 1]
            z, a = first + 2 * k, first + 2 * k + 1
            p = {int(j): current[k, n] for n, j in enumerate(places)}
            rows += [
                ({z: 1.0} | {j: -w for j, w in p.items()}, shift[k], np.inf),
                ({z: 1.0, a: -lower[k]} | {j: -w for j, w in p.items()}, -np.inf, shift[k] - lower[k]),
                ({z: 1.0, a: -upper[k]}, -np.inf, 0.0),
            ]  # pyright: ignore
        places = first + 2 * np.arange(len(lower))
    matrix = np.zeros((len(rows), len(low)))
    for r, (entries, _, _) in enumerate(rows):
        for j, w in entries.items():  # pyright: ignore
            matrix[r, j] = w
    cost = np.zeros(len(low))
    cost[places] = form.numpy() @ current
    # SciPy takes arrays where its annotations say float.
    constraint = LinearConstraint(matrix, [row[1] for row in rows], [row[2] for row in rows])  # pyright: ignore
    limits = Limits(low, high)  # pyright: ignore
    found = milp(cost, integrality=whole, bounds=limits, constraints=constraint)
    assert found.success
    return float(found.fun + form.numpy() @ shift)


def case(seed: int) -> tuple[Network, Region, Tensor, float]:
    network = dense(3, 6, 6, 2, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    center = torch.randn(1, 3, generator=generator, dtype=torch.float64)
    region = Region(center - 0.8, center + 0.8)
    form = torch.randn(2, generator=generator, dtype=torch.float64)
    return network, region, form, least(network, region, form)


@pytest.mark.parametrize("method", ["relus", "tightened", "inputs"])
def test_verdicts_are_those_of_an_exact_method(method: str) -> None:
    wrong = []
    for seed in range(12):
        network, region, form, exact = case(seed)
        with torch.no_grad():
            bounds = crown(network, region)
            if method == "tightened":
                bounds = tightened(network, bounds, steps=5)
            margin = 0.1 if method == "inputs" else 0.01
            for shift, holds in ((-margin, False), (margin, True)):
                forms, offsets = form.view(1, 1, 2), torch.tensor([[shift - exact]], dtype=torch.float64)
                deadline = time.monotonic() + 60
                if method == "inputs":
                    found, _ = split_inputs(
                        network, region, forms, offsets, deadline=time.monotonic() + 60 * holds + 0.05
                    )
                else:
                    found = branch(network, bounds, 5, forms, offsets, deadline=deadline, limit=4000).bound
                if bool(found > 0) != holds:
                    wrong.append((seed, holds, float(found)))
                assert found <= shift + 1e-6  # never more than the exact margin
    assert not wrong


def test_a_conjunction_is_decided_by_any_of_its_rows() -> None:
    network, region, form, exact = case(0)
    bounds = crown(network, region)
    forms = torch.stack([form, -form])[None].view(1, 2, 2)
    offsets = torch.tensor([[0.01 - exact, -1e3]], dtype=torch.float64)
    found = branch(network, bounds, 5, forms, offsets, deadline=time.monotonic() + 60)
    assert found.bound > 0
    assert split_inputs(network, region, forms, offsets, deadline=time.monotonic() + 60)[0] > 0


def test_problems_are_told_apart() -> None:
    network, region, form, exact = case(1)
    bounds = crown(network, region)
    forms = form.view(1, 1, 2).repeat(3, 1, 1)
    offsets = torch.tensor([[0.01 - exact], [-0.01 - exact], [1 - exact]], dtype=torch.float64)
    found = branch(network, bounds, 5, forms, offsets, deadline=time.monotonic() + 60, limit=4000).bound
    assert (found > 0).tolist() == [True, False, True]


def test_the_search_is_stopped_and_sees_points_of_the_region() -> None:
    network, region, form, exact = case(2)
    bounds = crown(network, region)
    seen = []

    def watch(points: Tensor) -> bool:
        seen.append(points)
        return True

    offsets = torch.tensor([[-exact - 0.01]], dtype=torch.float64)
    found = branch(network, bounds, 5, form.view(1, 1, 2), offsets, deadline=time.monotonic() + 60, watch=watch)
    assert found.stopped
    assert not found.bound > 0
    (points,) = seen
    assert ((points >= region.lower - 1e-6) & (points <= region.upper + 1e-6)).all()


def test_without_time_the_root_bound_is_returned() -> None:
    network, region, form, exact = case(3)
    forms, offsets = form.view(1, 1, 2), torch.tensor([[-exact]], dtype=torch.float64)
    found = branch(network, crown(network, region), 5, forms, offsets, deadline=time.monotonic() - 1)
    assert found.domains == 1
    assert torch.isfinite(found.bound).all()
    bound, count = split_inputs(network, region, forms, offsets, deadline=time.monotonic() - 1)
    assert count == 0
    assert bound == -torch.inf


def test_every_part_of_a_split_is_kept() -> None:
    from fdml.certify.branch import Domain, _children

    parent = Domain(
        0,
        -1.0,
        torch.zeros(4),
        torch.zeros(4),
        torch.tensor([0, 1, 0, 0], dtype=torch.int8),
        torch.tensor([2, 0, 3, 1]),
    )
    found = {tuple(child.split.tolist()) for child in _children([parent], 256)}
    assert found == {(a, 1, b, c) for a, b, c in itertools.product((1, -1), repeat=3)}
