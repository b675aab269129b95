import pytest
import torch
from networks import any_network, dense, values
from torch import Tensor

from fdml.certify.bounds import Bounds, backward, crown, crown_margins, interval, margins
from fdml.certify.graph import Network
from fdml.certify.region import Region, robust
from fdml.certify.relax import lines_of
from fdml.certify.slopes import optimised, tightened
from fdml.errors import InputError


def boxes(network: Network, count: int, seed: int) -> Region:
    generator = torch.Generator().manual_seed(seed)
    center = torch.randn(count, network.inputs, generator=generator, dtype=torch.float64)
    reach = 0.3 * torch.rand(count, network.inputs, generator=generator, dtype=torch.float64)
    if seed % 4 == 3:
        radius = 0.3 * torch.rand(count, generator=generator, dtype=torch.float64)
        return Region(center - reach, center + reach, center, radius)
    return Region(center - reach, center + reach)


def inside(region: Region, x: Tensor) -> Tensor:
    """x (k, d, n) moved into the regions."""
    if region.center is not None and region.radius is not None:
        away = x - region.center
        x = region.center + away * (region.radius[:, None] / away.norm(dim=2, keepdim=True)).clamp_max(1)
    return torch.minimum(torch.maximum(x, region.lower), region.upper)


def points_of(network: Network, region: Region, weight: Tensor, count: int) -> Tensor:
    """``count`` random points (k, d, n), 24 more, and what some steps of ascent on ±weight · outputs make of them."""
    d, n = region.lower.shape
    share = torch.rand(24, d, n, dtype=torch.float64)
    share[::3] = share[::3].round()
    x = inside(region, region.lower + share * (region.upper - region.lower))
    found = [x]
    sign = torch.where(torch.arange(24) % 2 == 0, 1.0, -1.0).double()
    for step in (0.5, 0.25, 0.1):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = network.forward(x.flatten(0, 1)).view(24, d, -1)
            (torch.einsum("kdm,dm->kd", y, weight) * sign[:, None]).sum().backward()
        assert x.grad is not None
        x = inside(region, x.detach() + step * sign[:, None, None] * x.grad.sign() * (region.upper - region.lower))
        found.append(x)
    share = torch.rand(count, d, n, dtype=torch.float64)
    return torch.cat([*found, inside(region, region.lower + share * (region.upper - region.lower))])


def check_contained(network: Network, bounds: Bounds, points: Tensor) -> None:
    """The points (k, d, n) give values at the activations' inputs that are within the bounds."""
    k, d = points.shape[:2]
    found = values(network, points.flatten(0, 1))
    for i, (lower, upper) in bounds.before.items():
        (j,) = network.nodes[i].inputs
        value = found[j].view(k, d, *lower.shape[1:])
        assert (value >= lower).all()
        assert (value <= upper).all()


@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("part", range(4))
def test_no_point_leaves_the_bounds(part: int, count: int) -> None:
    """200 networks, two regions each, ``count`` random and 96 climbing points a region: no slack is allowed."""
    for seed in range(50 * part, 50 * part + 50):
        torch.manual_seed(seed)
        network = any_network(seed)
        region = boxes(network, 2, seed)
        weight = torch.randn(2, network.outputs, dtype=torch.float64)
        points = points_of(network, region, weight, count)
        with torch.no_grad():
            outputs = network.forward(points.flatten(0, 1)).view(len(points), 2, -1)
            lower, upper = interval(network, region)
            assert (outputs >= lower).all()
            assert (outputs <= upper).all()
            plain = crown(network, region)
            tight = tightened(network, plain, steps=3) if seed % 3 == 0 else plain
            least = torch.einsum("kdm,dm->kd", outputs, weight).amin(0)
            form = weight.view(1, 2, *network.nodes[-1].shape)
            zero = torch.zeros(1, 2, dtype=torch.float64)
            for bounds in (plain, tight):
                check_contained(network, bounds, points)
                proved = margins(network, bounds, weight[:, None])[:, 0]
                better = optimised(network, bounds, form, zero - 1e9, steps=3)[0] + 1e9
                assert (proved <= least).all()
                assert (better <= least + 1e-6).all()


def test_optimised_slopes_are_no_worse_and_help() -> None:
    gains = []
    for seed in range(10):
        network = dense(4, 20, 20, 20, 1, seed=seed)
        region = boxes(network, 1, 4 * seed)
        with torch.no_grad():
            plain = crown(network, region)
            tight = tightened(network, plain, steps=20)
            form, offset = torch.ones(1, 1, 1, dtype=torch.float64), torch.full((1, 1), -1e3, dtype=torch.float64)
            first = margins(network, plain, form)[0, 0] - 1e3
            second = optimised(network, plain, form, offset, steps=20)[0, 0]
            third = optimised(network, tight, form, offset, steps=20)[0, 0]
        for i, (lower, upper) in tight.before.items():
            assert (lower >= plain.before[i][0]).all()
            assert (upper <= plain.before[i][1]).all()
        assert interval(network, region)[0][0, 0] - 1e3 <= first + 1e-6
        gains.append((float(second - first), float(third - second)))
    assert sum(gain[0] for gain in gains) > 0
    assert sum(gain[1] for gain in gains) > 0


