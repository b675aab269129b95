import time

import numpy as np
import pytest
import torch
from torch import nn

from fdml.certify.property import Clause, Property
from fdml.certify.search import confirm, inside, search


def rows(weight, offset) -> Clause:
    return Clause(torch.tensor(weight, dtype=torch.float64), torch.tensor(offset, dtype=torch.float64))


def box(lower, upper, *clauses, **ball) -> Property:
    return Property(
        torch.tensor(lower, dtype=torch.float64), torch.tensor(upper, dtype=torch.float64), tuple(clauses), **ball
    )


class Torch:
    """A network in the place of an ONNX file."""

    def __init__(self, network):
        self.network = network

    def run(self, x: np.ndarray) -> np.ndarray:
        return self.network(torch.from_numpy(x)).detach().numpy()


def one(result):
    """The result, of which there has to be one."""
    assert result is not None
    return result


def found(network, prop, **settings):
    for candidates in search(network, prop, **settings):
        if counter := confirm(Torch(network), prop, candidates):
            return counter
    return None


@pytest.mark.parametrize("seed", range(5))
def test_a_linear_network_is_refuted_exactly_when_its_corner_is(seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 8, generator=generator)
    best = weight[2].abs().sum().item()  # of y_2 over the box [-1, 1]

    def network(x):
        return x @ weight.T

    for share, refuted in ((0.999, True), (1.001, False)):
        prop = box([-1.0] * 8, [1.0] * 8, rows([[0, 0, 1]], [-share * best]))
        assert (found(network, prop, restarts=2) is not None) is refuted


def test_all_rows_of_one_clause_have_to_hold():
    # y_0 >= 0.9 or y_1 >= 0.9 is easy alone; both, and a third row, hold in a corner of the box only.
    both = rows([[1, 0], [0, 1], [-1, 1]], [-0.9, -0.9, 0.05])
    _x, y = one(found(lambda x: x, box([0.0, 0.0], [1.0, 1.0], rows([[1, 1]], [-2.1]), both)))
    assert (y >= 0.9).all()
    assert y[1] - y[0] >= -0.05
    assert found(lambda x: x, box([0.0, 0.0], [1.0, 0.89], both)) is None


def test_a_nonlinear_network_is_refuted_near_its_maximum():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(10, 50), nn.ReLU(), nn.Linear(50, 4))
    grid = network(torch.rand(20000, 10)).detach()
    # Above the best of 20,000 random points, for each output.
    for output in range(4):
        weight = [[float(i == output) for i in range(4)]]
        prop = box([0.0] * 10, [1.0] * 10, rows(weight, [-grid[:, output].max().item()]))
        assert found(network, prop, restarts=5) is not None


def test_points_stay_in_the_box_and_in_the_ball():
    torch.manual_seed(0)
    network = nn.Linear(30, 2)
    center = torch.rand(30, dtype=torch.float64)
    prop = Property(
        (center - 0.2).clamp(0, 1), (center + 0.2).clamp(0, 1), (rows([[1, -1]], [10]),), center=center, radius=0.3
    )
    everything = torch.cat(list(search(network, prop, steps=20))).double()
    assert len(everything) > 30
    assert ((everything >= prop.lower) & (everything <= prop.upper)).all()
    distance = (everything - center).norm(dim=1)
    assert 0.29 < distance.max() <= 0.3


def test_a_ball_is_refuted_along_the_gradient():
    weight = torch.tensor([[3.0, 4.0]])
    for offset, refuted in ((-0.499, True), (-0.501, False)):
        prop = box([-1.0] * 2, [1.0] * 2, rows([[1.0]], [offset]), center=torch.zeros(2).double(), radius=0.1)
        assert (found(lambda x: x @ weight.T, prop, restarts=4) is not None) is refuted


def test_the_same_seed_gives_the_same_points():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 2))
    prop = box([0.0] * 6, [1.0] * 6, rows([[1, -1]], [0]), rows([[-1, 1]], [0]))
    first, again, other = (list(search(network, prop, steps=5, seed=seed)) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(first, other, strict=False))


def test_given_starts_are_tried():
    # Flat but for a spike: no gradient leads there.
    def network(x):
        return 1 - 1e4 * (x - 0.123).abs().amax(1, keepdim=True).clamp_max(1e-3)

    prop = box([0.0] * 4, [1.0] * 4, rows([[1]], [-0.5]))
    assert found(network, prop) is None
    x, _ = one(found(network, prop, starts=torch.full((1, 4), 0.123)))
    np.testing.assert_allclose(x, 0.123, atol=1e-4)


