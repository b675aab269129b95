"""DeepFool: closed forms, the published steps, and what must hold of any attack."""

import math

import pytest
import torch
from torch import Tensor, nn

from fdml.attacks.deepfool import deepfool
from fdml.attacks.projection import TO_HYPERPLANE, length
from fdml.errors import InputError

each_norm = pytest.mark.parametrize("norm", ["linf", "l2"])


def net(classes: int = 5, *, hidden: bool = True, shape: tuple[int, int, int] = (2, 3, 4)) -> nn.Sequential:
    pixels = math.prod(shape)
    layers = [nn.Linear(pixels, 10), nn.Tanh(), nn.Linear(10, classes)] if hidden else [nn.Linear(pixels, classes)]
    model = nn.Sequential(nn.Flatten(), *layers).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5)
    return model


def images(n: int, shape: tuple[int, int, int] = (2, 3, 4)) -> Tensor:
    return torch.rand(n, *shape, dtype=torch.float64)


def answers(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).argmax(1)


@each_norm
def test_on_a_linear_model_the_shortest_way_is_found(norm: str) -> None:
    model = net(4, hidden=False)
    layer = model[1]
    assert isinstance(layer, nn.Linear)
    with torch.no_grad():
        # Every boundary goes through the centre: the way to one stays clear of the sides of the box.
        layer.bias.copy_(-0.5 * layer.weight.sum(1))
    x = 0.45 + 0.1 * images(16)
    y = answers(model, x)
    weight, logits = layer.weight.detach(), model(x).detach()
    shortest = torch.full((16,), torch.inf, dtype=torch.float64)
    for k in range(4):
        w, gap = weight[k] - weight[y], logits[:, k] - logits[torch.arange(16), y]
        distance = length(TO_HYPERPLANE[norm](x.flatten(1), w, gap), norm)
        shortest = torch.where(y != k, distance.minimum(shortest), shortest)
    x_adv = deepfool(model, x, y, norm, overshoot=5e-4)
    assert ((x_adv > 0) & (x_adv < 1)).all()
    assert (answers(model, x_adv) != y).all()
    torch.testing.assert_close(length((x_adv - x).flatten(1), norm), shortest, rtol=1e-3, atol=0)


def published(model: nn.Module, x: Tensor, y: int, norm: str, candidates: int) -> Tensor:
    """Algorithm 2 for one image, with the overshoot where the model looks."""
    classes = [k for k in model(x[None])[0].argsort(descending=True).tolist() if k != y][: candidates - 1]
    moved = torch.zeros_like(x)
    for _ in range(20):
        at = (x + 1.02 * moved).requires_grad_()
        logits = model(at[None])[0]
        if int(logits.argmax()) != y:
            return at.detach()
        steps = []
        for k in classes:
            gap = logits[k] - logits[y]
            (w,) = torch.autograd.grad(gap, at, retain_graph=True)
            f = gap.detach().abs()
            steps.append(f / w.abs().sum() * w.sign() if norm == "linf" else f / w.square().sum() * w)
        step = min(steps, key=lambda step: float(length(step.flatten()[None], norm)))
        moved = moved + step
        assert (x + 1.02 * moved - 0.5).abs().max() < 0.5
    return x


@each_norm
@pytest.mark.parametrize("candidates", [3, 10])
def test_it_steps_as_published(norm: str, candidates: int) -> None:
    model, x = net(), 0.4 + 0.2 * images(10)
    y = answers(model, x)
    expected = torch.stack([published(model, x[i], int(y[i]), norm, candidates) for i in range(10)])
    x_adv = deepfool(model, x, y, norm, steps=20, candidates=candidates)
    torch.testing.assert_close(x_adv, expected, rtol=0, atol=1e-9)
    assert (answers(model, x_adv) != y).any()


@each_norm
@pytest.mark.parametrize("classes", [2, 3, 5])
def test_what_comes_back(norm: str, classes: int) -> None:
    model, x = net(classes), images(12)
    y = answers(model, x)
    y[3] = (y[3] + 1) % classes
    kept = x.clone()
    x_adv = deepfool(model, x, y, norm)
    assert ((x_adv >= 0) & (x_adv <= 1)).all()
    same = (x_adv == x).flatten(1).all(1)
    right = answers(model, x_adv) == y
    right[3] = True  # misclassified already: the image itself
    assert torch.equal(right, same)
    assert not same.all()
    assert torch.equal(x, kept)
    alone = torch.cat([deepfool(model, x[i : i + 1], y[i : i + 1], norm) for i in range(12)])
    torch.testing.assert_close(alone, x_adv, rtol=0, atol=1e-9)


def test_fooled_images_are_looked_at_no_more() -> None:
    model, x = net(), images(40)
    y = answers(model, x)
    sizes = []

    def counted(z: Tensor) -> Tensor:
        sizes.append(len(z))
        return model(z)

    deepfool(counted, x, y, "l2", steps=10)
    assert sizes[:3] == [40, 40, 40]
    assert sizes == sorted(sizes, reverse=True)
    assert len(sizes) < 21 or sizes[-1] < 10


def test_without_gradients_the_images_come_back() -> None:
    def constant(z: Tensor) -> Tensor:
        return torch.tensor([1.0, 0.0, 0.0]) + 0 * z.flatten(1)[:, :3]

    x = torch.rand(3, 1, 2, 2)
    for norm in ("linf", "l2"):
        assert torch.equal(deepfool(constant, x, torch.zeros(3, dtype=torch.long), norm, steps=3), x)


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
    x, y = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    deepfool(model, x, y, "l2", steps=3)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_what_is_wrong_is_said() -> None:
    model, x = net(), images(1)
    y = answers(model, x)
    with pytest.raises(InputError, match="linf and l2, got l1"):
        deepfool(model, x, y, "l1")
    with pytest.raises(InputError, match="got 0 and 10"):
        deepfool(model, x, y, "l2", steps=0)
    with pytest.raises(InputError, match="got 50 and 1"):
        deepfool(model, x, y, "l2", candidates=1)
