"""CW: closed forms, on black and white images too, where the published change of variables stands still."""

import math

import pytest
import torch
from torch import Tensor, nn

from fdml.attacks.cw import cw
from fdml.attacks.projection import length, to_hyperplane_l2
from fdml.errors import InputError

SHAPE = (1, 8, 8)


@torch.no_grad()
def answers(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).argmax(1)


def linear(scale: float) -> tuple[nn.Module, nn.Linear]:
    torch.manual_seed(0)
    layer = nn.Linear(math.prod(SHAPE), 2)
    with torch.no_grad():
        layer.weight.normal_(0, scale)
        layer.bias.copy_(-layer.weight.sum(1) / 2)
    return nn.Sequential(nn.Flatten(), layer), layer


@pytest.mark.parametrize(("kind", "scale"), [("grey", 1e-3), ("black and white", 10.0)])
def test_on_a_linear_model_the_shortest_distance_is_reached(kind: str, scale: float) -> None:
    model, layer = linear(scale)
    x = torch.rand(12, *SHAPE)
    x = 0.4 + 0.2 * x if kind == "grey" else x.round()
    y = answers(model, x)
    gap = model(x).detach().diff(dim=1).squeeze(1)
    way = to_hyperplane_l2(x.flatten(1), layer.weight.detach().diff(dim=0).expand(12, -1), gap)
    x_adv = cw(model, x, y, steps=60, rounds=4)
    assert (answers(model, x_adv) != y).all()
    torch.testing.assert_close(length((x_adv - x).flatten(1), "l2"), length(way, "l2"), rtol=0.02, atol=1e-3)


def test_an_image_leaves_once_it_has_enough() -> None:
    model, layer = linear(1.0)
    x = 0.4 + 0.2 * torch.rand(12, *SHAPE)
    y, seen = answers(model, x), []

    def counted(images: Tensor) -> Tensor:
        seen.append(len(images))
        return model(images)

    shortest = (model(x).diff(dim=1).abs().squeeze(1) / layer.weight.diff(dim=0).norm()).detach()
    x_adv = cw(counted, x, y, steps=30, rounds=3, enough=3 * shortest.max().item())
    assert (answers(model, x_adv) != y).all()
    assert sum(seen) < 0.25 * 12 * 90


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "linf"}, "linf"),
        ({"steps": 0}, "steps=0"),
        ({"rounds": 0}, "rounds=0"),
        ({"step_size": 0.0}, "step_size"),
        ({"enough": -1.0}, "-1"),
    ],
)
def test_wrong_arguments_are_refused(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        cw(linear(1.0)[0], torch.rand(2, *SHAPE), torch.zeros(2, dtype=torch.int64), **options)
