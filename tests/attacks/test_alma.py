"""ALMA: the penalty, closed forms in both norms, and what it adds to its starting points."""

import math

import pytest
import torch
from torch import Tensor, nn

from fdml.attacks.alma import _growth, alma
from fdml.attacks.fmn import fmn
from fdml.attacks.projection import DUAL, length
from fdml.errors import InputError

SHAPE = (1, 8, 8)


@torch.no_grad()
def answers(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).argmax(1)


def test_the_penalty_is_p2() -> None:
    lack = torch.linspace(-2, 2, 21, dtype=torch.float64).requires_grad_()
    rho, mu = torch.linspace(0.5, 40, 21, dtype=torch.float64), torch.linspace(0.1, 3, 21, dtype=torch.float64)
    above = mu * lack + mu * rho * lack**2 + rho**2 * lack**3 / 6
    below = mu * lack / (1 - rho * lack.clamp(max=0))
    (slope,) = torch.autograd.grad(torch.where(lack >= 0, above, below).sum(), lack)
    torch.testing.assert_close(_growth(lack.detach(), rho, mu), slope)


@pytest.mark.parametrize(("norm", "scale"), [("l2", 1e-3), ("l2", 10.0), ("l1", 1.0)])
def test_on_a_linear_model_the_shortest_distance_is_reached(norm: str, scale: float) -> None:
    model = nn.Sequential(nn.Flatten(), layer := nn.Linear(math.prod(SHAPE), 2))
    with torch.no_grad():
        layer.weight.normal_(0, scale)
        layer.bias.copy_(-layer.weight.sum(1) / 2)
    x = 0.4 + 0.2 * torch.rand(16, *SHAPE)
    y = answers(model, x)
    normal, gap = layer.weight.detach().diff(dim=0), model(x).detach().diff(dim=1).abs().squeeze(1)
    clear = gap < 0.39 * normal.abs().max()
    assert clear.sum() >= 8
    x_adv = alma(model, x, y, norm, steps=60)
    assert (answers(model, x_adv) != y).all()
    found = length((x_adv - x).flatten(1), norm)[clear]
    torch.testing.assert_close(found, (gap / length(normal, DUAL[norm]))[clear], rtol=1e-3, atol=1e-5)


def test_it_ends_nearer_than_it_starts() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 5))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.6)
    x = torch.rand(24, *SHAPE)
    y = answers(model, x)
    started = length((fmn(model, x, y, "l2", steps=10) - x).flatten(1), "l2")
    ended = length((alma(model, x, y, "l2", steps=40) - x).flatten(1), "l2")
    assert (ended > 0).all()
    assert (ended <= 1.03 * started).all()
    assert (ended < 0.998 * started).double().mean() > 0.3


def test_wrong_arguments_are_refused() -> None:
    model, x, y = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), torch.rand(2, *SHAPE), torch.zeros(2).long()
    with pytest.raises(InputError, match="linf"):
        alma(model, x, y, "linf")
    with pytest.raises(InputError, match="l3"):
        alma(model, x, y, "l3")
    with pytest.raises(InputError, match="steps must be at least 1, got 0"):
        alma(model, x, y, "l2", steps=0)
    with pytest.raises(InputError, match="-1"):
        alma(model, x, y, "l2", enough=-1.0)