def test_bounds_of_a_linear_network_are_exact() -> None:
    network = dense(4, 3)
    region = boxes(network, 2, 0)
    operator = network.nodes[-1].operator
    weight, bias = operator.weight, operator.bias  # pyright: ignore
    lower = (weight.clamp_min(0) @ region.lower.T + weight.clamp_max(0) @ region.upper.T).T + bias
    torch.testing.assert_close(interval(network, region)[0], lower)
    eye = torch.eye(3, dtype=torch.float64).expand(2, -1, -1)
    torch.testing.assert_close(margins(network, crown(network, region), eye), lower)


def test_a_ball_bounds_better_than_its_box() -> None:
    network = dense(8, 10, 1)
    center = torch.zeros(1, 8, dtype=torch.float64)
    box = Region(center - 0.5, center + 0.5)
    ball = Region(center - 0.5, center + 0.5, center, torch.tensor([0.5], dtype=torch.float64))
    form = torch.ones(1, 1, 1, dtype=torch.float64)
    assert margins(network, crown(network, ball), form) > margins(network, crown(network, box), form)
    linear = dense(8, 1)
    weight = linear.nodes[-1].operator.weight  # pyright: ignore
    expected = -0.5 * weight.norm() + linear.nodes[-1].operator.bias  # pyright: ignore
    torch.testing.assert_close(margins(linear, crown(linear, ball), form)[0], expected)


@pytest.mark.parametrize("kind", ["relu", "sigmoid", "tanh"])
def test_lines_enclose_the_activation(kind: str) -> None:
    ends = torch.cat([torch.randn(400, 2), 30 * torch.randn(100, 2), 1e-6 * torch.randn(100, 2)]).double().sort(1)[0]
    ends = torch.cat([ends, torch.tensor([[0.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [2.0, 2.0], [-800.0, 800.0]]).double()])
    lower, upper = ends[:, :1], ends[:, 1:]
    lines = lines_of(kind, lower, upper)
    x = lower + torch.linspace(0, 1, 501).double() * (upper - lower)
    y = getattr(torch, kind)(x)
    shift = 0 if lines.lower_shift is None else lines.lower_shift
    slack = 1e-15 * (1 + x.abs())
    assert (lines.lower_slope * x + shift <= y + slack).all()
    assert (lines.upper_slope * x + lines.upper_shift >= y - slack).all()


def test_the_rounding_that_is_taken_off_covers_float32() -> None:
    """A backward pass in float32 stays below the same one in float64, and not by much more than it errs."""
    gaps = []
    for seed in range(1, 40, 2):
        network = any_network(seed)
        region = boxes(network, 2, 4 * seed)
        bounds = crown(network, region)
        form = torch.randn(3, 2, *network.nodes[-1].shape, dtype=torch.float32)
        last = len(network.nodes) - 1
        lines, single = bounds.lines(network, torch.float32), region.single()
        rounded = {i: line.to(torch.float64) for i, line in lines.items()}
        same = Region(single.lower.double(), single.upper.double())
        exact = backward(network.single.to(torch.float64), last, form.double(), rounded, same)
        plain = backward(network.single, last, form, lines, single)
        proved = backward(network.single, last, form, lines, single, mass=bounds.mass)
        error, allowed = (plain - exact).abs(), plain - proved
        assert (proved < exact).all()
        assert (error < allowed).all()
        gaps.append(float((allowed / error.clamp_min(1e-30)).min()))
    assert min(gaps) < 1e4  # the allowance is no empty gesture


def test_crown_margins_of_images() -> None:
    network = dense(6, 20, 20, 4, seed=3)
    x = torch.rand(5, 6)
    labels = network.forward(x).argmax(1)
    found = crown_margins(network, x - 0.01, x + 0.01, labels)
    assert found.shape == (5,)
    y = network.forward(x)
    other = y.scatter(1, labels[:, None], -torch.inf).amax(1)
    assert (found <= y.gather(1, labels[:, None])[:, 0] - other).all()
    one = torch.cat(
        [crown_margins(network, x[i : i + 1] - 0.01, x[i : i + 1] + 0.01, labels[i : i + 1]) for i in range(5)]
    )
    torch.testing.assert_close(found, one)


def test_robustness_as_a_property() -> None:
    x = torch.tensor([0.05, 0.5, 0.95])
    prop = robust(x, 1, 3, norm="linf", eps=0.1)
    assert prop.lower[0] == 0
    assert prop.upper[2] == 1
    assert prop.lower[1] <= float(x[1]) - 0.1
    assert prop.upper[1] >= float(x[1]) + 0.1
    assert prop.upper[1] <= float(x[1]) + 0.1 + 1e-12
    assert len(prop.clauses) == 2
    y = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    assert [float(clause.weight @ y) for clause in prop.clauses] == [-1, 1]
    assert robust(x, 1, 3, norm="l2", eps=0.1).radius == 0.1
    for wrong, message in (({"label": 3}, "label 3"), ({"eps": -1}, "eps is -1"), ({"norm": "l1"}, "norm 'l1'")):
        with pytest.raises(InputError, match=message):
            robust(x, **{"label": 1, "classes": 3, "norm": "linf", "eps": 0.1} | wrong)  # pyright: ignore
