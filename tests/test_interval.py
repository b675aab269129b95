"""Interval bounds: never left by a point of the box, exact where they can be, and the same by every way to train."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fdml
from fdml.attacks import pgd
from fdml.errors import InputError
from fdml.interval import Interval, box, certified, margins
from fdml.models import build
from fdml.threat import Threat


class Own(nn.Module):
    """A user's network: layers and operators that no backbone of ours has."""

    def __init__(self, gain: float = 0.5) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3)
        )
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 8), nn.Sigmoid(), nn.Linear(8, 3)
        )
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        seen = torch.nn.functional.leaky_relu(self.body(1 - 2 * x), 0.1)
        seen += self.norm(seen)[:, :, :, :]
        return -self.gain * self.head(seen).reshape(len(x), -1) / 0.5 + 1


def networks() -> dict[str, Callable[[], nn.Module]]:
    grey = {"input": (1, 16, 16), "classes": 5, "mean": (0.3,), "std": (0.2,)}
    return {
        "cnn": lambda: build("cnn", **grey, options={"width": 3}),
        "resnet18": lambda: build("resnet18", **grey, options={"width": 2}),
        "preact": lambda: build("resnet18", **grey, options={"width": 2, "preact": True}),
        "own": lambda: fdml.wrap(Own(), ["body"], mean=(0.3,), std=(0.2,)),
    }


@pytest.fixture(params=networks())
def network(request: pytest.FixtureRequest) -> nn.Module:
    """A network whose normalisation has seen a few batches, so that no statistic is a trivial one."""
    model = networks()[request.param]()
    for _ in range(3):
        model(torch.rand(8, 1, 16, 16))
    return model


def test_no_point_of_the_box_leaves_the_bounds(network: nn.Module) -> None:
    network.eval()
    x = torch.rand(6, 1, 16, 16)
    y = torch.arange(6) % 3
    for eps in (0.001, 0.02, 0.2):
        with torch.no_grad():
            bounds = network(box(x, x, eps))
            worst = margins(bounds, y)
            lower, upper = bounds.ends
            slack = 1e-5 * (1 + upper.abs().amax())
            for draw in range(60):
                part = torch.rand_like(x) if draw % 2 else (torch.rand_like(x) > 0.5).float()
                point = network((x + (2 * part - 1) * eps).clamp(0, 1))
                assert bool((point >= lower - slack).all() and (point <= upper + slack).all())
                assert bool((point - point.gather(1, y[:, None]) <= worst + slack).all())
        assert bool((worst <= (upper - lower.gather(1, y[:, None])).scatter(1, y[:, None], 0) + slack).all())


def test_a_box_without_size_is_the_image(network: nn.Module) -> None:
    """In training too: the bounds are normalised by what the images themselves gave."""
    x = torch.rand(8, 1, 16, 16)
    for mode in (True, False):
        network.train(mode)
        plain, bounds = network(x), network(box(x, x, 0.0))
        assert isinstance(bounds, Interval)
        for value in (bounds.nominal, *bounds.ends):
            torch.testing.assert_close(value, plain, atol=2e-4, rtol=1e-3)


def test_statistics_are_those_of_the_nominal_images(network: nn.Module) -> None:
    buffers = []
    x, other = torch.rand(8, 1, 16, 16), torch.rand(8, 1, 16, 16)
    before = {name: value.clone() for name, value in network.named_buffers()}
    network.train()
    for seen in (other, box(other, x, 0.1)):
        network.load_state_dict(before, strict=False)
        network(seen)
        buffers.append({name: value.clone() for name, value in network.named_buffers()})
    for name, value in buffers[0].items():
        torch.testing.assert_close(value, buffers[1][name])


