"""HopSkipJump: closed forms, that it sees labels alone, and what must hold of any query attack."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fdml.attacks.decision import hopskipjump
from fdml.attacks.objective import CHUNK
from fdml.attacks.within import within
from fdml.errors import InputError
from fdml.losses import margin
from fdml.randomness import Streams
from fdml.threat import Threat

each_norm = pytest.mark.parametrize("norm", ["linf", "l2"])


def net(classes: int = 4, *, hidden: bool = True, shape: tuple[int, int, int] = (2, 4, 3)) -> nn.Sequential:
    pixels = math.prod(shape)
    layers = [nn.Linear(pixels, 10), nn.Tanh(), nn.Linear(10, classes)] if hidden else [nn.Linear(pixels, classes)]
    model = nn.Sequential(nn.Flatten(), *layers).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.4)
    return model


def images(n: int, shape: tuple[int, int, int] = (2, 4, 3)) -> Tensor:
    return torch.rand(n, *shape, dtype=torch.float64)


def answers(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).argmax(1)


def streams(n: int) -> Streams:
    return Streams.of(torch.arange(n), 0)


def far(x_adv: Tensor, x: Tensor, norm: str) -> Tensor:
    return Threat(norm, 0.0).distance(x_adv, x)


class Counted:
    """Counts the images that the model is shown, and the most at once."""

    def __init__(self, model: Callable[[Tensor], Tensor]) -> None:
        self.model, self.shown, self.largest = model, 0, 0

    def __call__(self, x: Tensor) -> Tensor:
        assert ((x >= 0) & (x <= 1)).all()
        self.shown, self.largest = self.shown + len(x), max(self.largest, len(x))
        return self.model(x)


@each_norm
def test_on_a_linear_model_it_comes_near_the_shortest_way(norm: str) -> None:
    model = net(2, hidden=False)
    layer = model[1]
    assert isinstance(layer, nn.Linear)
    with torch.no_grad():
        layer.bias.zero_()
        layer.weight -= layer.weight.mean(1, keepdim=True)
    x = 0.4 + 0.2 * images(16)
    y = answers(model, x)
    w = (layer.weight[1] - layer.weight[0]).detach()
    shortest = margin(model(x), y).detach().neg() / (w.abs().sum() if norm == "linf" else w.norm())
    excess = []
    for budget in (300, 4000):
        x_adv = hopskipjump(model, x, y, norm, budget=budget, generator=streams(16))
        assert (answers(model, x_adv) != y).all()
        excess.append(far(x_adv, x, norm) / shortest)
        assert (excess[-1] > 1).all()
    assert excess[1].max() < 1.05
    assert excess[1].median() < 1.02
    assert excess[0].median() > excess[1].median()


@each_norm
def test_it_sees_labels_alone(norm: str) -> None:
    model = net()
    x = images(8)
    y = answers(model, x)

    def labels(x: Tensor) -> Tensor:
        return nn.functional.one_hot(model(x).argmax(1), 4).double()

    def shuffled(x: Tensor) -> Tensor:
        logits = model(x)
        ranks = logits.argsort(1).argsort(1)
        return torch.where(ranks == 3, 1e6, -3.0 * logits)

    run = partial(hopskipjump, x=x, y=y, norm=norm, budget=400)
    x_adv = run(model, generator=streams(8))
    assert (answers(model, x_adv) != y).all()
    assert torch.equal(run(labels, generator=streams(8)), x_adv)
    assert torch.equal(run(shuffled, generator=streams(8)), x_adv)


@each_norm
@pytest.mark.parametrize("budget", [1, 2, 3, 12, 40, 300])
def test_queries_are_those_the_model_saw(norm: str, budget: int) -> None:
    model = net()
    x = images(5)
    y = answers(model, x)
    y[0] = (y[0] + 1) % 4
    for i in range(5):
        counted, queries, one = Counted(model), torch.full((1,), 7), slice(i, i + 1)
        x_adv = hopskipjump(
            counted, x[one], y[one], norm, budget=budget, first=20, generator=streams(1), queries=queries
        )
        assert counted.shown == queries.item() - 7 <= budget
        assert budget < 300 or i == 0 or counted.shown > 0.8 * budget
        if i == 0 or budget == 1:
            assert counted.shown == 1
        assert torch.equal(x_adv, x[one]) or answers(model, x_adv) != y[one]


@each_norm
def test_company_changes_no_outcome(norm: str) -> None:
    model = net()
    x = images(CHUNK + 6)
    y = answers(model, x)
    run = partial(hopskipjump, model, norm=norm, budget=150, first=20)
    counted, queries = Counted(model), torch.zeros(len(x), dtype=torch.int64)
    together = run(x=x, y=y, generator=streams(len(x)), queries=queries)
    for part in (torch.tensor([3]), torch.tensor([CHUNK + 5, 1, 15, 38])):
        asked = torch.zeros(len(part), dtype=torch.int64)
        alone = run(x=x[part], y=y[part], generator=Streams.of(part, 0), queries=asked)
        torch.testing.assert_close(alone, together[part], rtol=0, atol=1e-9)
        assert torch.equal(asked, queries[part])
    run = partial(hopskipjump, counted, norm=norm, budget=150)
    run(x=x, y=y, generator=streams(len(x)))
    assert counted.largest <= max(CHUNK, len(x))


@each_norm
def test_enough_is_enough(norm: str) -> None:
    model = net()
    x = images(12)
    y = answers(model, x)
    queries, fewer = torch.zeros(12, dtype=torch.int64), torch.zeros(12, dtype=torch.int64)
    nearest = hopskipjump(model, x, y, norm, budget=600, generator=streams(12), queries=queries)
    enough = 1.2 * far(nearest, x, norm).median().item()
    options: dict[str, Any] = {"budget": 600, "generator": streams(12), "queries": fewer}
    found = hopskipjump(model, x, y, norm, enough=enough, **options)
    done = far(found, x, norm) <= enough
    assert torch.equal(done, far(nearest, x, norm) <= enough)
    assert (fewer <= queries).all()
    assert fewer[done].median() < 300
    torch.testing.assert_close(found[~done], nearest[~done])
    threat = Threat(norm, enough)
    x_adv = within(hopskipjump)(model, x, y, threat, budget=600, generator=streams(12))
    assert threat.contains(x_adv, x).all()
    assert torch.equal(answers(model, x_adv)[done] != y[done], torch.ones(int(done.sum()), dtype=torch.bool))


def test_what_is_near_enough_stays_so() -> None:
    model = net()
    x = images(1)
    y = answers(model, x)
    run = partial(hopskipjump, model, x, y, "l2", budget=600)
    enough = far(run(generator=streams(1)), x, "l2").item() / 1.0005
    found = run(enough=enough, generator=streams(1))
    assert 0.999 * enough < far(found, x, "l2").item() <= enough * (1 + 1e-12)


def test_steps_are_halved_until_they_end_well() -> None:
    def model(x: Tensor) -> Tensor:
        """Class 1 in a thin slab alone."""
        inside = 0.03 - (x.mean((1, 2, 3)) - 0.53).abs()
        return torch.stack([-inside, inside], 1)

    x, y = torch.full((4, 1, 4, 4), 0.2, dtype=torch.float64), torch.zeros(4, dtype=torch.int64)
    starts = torch.zeros_like(x)
    starts[:, :, :2], starts[:, :, 2:] = 0.96, 0.1
    x_adv = hopskipjump(model, x, y, "l2", budget=2000, starts=starts, generator=streams(4))
    assert (answers(model, x_adv) == 1).all()
    assert (far(x_adv, x, "l2") < 1.2 * 0.3 * 4).all()


def test_begins_from_starts_where_these_are_misclassified() -> None:
    seen = []

    def model(x: Tensor) -> Tensor:
        seen.append(x)
        bright = x.mean((1, 2, 3))
        return torch.stack([bright * 0 + 0.5, bright], 1)

    x, y = torch.full((2, 1, 4, 4), 0.1), torch.zeros(2, dtype=torch.int64)
    starts = torch.full_like(x, 0.9)
    starts[1] = 0.2
    x_adv = hopskipjump(model, x, y, "l2", budget=50, starts=starts, generator=streams(2))
    assert torch.equal(seen[1], starts)
    assert len(seen[2]) == 1
    assert (answers(model, x_adv) == 1).all()


def test_noise_of_coarser_grain_is_tried() -> None:
    def model(x: Tensor) -> Tensor:
        """Class 1 only for images of large even patches: noise of single pixels is never that."""
        rough = x.diff(dim=2).abs().mean((1, 2, 3)) + x.diff(dim=3).abs().mean((1, 2, 3))
        return torch.stack([rough - 0.25, 0.25 - rough], 1)

    x = (torch.arange(16)[:, None] + torch.arange(16)).remainder(2).float()[None, None]
    y, queries = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    x_adv = hopskipjump(model, x, y, "linf", budget=60, tries=20, generator=streams(1), queries=queries)
    assert answers(model, x_adv).item() == 1


@each_norm
def test_where_nothing_is_found_the_image_is_returned(norm: str) -> None:
    def model(x: Tensor) -> Tensor:
        return torch.tensor([[1.0, 0.0]], dtype=x.dtype).expand(len(x), 2)

    x, queries = images(3), torch.zeros(3, dtype=torch.int64)
    y = torch.tensor([0, 0, 1])
    options: dict[str, Any] = {"budget": 300, "tries": 17, "generator": streams(3), "queries": queries}
    assert torch.equal(hopskipjump(model, x, y, norm, **options), x)
    assert queries.tolist() == [18, 18, 1]


def test_what_is_returned_stands_off_the_boundary() -> None:
    model = net(3)
    x = images(12)
    y = answers(model, x)
    x_adv = hopskipjump(model, x, y, "l2", budget=800, gamma=0.01, generator=streams(12))
    assert (answers(model, x + 0.9991 * (x_adv - x)) != y).all()
    assert (answers(model, x + 0.998 * (x_adv - x)) == y).all()


def test_leaves_the_model_and_torch_as_they_were() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 3))
    x = torch.rand(4, 1, 8, 8)
    y = answers(model.eval(), x)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    x_adv = hopskipjump(model, x, y, "l2", budget=60, generator=streams(4))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert x_adv.requires_grad_().sum().requires_grad


@pytest.mark.parametrize(
    ("norm", "options", "message"),
    [
        ("l1", {}, "linf and l2, got l1"),
        ("l2", {"budget": 0}, "budget, first and tries must be at least 1, got 0"),
        ("l2", {"gamma": 0.0}, "gamma must be above 0, got 0.0"),
        ("l2", {"enough": -1.0}, "enough must be a distance of at least 0, got -1.0"),
        ("l2", {"starts": torch.rand(2, 2, 4, 3)}, r"one an image, \(1, 2, 4, 3\), got \(2, 2, 4, 3\)"),
    ],
)
def test_what_makes_no_sense_is_refused(norm: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        hopskipjump(net(), images(1), torch.zeros(1, dtype=torch.int64), norm, **options)