def test_starts_are_spread_where_the_objective_is_flat():
    # y_0 is 0, with its gradient, but in the corner that y_1 leads to.
    def network(x):
        total = x.sum(1, keepdim=True)
        return torch.cat([(total - 18).relu(), total], 1)

    prop = box([0.0] * 20, [1.0] * 20, rows([[1, 0]], [-1]))
    assert found(network, prop, restarts=2) is None
    assert found(network, prop) is not None


def test_the_deadline_ends_the_search():
    calls = []

    def network(x):
        calls.append(len(x))
        return x

    prop = box([0.0], [1.0], rows([[1]], [-2]))
    assert list(search(network, prop, deadline=time.monotonic())) == []
    assert len(calls) == 1
    assert list(search(network, prop, steps=3, restarts=1)) == []
    assert len(calls) == 5


def test_bounds_are_rounded_inward_to_float32():
    lower, upper = inside(box([0.1, -0.1, 0.5, -1e-60], [0.3, 0.3, 0.5, 1e60]))
    assert lower.dtype == torch.float32
    lower, upper = lower.tolist(), upper.tolist()
    # As float64: numpy would round 0.1 to float32 before it compares.
    assert float(np.nextafter(np.float32(lower[0]), np.float32(-1))) < 0.1 <= lower[0]
    assert float(np.nextafter(np.float32(lower[1]), np.float32(-1))) < -0.1 <= lower[1]
    assert upper[0] <= 0.3 < float(np.nextafter(np.float32(upper[0]), np.float32(1)))
    assert lower[2] == upper[2] == 0.5
    assert lower[3] == 0
    assert upper[3] == np.finfo(np.float32).max
    assert inside(box([0.1], [0.1])) == (torch.tensor([0.1]), torch.tensor([0.1]))


def test_an_input_with_one_decimal_value_has_the_nearest_float32():
    prop = box([0.1, 0.0], [0.1, 1.0], rows([[1, 1]], [-1]))
    x, _ = one(found(lambda x: x, prop))
    assert x[0] == np.float32(0.1)
    x, _ = one(confirm(Torch(lambda x: x), prop, torch.tensor([[0.5, 0.95]])))
    assert x.tolist() == np.array([0.1, 0.95], np.float32).tolist()


def test_confirmation_moves_candidates_into_the_region():
    upper = 0.1  # float32(0.1) is above it
    prop = box([0.0], [upper], rows([[1.0]], [-0.05]))
    x, y = one(confirm(Torch(lambda x: x), prop, torch.tensor([[0.1], [0.06]])))
    assert 0.0999 < float(x[0]) <= upper
    assert x.dtype == np.float32
    assert y == x


def test_confirmation_has_no_tolerance():
    tie, below = rows([[1, -1]], [0]), rows([[1, -1]], [-1e-9])
    prop = box([0.0, 0.0], [1.0, 1.0], tie)
    candidates = torch.tensor([[0.5, 0.5]])
    assert confirm(Torch(lambda x: x), prop, candidates) is not None
    assert confirm(Torch(lambda x: x), box([0.0, 0.0], [1.0, 1.0], below), candidates) is None


def test_confirmation_believes_single_runs_and_finite_outputs_only():
    class Wobbling:
        def run(self, x):
            return x + (0.1 if len(x) > 1 else 0)

    prop = box([0.0], [1.0], rows([[1]], [-0.55]))
    candidates = torch.tensor([[0.5], [0.6]])
    x, y = one(confirm(Wobbling(), prop, candidates))
    assert x == y == np.float32(0.6)
    assert confirm(Wobbling(), prop, candidates[:1].repeat(2, 1)) is None
    for value in (np.inf, np.nan):
        assert confirm(Torch(lambda x, value=value: x + value), prop, candidates) is None
    assert confirm(Torch(lambda x: x), prop, torch.tensor([[torch.nan]])) is None


def test_rows_are_checked_exactly():
    # In float64, 1e17 + 1 - 1e17 and 1e17 - 1 - 1e17 are both 0.
    for middle, refuted in ((1, True), (-1, False)):
        prop = box([1.0] * 3, [1.0] * 3, rows([[1e17, middle, -1e17]], [0.0]))
        assert (confirm(Torch(lambda x: x), prop, torch.ones(1, 3)) is not None) is refuted