def test_a_linear_layer_is_bounded_exactly() -> None:
    layer = nn.Linear(3, 4)
    x, eps = torch.rand(1, 3) * 0.4 + 0.3, 0.05
    bounds = layer(Interval.of(x, ends=(x - eps, x + eps)))
    corners = torch.stack([x[0] + eps * torch.tensor(signs) for signs in itertools.product((-1.0, 1.0), repeat=3)])
    with torch.no_grad():
        seen = layer(corners)
    torch.testing.assert_close(bounds.ends[0][0], seen.amin(0))
    torch.testing.assert_close(bounds.ends[1][0], seen.amax(0))
    y = torch.tensor([2])
    torch.testing.assert_close(margins(bounds, y)[0], (seen - seen[:, [2]]).amax(0))


def test_the_margin_of_outputs_that_no_linear_layer_gave() -> None:
    x = torch.tensor([[0.1, 0.5, 0.4]])
    bounds = Interval.of(x, ends=(x - 0.1, x + 0.1))
    torch.testing.assert_close(margins(bounds, torch.tensor([1])), torch.tensor([[-0.2, 0.0, 0.1]]))


def test_gradients_are_those_of_the_bounds() -> None:
    torch.manual_seed(3)
    weight = torch.randn(4, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    scale, head = (torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((4,), (3, 4)))
    x, y = torch.rand(2, 1, 5, 5, dtype=torch.float64), torch.tensor([0, 2])

    def worst(weight: Tensor, scale: Tensor, head: Tensor) -> Tensor:
        seen = torch.nn.functional.conv2d(box(x, x, 0.1), weight)
        seen = torch.nn.functional.batch_norm(seen, None, None, scale, training=True).relu()
        logits = torch.nn.functional.linear(seen.mean((2, 3)), head)
        assert isinstance(logits, Interval)
        return margins(logits, y)

    assert torch.autograd.gradcheck(worst, (weight, scale, head))


def test_several_processes_normalise_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The statistics of a global batch are sums of fdml's own, by operators in place of one kernel."""
    model = networks()["cnn"]().train()
    x, y = torch.rand(8, 1, 16, 16), torch.arange(8) % 5
    alone = margins(model(box(x, x, 0.05)), y)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 1)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda tensor: None)
    torch.testing.assert_close(margins(model(box(x, x, 0.05)), y), alone, atol=1e-3, rtol=1e-3)


def test_of_a_linear_network_all_is_certified_that_withstands_attack() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    x = torch.rand(100, 1, 8, 8)
    y = model(x).argmax(1)
    assert bool(certified(model, x, y, 0.0).all())
    assert not bool(certified(model, x, 1 - y, 0.0).any())
    eps = 0.05
    stands = certified(model, x, y, eps, batch_size=7)
    assert 10 < int(stands.sum()) < 90
    x_adv = pgd(model, x, y, Threat("linf", eps), steps=2, step_size=2 * eps)
    assert torch.equal(model(x_adv).argmax(1) == y, stands)


def test_in_place_is_as_out_of_place() -> None:
    conv, x = nn.Conv2d(1, 2, 3), torch.rand(2, 1, 6, 6)
    ends = []
    for inplace in (True, False):
        seen = conv(box(x, x, 0.1))
        later = conv.weight.new_ones(1) * seen  # asked for before the change
        lazy = torch.nn.functional.conv2d(seen, torch.ones(1, 2, 3, 3))
        active = torch.relu_(seen) if inplace else torch.relu(seen)
        assert isinstance(active, Interval)
        assert isinstance(lazy, Interval)
        assert (active is seen) is inplace
        ends.append([*active.ends, *later.ends, *lazy.ends])
    for one, other in zip(*ends, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda x: x.softmax(1), "softmax"),
        (lambda x: nn.functional.gelu(x), "gelu"),
        (lambda x: nn.functional.dropout(x), "dropout"),
        (lambda x: x * x, "constants"),
        (lambda x: 1 / x, "rdiv"),
        (lambda x: x.max(1).values, "max"),
        (lambda x: x.T, "T"),
        (lambda x: x.data, "data"),
        (lambda x: torch.cat([x, x]), "cat"),
    ],
)
def test_what_is_not_covered_is_named(function: Callable[[Tensor], Tensor], name: str) -> None:
    x = torch.rand(2, 3)
    with pytest.raises(InputError, match=name):
        function(Interval.of(x, ends=(x - 0.1, x + 0.1)))
