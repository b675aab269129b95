"""The controls: random points of the threat model, and rotations and translations."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdml.attacks.controls import noise, spatial
from fdml.errors import InputError
from fdml.losses import margin
from fdml.randomness import Streams
from fdml.threat import NORMS, Threat

each_norm = pytest.mark.parametrize("norm", NORMS)
RADIUS = {"linf": 0.2, "l2": 1.0, "l1": 4.0}


def linear(classes: int = 3, bias: float = 0.0) -> nn.Sequential:
    """Label 0 has ``bias`` more than the others."""
    layer = nn.Linear(64, classes)
    with torch.no_grad():
        layer.weight.normal_(0, 0.1)
        layer.bias.zero_()
        layer.bias[0] = bias
    return nn.Sequential(nn.Flatten(), layer).double()


def images(n: int = 6) -> Tensor:
    return torch.rand(n, 1, 8, 8, dtype=torch.float64)


def streams(index: Tensor) -> Streams:
    return Streams.of(index, 0)


class Spy:
    """A model that remembers what it was asked."""

    def __init__(self, model: Callable[[Tensor], Tensor]) -> None:
        self.model, self.asked = model, []

    def __call__(self, x: Tensor) -> Tensor:
        self.asked.append(x.clone())
        return self.model(x)


def only(wanted: Tensor) -> Callable[[Tensor], Tensor]:
    """A model of two classes that answers 1 on the one image ``wanted``, and 0 with more margin the farther from it."""

    def model(x: Tensor) -> Tensor:
        far = (x - wanted).flatten(1).norm(dim=1)
        return torch.stack([far - 1e-3, torch.zeros_like(far)], 1)

    return model


@each_norm
def test_noise_is_the_worst_of_what_it_asked(norm: str) -> None:
    threat, x, y = Threat(norm, RADIUS[norm]), images(), torch.zeros(6, dtype=torch.long)
    spy = Spy(linear(bias=10.0))
    found = noise(spy, x, y, threat, draws=12, generator=streams(torch.arange(6)))
    asked = torch.stack(spy.asked)
    assert asked.shape[0] == 13, "the clean images and every draw"
    assert torch.equal(asked[0], x)
    assert all(threat.contains(points, x).all() for points in asked)
    margins = torch.stack([margin(spy.model(points), y) for points in asked])
    assert torch.equal(found, asked[margins.argmax(0), torch.arange(6)])
    assert len(asked.flatten(2)[1:].unique(dim=0)) == 12


def test_half_of_the_draws_are_corners() -> None:
    threat, x = Threat("linf", 0.1), 0.2 + 0.6 * images()
    spy = Spy(linear(bias=10.0))
    noise(spy, x, torch.zeros(6, dtype=torch.long), threat, draws=10, generator=streams(torch.arange(6)))
    size = (torch.stack(spy.asked[1:]) - x).abs()
    assert ((size - 0.1).abs() < 1e-12).flatten(1).all(1).tolist() == [True, False] * 5


@each_norm
def test_what_is_fooled_is_asked_no_more(norm: str) -> None:
    x, y = images(), torch.tensor([0, 0, 0, 1, 0, 1])
    spy = Spy(linear(classes=2, bias=10.0))
    found = noise(spy, x, y, Threat(norm, 1.0), draws=5, generator=streams(torch.arange(6)))
    assert [len(points) for points in spy.asked] == [6, 4, 4, 4, 4, 4]
    assert torch.equal(found[y == 1], x[y == 1]), "an image that is answered wrongly already is left as it is"


def test_more_draws_are_never_weaker() -> None:
    model, x, y, threat = linear(bias=10.0), images(), torch.zeros(6, dtype=torch.long), Threat("linf", 0.2)
    worst = [
        margin(model(noise(model, x, y, threat, draws=draws, generator=streams(torch.arange(6)))), y)
        for draws in (1, 5, 25)
    ]
    assert (worst[0] <= worst[1]).all()
    assert (worst[1] <= worst[2]).all()
    assert (margin(model(x), y) <= worst[0]).all()
    assert (worst[0] < worst[2]).any()


@each_norm
def test_the_batch_changes_no_outcome(norm: str) -> None:
    model, x, y, threat = linear(), images(), torch.tensor([0, 1, 2, 0, 1, 2]), Threat(norm, RADIUS[norm] / 4)
    together = noise(model, x, y, threat, draws=20, generator=streams(torch.arange(6)))
    for index in (torch.tensor([3]), torch.tensor([4, 0, 2])):
        alone = noise(model, x[index], y[index], threat, draws=20, generator=streams(index))
        torch.testing.assert_close(alone, together[index], atol=1e-12, rtol=0)


@pytest.mark.parametrize("turns", [-1, 1])
def test_a_quarter_turn(turns: int) -> None:
    x = images(1)
    turned = torch.rot90(x, turns, (2, 3))
    found = spatial(only(turned), x, torch.tensor([0]), degrees=90, shift=0, grid=(3, 1))
    torch.testing.assert_close(found, turned)


@pytest.mark.parametrize(("right", "down"), [(2, 0), (-2, 2), (0, -2)])
def test_a_shift_by_whole_pixels(right: int, down: int) -> None:
    x = torch.rand(1, 2, 8, 8, dtype=torch.float64)
    moved = F.pad(x, (right, -right, down, -down))
    found = spatial(only(moved), x, torch.tensor([0]), degrees=0, shift=0.25, grid=(1, 3))
    torch.testing.assert_close(found, moved)


@pytest.mark.parametrize("turns", [-1, 1])
def test_it_turns_first_and_shifts_second(turns: int) -> None:
    x = images(1)
    moved = F.pad(torch.rot90(x, turns, (2, 3)), (2, -2, -2, 2))
    found = spatial(only(moved), x, torch.tensor([0]), degrees=90, shift=0.25, grid=(3, 3))
    torch.testing.assert_close(found, moved)


def test_a_turn_keeps_shapes_in_a_wide_image() -> None:
    """In pixels, not in shares of the sides: what is near the centre of a 9x15 image turns without being stretched."""
    x = torch.zeros(1, 1, 9, 15, dtype=torch.float64)
    x[0, 0, 4, 5:10] = 1
    upright = torch.zeros_like(x)
    upright[0, 0, 2:7, 7] = 1
    found = spatial(only(upright), x, torch.tensor([0]), degrees=90, shift=0, grid=(2, 1))
    torch.testing.assert_close(found, upright)


def test_nothing_to_turn_or_shift_changes_nothing() -> None:
    x, y = images(), torch.zeros(6, dtype=torch.long)
    found = spatial(linear(bias=10.0), x, y, degrees=0, shift=0, grid=(3, 3))
    torch.testing.assert_close(found, x)


def test_the_whole_grid_is_tried_and_the_worst_returned() -> None:
    x, y = images().float(), torch.zeros(6, dtype=torch.long)
    spy = Spy(linear(bias=10.0).float())
    found = spatial(spy, x, y, grid=(4, 3))
    assert len(spy.asked) == 1 + 4 * 3 * 3
    assert all(bool((asked >= 0).all() and (asked <= 1).all()) for asked in spy.asked)
    margins = torch.stack([margin(spy.model(asked), y) for asked in spy.asked])
    assert torch.equal(found, torch.stack(spy.asked)[margins.argmax(0), torch.arange(6)])
    torch.testing.assert_close(found[2:3], spatial(spy, x[2:3], y[2:3], grid=(4, 3)))


def test_the_model_is_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(144, 2))
    model[2].eval()
    x, y = images(4).float(), torch.tensor([0, 1, 0, 1])
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    found = noise(model, x, y, Threat("linf", 0.1), draws=3, generator=streams(torch.arange(4)))
    turned = spatial(model, x, y, grid=(2, 2))
    assert not found.is_inference()
    assert not turned.is_inference()
    assert [module.training for module in model] == [True, True, False, True, True]
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_a_users_mistake_is_named() -> None:
    model, x, y = linear(), images(), torch.zeros(6, dtype=torch.long)
    with pytest.raises(InputError, match="draws must be at least 1, got 0"):
        noise(model, x, y, Threat("linf", 0.1), draws=0)
    with pytest.raises(InputError, match="degrees=200"):
        spatial(model, x, y, degrees=200)
    with pytest.raises(InputError, match=r"shift=-0\.1"):
        spatial(model, x, y, shift=-0.1)
    with pytest.raises(InputError, match=r"got \(0, 5\)"):
        spatial(model, x, y, grid=(0, 5))
