"""NES and SPSA: closed forms, the published iterations written out, and what must hold of any query attack."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fdml.attacks.estimate import nes, spsa
from fdml.attacks.objective import CHUNK
from fdml.errors import InputError
from fdml.losses import margin
from fdml.randomness import Streams
from fdml.threat import Images, Threat

each_norm = pytest.mark.parametrize("norm", ["linf", "l2"])
each_attack = pytest.mark.parametrize("attack", [nes, spsa])
EPS = {"linf": 0.1, "l2": 0.6}


def net(classes: int = 4, *, hidden: bool = True, shape: tuple[int, int, int] = (2, 5, 4)) -> nn.Sequential:
    pixels = math.prod(shape)
    layers = [nn.Linear(pixels, 10), nn.Tanh(), nn.Linear(10, classes)] if hidden else [nn.Linear(pixels, classes)]
    model = nn.Sequential(nn.Flatten(), *layers).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.4)
    return model


def images(n: int, shape: tuple[int, int, int] = (2, 5, 4)) -> Tensor:
    return torch.rand(n, *shape, dtype=torch.float64)


def answers(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).argmax(1)


def streams(n: int) -> Streams:
    return Streams.of(torch.arange(n), 0)


class Counted:
    """Counts the images that the model is shown, and the most at once."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.shown, self.largest = model, 0, 0

    def __call__(self, x: Tensor) -> Tensor:
        assert ((x >= 0) & (x <= 1)).all()
        self.shown, self.largest = self.shown + len(x), max(self.largest, len(x))
        return self.model(x)


@each_attack
@each_norm
def test_on_a_linear_model_the_boundary_is_reached(attack: Callable[..., Images], norm: str) -> None:
    model = net(2, hidden=False)
    layer = model[1]
    assert isinstance(layer, nn.Linear)
    with torch.no_grad():
        layer.bias.zero_()
        layer.weight -= layer.weight.mean(1, keepdim=True)
    x = 0.4 + 0.2 * images(40)
    y = answers(model, x)
    w = (layer.weight[1] - layer.weight[0]).detach()
    gap = margin(model(x), y).detach().neg()
    shortest = gap / (w.abs().sum() if norm == "linf" else w.norm())
    eps = shortest.median().item()
    x_adv = attack(model, x, y, Threat(norm, eps), budget=600, generator=streams(40))
    fooled = answers(model, x_adv) != y
    assert fooled[shortest < 0.8 * eps].all()
    assert not fooled[shortest > 1.001 * eps].any()


@each_attack
@each_norm
def test_it_is_the_published_iteration(attack: Callable[..., Images], norm: str) -> None:
    model = net()
    x, threat, sigma, pairs = images(1), Threat(norm, EPS[norm] / 4), 0.02, 3
    y = answers(model, x)
    generator = torch.Generator().manual_seed(3)
    here, size = x, 0.01
    mean, square = torch.zeros_like(x), torch.zeros_like(x)
    best, best_value = x, margin(model(x), y)
    for step in range(1, 7):
        grad = torch.zeros_like(x)
        for _ in range(pairs):
            if attack is nes:
                u = torch.randn(x.shape, dtype=torch.float64, generator=generator)
            else:
                u = 2.0 * torch.randint(2, x.shape, generator=generator) - 1
            ahead, behind = (margin(model((here + s * sigma * u).clamp(0, 1)), y) for s in (1, -1))
            grad += ((ahead - behind) / (2 * sigma) * u).detach() / pairs
        mean = 0.9 * mean + 0.1 * grad
        square = 0.999 * square + 0.001 * grad**2
        adam = mean / (1 - 0.9**step) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
        here = threat.ascend(here, mean, size) if attack is nes else here + size * adam
        here = threat.project(here, x)
        value = margin(model(here), y)
        assert value < 0
        if value > best_value:
            best, best_value = here.detach().clone(), value
    generator.manual_seed(3)
    options: dict[str, Any] = {"samples": 2 * pairs, "sigma": sigma, "step_size": size, "generator": generator}
    x_adv = attack(model, x, y, threat, budget=1 + 6 * (2 * pairs + 1), **options)
    assert not torch.equal(best, x)
    torch.testing.assert_close(x_adv, best, rtol=0, atol=1e-9)


