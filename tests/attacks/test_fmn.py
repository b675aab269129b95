"""FMN: closed forms of linear models, the boundary, and what ``enough`` spares."""

import math

import pytest
import torch
from torch import Tensor, nn

from fdml.attacks.fmn import fmn
from fdml.attacks.projection import DUAL, length
from fdml.errors import InputError
from fdml.threat import NORMS, Threat

each_norm = pytest.mark.parametrize("norm", NORMS)
SHAPE = (1, 8, 8)


def curved(classes: int = 4) -> nn.Module:
    """A small net in which no class prevails."""
    layers = [nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, classes)]
    model = nn.Sequential(*layers)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
        layers[1].bias.copy_(-layers[1].weight.sum(1) / 2)
        layers[3].bias.zero_()
    return model


@torch.no_grad()
def answers(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).argmax(1)


@pytest.mark.parametrize(
    ("norm", "steps", "scale"), [("linf", 20, 1.0), ("l2", 40, 1.0), ("l2", 40, 1e-3), ("l1", 90, 1.0)]
)
def test_on_a_linear_model_the_shortest_distance_is_reached(norm: str, steps: int, scale: float) -> None:
    model = nn.Sequential(nn.Flatten(), layer := nn.Linear(math.prod(SHAPE), 2))
    with torch.no_grad():
        layer.weight.normal_(0, scale)
        layer.bias.copy_(-layer.weight.sum(1) / 2)
    x = 0.4 + 0.2 * torch.rand(16, *SHAPE)
    y = answers(model, x)
    normal, gap = layer.weight.detach().diff(dim=0), model(x).detach().diff(dim=1).abs().squeeze(1)
    # In l1 the shortest way is one pixel's: where the box lets it go so far.
    clear = gap < 0.39 * normal.abs().max()
    assert clear.sum() >= 8
    x_adv = fmn(model, x, y, norm, steps=steps)
    assert (answers(model, x_adv) != y).all()
    found = length((x_adv - x).flatten(1), norm)[clear]
    torch.testing.assert_close(found, (gap / length(normal, DUAL[norm]))[clear], rtol=1e-3, atol=1e-5)


@each_norm
@pytest.mark.parametrize("classes", [2, 3, 5])
def test_what_is_found_lies_on_the_boundary(norm: str, classes: int) -> None:
    model, x = curved(classes), torch.rand(12, *SHAPE)
    y = answers(model, x)
    # So few steps end somewhere: the search along the line to x makes up for it.
    x_adv = fmn(model, x, y, norm, steps=10)
    assert (answers(model, x_adv) != y).double().mean() > 0.9
    moved = (x_adv != x).flatten(1).any(1)
    assert torch.equal(moved, answers(model, x_adv) != y)
    assert (answers(model, x + 0.99 * (x_adv - x)) == y).double().mean() > 0.9


def test_more_steps_find_nearer_points() -> None:
    model, x = curved(), torch.rand(32, *SHAPE)
    y = answers(model, x)
    few, many = (length((fmn(model, x, y, "l2", steps=steps) - x).flatten(1), "l2") for steps in (4, 30))
    assert (few > 0).all()
    assert many.mean() < 0.97 * few.mean()
    assert (many < 1.02 * few).double().mean() > 0.9


def test_the_radius_grows_until_something_is_found() -> None:
    """foolbox's L1 attack fools half of a Fashion-MNIST network: its radius follows an estimate that stays small."""

    def saw(x: Tensor) -> Tensor:
        # Each tooth promises the boundary within 1e-3; it is 0.2 away.
        level = x.flatten(1).mean(1) - 0.5
        rise = torch.where(level < 0.2, 1e3 * (level % 1e-4) - 1, 1 + level)
        return torch.stack([-rise, rise], 1)

    x, y = torch.full((2, *SHAPE), 0.5, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    x_adv = fmn(saw, x, y, "linf", steps=100)
    assert (saw(x_adv).argmax(1) == 1).all()


def test_an_image_leaves_once_it_has_enough() -> None:
    model, x = curved(), torch.rand(16, *SHAPE)
    y, seen = answers(model, x), []

    def counted(images: Tensor) -> Tensor:
        seen.append(len(images))
        return model(images)

    radius = length((fmn(model, x, y, "linf", steps=10) - x).flatten(1), "linf")
    threat = Threat("linf", radius.sort().values[11].item() * 1.05)
    x_adv = fmn(counted, x, y, "linf", steps=30, enough=threat.eps)
    assert (answers(model, x_adv) != y).all()
    assert threat.contains(x_adv, x).sum() >= 12
    # Nobody who is found on the ball of eps looks for a smaller one.
    assert seen == sorted(seen, reverse=True)
    assert seen[15] <= 4


@pytest.mark.parametrize(
    ("norm", "options", "message"),
    [
        ("l3", {}, "l3"),
        ("l2", {"steps": 0}, "steps must be at least 1, got 0"),
        ("l2", {"enough": -1.0}, "-1"),
        ("l2", {"objective": "gain"}, "gain"),
    ],
)
def test_wrong_arguments_are_refused(norm: str, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        fmn(curved(), torch.rand(2, *SHAPE), torch.zeros(2, dtype=torch.int64), norm, **options)
