"""FMN: the closed forms of linear models, and what must hold of any minimal-norm attack."""

import math

import pytest
import torch
from torch import Tensor, nn

from fdml.attacks.fmn import fmn
from fdml.attacks.projection import DUAL, length
from fdml.errors import InputError
from fdml.randomness import Streams
from fdml.threat import NORMS, Threat

each_norm = pytest.mark.parametrize("norm", NORMS)
SHAPE = (1, 8, 8)


def linear(classes: int = 2, scale: float = 0.1) -> nn.Sequential:
    model = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(SHAPE), classes))
    with torch.no_grad():
        model[1].weight.normal_(0, scale)
        model[1].bias.copy_(-model[1].weight.sum(1) / 2)
    return model


def curved(classes: int = 4) -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.Tanh(), nn.Flatten(), nn.Linear(216, classes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5)
    return model.eval()


def answers(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).argmax(1)


@each_norm
def test_on_a_linear_model_the_optimal_distance_is_reached(norm: str) -> None:
    model, x = linear(), 0.4 + 0.2 * torch.rand(16, *SHAPE)
    y = answers(model, x)
    weight = model[1].weight.detach().diff(dim=0)
    logits = model(x).detach()
    # Where one pixel alone reaches the boundary inside [0, 1], so does the shortest way in every norm.
    shortest = logits.diff(dim=1).abs().squeeze(1) / length(weight, DUAL[norm])
    clear = logits.diff(dim=1).abs().squeeze(1) / length(weight, "linf") < 0.4
    assert clear.sum() >= 4
    x_adv = fmn(model, x, y, norm)
    found = Threat(norm, 0).distance(x_adv, x)
    assert (answers(model, x_adv) != y).all()
    torch.testing.assert_close(found[clear], shortest[clear], rtol=1e-3 if norm != "l1" else 0.02, atol=0)


@each_norm
@pytest.mark.parametrize("classes", [2, 3, 4])
def test_all_images_are_fooled_inside_the_box_and_nothing_is_left_behind(norm: str, classes: int) -> None:
    model, x = curved(classes).train(), torch.rand(16, *SHAPE)
    state, before = torch.get_rng_state(), {name: value.clone() for name, value in model.state_dict().items()}
    y = answers(model.eval(), x)
    x_adv = fmn(model.train(), x, y, norm, steps=40)
    assert model.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    assert (answers(model.eval(), x_adv) != y).all()


@each_norm
def test_what_is_found_lies_on_the_boundary(norm: str) -> None:
    model, x = curved(), torch.rand(16, *SHAPE)
    y = answers(model, x)
    x_adv = fmn(model, x, y, norm, steps=10)
    assert (answers(model, x_adv) != y).all()
    assert (answers(model, x + 0.99 * (x_adv - x)) == y).double().mean() > 0.9


@each_norm
def test_no_image_depends_on_its_company(norm: str) -> None:
    model, x = curved().double(), torch.rand(8, *SHAPE, dtype=torch.float64)
    y = answers(model, x)
    streams = Streams.of(torch.arange(8), 0)
    together = fmn(model, x, y, norm, steps=20, generator=streams)
    alone = torch.cat([fmn(model, x[i : i + 1], y[i : i + 1], norm, steps=20) for i in range(8)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-9)


@each_norm
def test_what_is_misclassified_or_never_fooled_comes_back_as_it_was(norm: str) -> None:
    model, x = curved(), torch.rand(8, *SHAPE)
    y = (answers(model, x) + 1) % 4
    assert torch.equal(fmn(model, x, y, norm, steps=5), x)
    constant = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    with torch.no_grad():
        constant[1].weight.zero_()
        constant[1].bias.copy_(torch.tensor([1.0, 0.0, 0.0]))
    assert torch.equal(fmn(constant, x, torch.zeros(8, dtype=torch.long), norm, steps=5), x)


def test_an_image_leaves_once_it_has_enough() -> None:
    model, x = curved(), torch.rand(16, *SHAPE)
    y = answers(model, x)
    seen = []

    def counted(images: Tensor) -> Tensor:
        seen.append(len(images))
        return model(images)

    radius = Threat("linf", 0).distance(fmn(model, x, y, "linf"), x)
    enough = radius.median().item() * 1.1
    x_adv = fmn(counted, x, y, "linf", steps=50, enough=enough)
    found = Threat("linf", enough).contains(x_adv, x)
    assert (answers(model, x_adv) != y).all()
    assert found.sum() >= (radius < enough).sum() - 1
    assert seen == sorted(seen, reverse=True)
    assert seen[25] <= 8


def test_a_radius_that_grows_finds_what_the_estimate_of_the_distance_never_reaches() -> None:
    # The estimate by value / gradient shrinks as the slope grows: foolbox's L1 attack is at 55% of Fashion-MNIST for it.
    def cliff(images: Tensor) -> Tensor:
        level = images.flatten(1).mean(1) - 0.5
        away = torch.where(level < 0.2, -1 + 1e-3 * torch.sin(300 * level), 1.0 + level)
        return torch.stack([-away, away], 1)

    x = torch.full((2, *SHAPE), 0.5)
    y = torch.zeros(2, dtype=torch.long)
    x_adv = fmn(cliff, x, y, "linf", steps=200)
    assert (cliff(x_adv).argmax(1) == 1).all()


def test_more_steps_are_not_weaker() -> None:
    model, x = curved(), torch.rand(32, *SHAPE)
    y = answers(model, x)
    medians = [Threat("l2", 0).distance(fmn(model, x, y, "l2", steps=steps), x).median() for steps in (1, 5, 50)]
    assert medians[0] >= medians[1] >= medians[2] > 0


def test_wrong_arguments_are_refused() -> None:
    model, x = curved(), torch.rand(2, *SHAPE)
    y = answers(model, x)
    with pytest.raises(InputError, match="l3"):
        fmn(model, x, y, "l3")
    with pytest.raises(InputError, match="steps must be at least 1, got 0"):
        fmn(model, x, y, "l2", steps=0)
    with pytest.raises(InputError, match="-1"):
        fmn(model, x, y, "l2", enough=-1.0)
    with pytest.raises(InputError, match="objective"):
        fmn(model, x, y, "l2", objective="nothing")