@each_attack
@each_norm
@pytest.mark.parametrize("budget", [1, 10, 11, 12, 75])
def test_queries_are_those_the_model_saw(attack: Callable[..., Images], norm: str, budget: int) -> None:
    model = net()
    x = images(6)
    y = answers(model, x)
    y[0] = (y[0] + 1) % 4
    for i in range(6):
        counted, queries, one = Counted(model), torch.full((1,), 7), slice(i, i + 1)
        options: dict[str, Any] = {"samples": 10, "generator": streams(1), "queries": queries}
        x_adv = attack(counted, x[one], y[one], Threat(norm, EPS[norm]), budget=budget, **options)
        assert counted.shown == queries.item() - 7 <= budget
        if i == 0 or budget < 12:
            assert counted.shown == 1
            assert torch.equal(x_adv, x[one])


@each_attack
@each_norm
def test_company_changes_no_outcome(attack: Callable[..., Images], norm: str) -> None:
    model = net()
    x = images(40)
    y = answers(model, x)
    run = partial(attack, model, budget=90, samples=8)
    threat, queries = Threat(norm, EPS[norm]), torch.zeros(40, dtype=torch.int64)
    together = run(x, y, threat, generator=streams(40), queries=queries)
    assert queries.unique().numel() > 3
    for part in (torch.tensor([3]), torch.tensor([9, 1, 15, 38])):
        asked = torch.zeros(len(part), dtype=torch.int64)
        alone = run(x[part], y[part], threat, generator=Streams.of(part, 0), queries=asked)
        torch.testing.assert_close(alone, together[part], rtol=0, atol=1e-9)
        assert torch.equal(asked, queries[part])


@each_attack
@each_norm
@pytest.mark.parametrize("classes", [2, 3])
def test_inside_the_threat_and_stronger_with_more(attack: Callable[..., Images], norm: str, classes: int) -> None:
    model = net(classes)
    x = images(40)
    y = answers(model, x)
    threat, counted, fooled = Threat(norm, EPS[norm]), Counted(model), []
    for budget in (30, 600):
        x_adv = attack(counted, x, y, threat, budget=budget, generator=streams(40))
        assert threat.contains(x_adv, x).all()
        fooled.append((answers(model, x_adv) != y).sum())
    assert fooled[0] < fooled[1]
    assert counted.largest <= max(CHUNK, 2 * len(x))


@each_attack
def test_leaves_the_model_and_torch_as_they_were(attack: Callable[..., Images]) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 3))
    x, y = torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    x_adv = attack(model, x, y, Threat("l2", 0.5), budget=50, generator=streams(4))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert x_adv.requires_grad_().sum().requires_grad


@each_attack
@pytest.mark.parametrize(
    ("norm", "options", "message"),
    [
        ("l1", {}, "linf and l2, got l1"),
        ("l2", {"budget": 0}, "budget must be at least 1, got 0"),
        ("l2", {"samples": 7}, "even number of at least 2, got 7"),
        ("l2", {"sigma": 0.0}, "sigma must be above 0, got 0.0"),
        ("l2", {"objective": "margn"}, "did you mean 'margin'"),
    ],
)
def test_what_makes_no_sense_is_refused(
    attack: Callable[..., Images], norm: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        attack(net(), images(1), torch.zeros(1, dtype=torch.int64), Threat(norm, 0.1), **options)


def test_a_momentum_of_one_is_refused() -> None:
    with pytest.raises(InputError, match=r"momentum must be at least 0 and below 1, got 1\.0"):
        nes(net(), images(1), torch.zeros(1, dtype=torch.int64), Threat("l2", 0.1), momentum=1.0)
