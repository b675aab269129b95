"""ALMA and CW, and what a minimal-norm attack is within a threat model: closed forms on linear models."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from fdml.attacks import alma, cw, fmn, within
from fdml.errors import InputError
from fdml.threat import Images, Threat

L2: dict[str, Callable[..., Images]] = {"alma": partial(alma, norm="l2"), "cw": partial(cw, norm="l2")}


def linear() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.Linear(36, 2)
    with torch.no_grad():
        layer.weight.mul_(0.5)
    return nn.Sequential(nn.Flatten(), layer)


def case(model: nn.Module, count: int = 8) -> tuple[Tensor, Tensor]:
    """Images far from the border of [0, 1], and the model's answers to them."""
    x = 0.5 + 0.1 * (torch.rand(count, 1, 6, 6) - 0.5)
    return x, model(x).argmax(1)


def optimum(model: nn.Sequential, x: Tensor) -> Tensor:
    """The l2 distance to the boundary between the two classes."""
    layer = model[1]
    assert isinstance(layer, nn.Linear)
    normal = layer.weight[0] - layer.weight[1]
    logits = model(x)
    return ((logits[:, 0] - logits[:, 1]).abs() / normal.norm()).detach()


@pytest.mark.parametrize("name", L2)
def test_a_linear_model_is_reached_at_its_distance(name: str) -> None:
    model = linear()
    assert isinstance(model, nn.Sequential)
    x, y = case(model)
    x_adv = L2[name](model, x, y)
    assert bool((model(x_adv).argmax(1) != y).all())
    torch.testing.assert_close((x_adv - x).flatten(1).norm(dim=1), optimum(model, x), rtol=0.02, atol=1e-4)


@pytest.mark.parametrize("name", L2)
def test_what_is_wrong_already_stays(name: str) -> None:
    model = linear()
    x, y = case(model)
    assert torch.equal(L2[name](model, x, 1 - y), x)


@pytest.mark.parametrize("name", L2)
def test_nothing_found_is_the_image_itself(name: str) -> None:
    def stubborn(x: Tensor) -> Tensor:
        return torch.stack([1 + 0 * x.sum((1, 2, 3)), 1e-3 * x.sum((1, 2, 3)) - 5], 1)

    x = torch.rand(3, 1, 6, 6)
    assert torch.equal(L2[name](stubborn, x, torch.zeros(3, dtype=torch.int64)), x)


@pytest.mark.parametrize("attack", [partial(alma, norm="linf"), partial(cw, norm="linf")])
def test_norms_that_are_not_defined(attack: Callable[..., Images]) -> None:
    model = linear()
    with pytest.raises(InputError, match="linf"):
        attack(model, *case(model))


@pytest.mark.parametrize("attack", [cw, alma, fmn])
def test_within_a_threat_model(attack: Callable[..., Images]) -> None:
    """Half of the images have their boundary inside eps: those are fooled, and the rest comes back inside all the same."""
    model = linear()
    assert isinstance(model, nn.Sequential)
    x, y = case(model)
    distance = optimum(model, x)
    threat = Threat("l2", float(distance.median()) * 1.05)
    x_adv = within(attack)(model, x, y, threat)
    assert bool(threat.contains(x_adv, x).all())
    fooled = model(x_adv).argmax(1) != y
    assert torch.equal(fooled[distance < 0.97 * threat.eps], torch.ones_like(fooled)[distance < 0.97 * threat.eps])
    assert not bool(fooled[distance > threat.eps * 1.001].any())
    assert 0 < int(fooled.sum()) < len(fooled)


def test_enough_ends_the_work() -> None:
    model = linear()
    x, y = case(model)
    calls = []

    def counted(x: Tensor) -> Tensor:
        calls.append(len(x))
        return model(x)

    cw(counted, x, y)
    whole = sum(calls)
    calls.clear()
    cw(counted, x, y, enough=5.0)
    assert sum(calls) < whole / 4
