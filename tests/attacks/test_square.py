"""Square Attack: against the published search written out image by image, and what must hold of any query attack."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from fdml.attacks.apgd_l1 import project_l1
from fdml.attacks.square import _halvings as halvings
from fdml.attacks.square import square
from fdml.errors import InputError
from fdml.losses import cross_entropy, margin
from fdml.randomness import Streams
from fdml.threat import Threat

EPS = {"linf": 0.12, "l2": 1.3, "l1": 6.0}
each_norm = pytest.mark.parametrize("norm", EPS)


def net(classes: int = 4, shape: tuple[int, int, int] = (2, 10, 10)) -> nn.Sequential:
    model = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 12), nn.Tanh(), nn.Linear(12, classes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model.double()


def images(n: int, shape: tuple[int, int, int] = (2, 10, 10)) -> Tensor:
    return torch.rand(n, *shape, dtype=torch.float64)


def answers(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).argmax(1)


def streams(n: int, seed: int = 0) -> Streams:
    return Streams.of(torch.arange(n), seed)


class Counted:
    """Counts the images that the model is shown."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.shown, self.largest = model, 0, 0

    def __call__(self, x: Tensor) -> Tensor:
        assert ((x >= 0) & (x <= 1)).all()
        self.shown += len(x)
        self.largest = max(self.largest, len(x))
        return self.model(x)


def size(delta: Tensor, norm: str) -> float:
    return (delta.abs().sum() if norm == "l1" else delta.square().sum().sqrt()).item()


def peak(height: int, width: int, norm: str) -> Tensor:
    eta = torch.zeros(height, width)
    for k in range(max(height, width) // 2 + 1):
        top, left = height // 2 - k, width // 2 - k
        eta[max(top, 0) : top + 2 * k + 1, max(left, 0) : left + 2 * k + 1] += (k + 1.0) ** (-2 if norm == "l2" else -4)
    return eta / size(eta, norm)


def bump(side: int, norm: str) -> Tensor:
    eta = torch.cat([peak(side // 2, side, norm), -peak(side - side // 2, side, norm)])
    eta = eta / size(eta, norm)
    return eta.T if torch.rand(1) > 0.5 else eta


def onto(x: Tensor, delta: Tensor, norm: str, eps: float) -> Tensor:
    """One image plus its perturbation, brought into the threat model as the reference brings it."""
    if norm == "l2":
        return (x + delta * eps / (size(delta, norm) + 1e-12)).clamp(0, 1)
    return project_l1((x + delta)[None], x[None], eps)[0]


def published(
    model: nn.Module, x: Tensor, y: Tensor, norm: str, eps: float, proposals: int, objective: Callable
) -> tuple[Tensor, Tensor]:
    """The reference's search, drawing from torch's global generator, for the images that are classified correctly.

    The points that it ends with, and how many proposals were new to the image.
    """
    n, c, h, w = x.shape

    def judge(points: Tensor) -> tuple[Tensor, Tensor]:
        return objective(model(points), y), margin(model(points), y) > 0

    def corner(side: int) -> tuple[int, int]:
        return int(torch.rand(1) * (h - side)), int(torch.rand(1) * (w - side))

    if norm == "linf":
        best = (x + eps * (2 * torch.rand(n, c, 1, w) - 1).sign()).clamp(0, 1)
    else:
        side, delta = h // 5, torch.zeros_like(x)
        for row in range(5):
            for column in range(5):
                signs = bump(side, norm) * (2 * torch.rand(n, c, 1, 1) - 1).sign()
                delta[:, :, row * side :, column * side :][:, :, :side, :side] += signs
        best = torch.stack([onto(x[i], delta[i], norm, eps) for i in range(n)])
    value, fooled = judge(best)
    moved = torch.zeros(n, dtype=torch.int64)
    for step in range(proposals):
        stands = [i for i in range(n) if not fooled[i]]
        if not stands:
            break
        p = 0.8 / 2 ** sum(step > end for end in (10, 50, 200, 500, 1000, 2000, 4000))
        s = max(round(math.sqrt(p * h * w)), 1 if norm == "linf" else 3)
        s = min(s if norm == "linf" or s % 2 else s + 1, h, w)
        (top, left), new = corner(s), best.clone()
        if norm == "linf":
            sign = (2 * torch.rand(c, 1, 1) - 1).sign()
            for i in stands:
                step_to = best[i].clone()
                step_to[:, top : top + s, left : left + s] += 2 * eps * sign
                new[i] = step_to.clamp(x[i] - eps, x[i] + eps).clamp(0, 1)
        else:
            top2, left2 = corner(s)
            eta = bump(s, norm)
            signs = (2 * torch.rand(len(stands), c, 1, 1) - 1).sign()
            for i, sign in zip(stands, signs, strict=True):
                delta = best[i] - x[i]
                first = (slice(top, top + s), slice(left, left + s))
                second = (slice(top2, top2 + s), slice(left2, left2 + s))
                union = torch.zeros(h, w, dtype=torch.bool)
                union[first], union[second] = True, True
                old, whole = delta.clone(), size(delta, norm)
                delta[:, union] = 0.0
                for k in range(c):
                    patch = eta * sign[k] + old[k][first] / (size(old[k][first], norm) + 1e-12)
                    held = size(old[k][union], norm)
                    if norm == "l2":
                        amount = math.sqrt(max(eps**2 - whole**2, 0) / c + held**2)
                    else:
                        amount = (max(eps - whole, 0) / c + held) * c
                    delta[k][first] = patch / (size(patch, norm) + 1e-12) * amount
                new[i] = onto(x[i], delta, norm, eps)
        moved += torch.tensor(
            [i in stands and not torch.allclose(new[i], best[i], rtol=0, atol=1e-7) for i in range(n)]
        )
        new_value, hit = judge(new)
        taken = ((new_value > value) | hit) & ~fooled
        best[taken], value[taken] = new[taken], new_value[taken]
        fooled |= hit
    return best, moved


@pytest.mark.parametrize(("norm", "objective"), [("linf", "margin"), ("l2", "ce"), ("l1", "margin")])
def test_with_one_generator_it_is_the_published_search(norm: str, objective: str) -> None:
    model = net().float()
    x = images(8).float()
    y = answers(model, x)
    torch.manual_seed(5)
    with torch.no_grad():
        ascends = {"margin": margin, "ce": cross_entropy}[objective]
        expected, moved = published(model, x, y, norm, EPS[norm], 70, ascends)
    fooled = answers(model, expected) != y
    assert 0 < fooled.sum() < 8
    queries = torch.zeros(8, dtype=torch.int64)
    generator = torch.Generator().manual_seed(5)
    options = {"objective": objective, "rescale": False, "generator": generator, "queries": queries}
    x_adv = square(model, x, y, Threat(norm, EPS[norm]), budget=72, **options)
    torch.testing.assert_close(x_adv, expected, rtol=0, atol=2e-5)
    assert queries.tolist() == (moved + 2).tolist()


@each_norm
@pytest.mark.parametrize("budget", [1, 2, 3, 60])
def test_queries_are_those_the_model_saw(norm: str, budget: int) -> None:
    model = net()
    x = images(4)
    y = answers(model, x)
    y[0] = (y[0] + 1) % 4
    for i in range(4):
        counted, queries = Counted(model), torch.full((1,), 7)
        square(
            counted, x[i : i + 1], y[i : i + 1], Threat(norm, EPS[norm]), budget=budget, generator=streams(1, i),
            queries=queries,
        )  # fmt: skip
        assert counted.shown == queries.item() - 7 <= budget
        assert counted.shown >= min(budget, 2) if i else counted.shown == 1


def test_what_changes_nothing_is_not_shown() -> None:
    x, queries = images(5), torch.zeros(5, dtype=torch.int64)
    model = net()
    x_adv = square(model, x, answers(model, x), Threat("linf", 0.0), budget=50, generator=streams(5), queries=queries)
    assert torch.equal(x_adv, x)
    assert queries.tolist() == [2] * 5


@each_norm
def test_only_images_that_stand_are_shown(norm: str) -> None:
    model = net()
    x = images(20)
    counted, queries = Counted(model), torch.zeros(20, dtype=torch.int64)
    square(counted, x, answers(model, x), Threat(norm, EPS[norm]), budget=100, generator=streams(20), queries=queries)
    assert counted.shown == queries.sum()
    assert queries.unique().numel() > 3


@each_norm
def test_company_changes_no_outcome(norm: str) -> None:
    model = net()
    x = images(16)
    y = answers(model, x)
    run = partial(square, model, budget=80, restarts=2)
    threat, queries = Threat(norm, EPS[norm]), torch.zeros(16, dtype=torch.int64)
    together = run(x, y, threat, generator=streams(16), queries=queries)
    for part in (torch.tensor([3]), torch.tensor([9, 1, 15, 4])):
        asked = torch.zeros(len(part), dtype=torch.int64)
        alone = run(x[part], y[part], threat, generator=Streams.of(part, 0), queries=asked)
        torch.testing.assert_close(alone, together[part], rtol=0, atol=1e-12)
        assert torch.equal(asked, queries[part])


@each_norm
def test_a_longer_search_begins_with_the_shorter(norm: str) -> None:
    model = net()
    x = images(24)
    y = answers(model, x)
    run = partial(square, model, x, y, Threat(norm, EPS[norm]), rescale=False)
    with torch.no_grad():
        short, long = (margin(model(run(budget=budget, generator=streams(24))), y) for budget in (20, 150))
    assert (long >= short - 1e-12).all()
    assert (long > 0).sum() > (short > 0).sum()


def test_the_schedule_is_stretched_to_the_budget() -> None:
    class Areas:
        """The most pixels by which consecutive points, of one image that is never fooled, differ."""

        def __init__(self) -> None:
            self.points: list[Tensor] = []

        def __call__(self, x: Tensor) -> Tensor:
            self.points.append(x.clone())
            # Every point is better than all before it.
            return torch.tensor([[1.0, 0.0]]) / len(self.points)

        def largest(self) -> int:
            steps = zip(self.points[1:], self.points[2:], strict=False)
            return max(int((old != new).sum()) for old, new in list(steps)[len(self.points) // 2 :])

    x, y, sizes = torch.full((1, 1, 32, 32), 0.5), torch.zeros(1, dtype=torch.int64), []
    for rescale in (True, False):
        areas = Areas()
        square(areas, x, y, Threat("linf", 0.1), budget=402, rescale=rescale, generator=streams(1))
        sizes.append(areas.largest())
    # From proposal 200 of 400 on: like 2,500 of 5,000, so p = 0.8 / 64; and like 200, so p = 0.8 / 8.
    assert sizes[0] <= round(math.sqrt(0.8 / 64 * 1024)) ** 2 < sizes[1] <= round(math.sqrt(0.8 / 8 * 1024)) ** 2


def test_the_schedule_is_the_published_one() -> None:
    published = [10, 50, 200, 500, 1000, 2000, 4000]
    steps = [*published, *(step + 1 for step in published)]
    assert [halvings(step, 5000) for step in steps] == [*range(7), *range(1, 8)]
    # Of 10,000 proposals, twice as many come before each of them.
    assert [halvings(2 * step, 10000) for step in steps] == [*range(7), *range(1, 8)]


@each_norm
@pytest.mark.parametrize("shape", [(1, 2, 3), (3, 4, 4), (1, 9, 6), (1, 6, 14), (1, 14, 14)], ids=str)
@pytest.mark.parametrize("classes", [2, 3])
def test_inside_the_threat_for_any_shape(norm: str, shape: tuple[int, int, int], classes: int) -> None:
    model = net(classes, shape)
    x = images(8, shape).float().round(decimals=1)
    y = answers(model.float(), x)
    for generator in (streams(8), torch.Generator().manual_seed(1)):
        threat = Threat(norm, EPS[norm] / 2)
        x_adv = square(model, x, y, threat, budget=30, generator=generator)
        assert threat.contains(x_adv, x).all()
        assert (x_adv != x).any()


def test_squares_of_an_image_s_own_reach_the_last_row_and_column() -> None:
    weight = torch.zeros(1, 4, 4, dtype=torch.float64)
    weight[:, 3], weight[:, :, 3] = torch.tensor([1.0, -1, 1, -1]), torch.tensor([-1.0, -1, 1, 1])

    def model(x: Tensor) -> Tensor:
        return torch.stack([torch.full((len(x),), 0.68), (weight * (x - 0.5)).sum((1, 2, 3))], 1)

    x, y = torch.full((4, 1, 4, 4), 0.5, dtype=torch.float64), torch.zeros(4, dtype=torch.int64)
    # Seven pixels count, and each must move by the whole of eps.
    assert (answers(model, square(model, x, y, Threat("linf", 0.1), budget=400, generator=streams(4))) == 1).all()
    assert (answers(model, square(model, x, y, Threat("linf", 0.095), budget=400, generator=streams(4))) == 0).all()


def test_restarts_go_on_with_what_stands() -> None:
    model = net()
    x = images(32)
    y = answers(model, x)
    fooled, spent = [], []
    for restarts in (1, 4):
        queries = torch.zeros(32, dtype=torch.int64)
        options = {"restarts": restarts, "generator": streams(32), "queries": queries}
        x_adv = square(model, x, y, Threat("linf", EPS["linf"]), budget=20, **options)
        fooled.append(answers(model, x_adv) != y)
        spent.append(queries)
    assert (fooled[0] <= fooled[1]).all()
    assert fooled[0].sum() < fooled[1].sum()
    assert torch.equal(spent[0][fooled[0]], spent[1][fooled[0]])
    assert spent[1].max() <= 4 * 20


def test_a_misclassified_point_is_returned_whatever_the_objective_says() -> None:
    model = net()
    x = images(16)
    y = answers(model, x)

    def indifferent(logits: Tensor, y: Tensor) -> Tensor:
        return torch.zeros_like(y, dtype=logits.dtype)

    options = {"objective": indifferent, "generator": streams(16)}
    x_adv = square(model, x, y, Threat("linf", 2 * EPS["linf"]), budget=60, **options)
    fooled = answers(model, x_adv) != y
    assert fooled.any()
    assert torch.equal(fooled, (x_adv != x).flatten(1).any(1))


def test_a_misclassified_image_is_returned_as_it_is() -> None:
    model = net()
    x = images(4)
    y = (answers(model, x) + 1) % 4
    assert torch.equal(square(model, x, y, Threat("linf", 0.1), generator=streams(4)), x)


def test_leaves_the_model_and_torch_as_they_were() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 3))
    model[0].eval()
    x, y = torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    x_adv = square(model, x, y, Threat("l2", 0.5), budget=30, generator=streams(4))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training
    assert not model[0].training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    # What inference mode makes could not be differentiated by another attack that starts here.
    assert x_adv.requires_grad_().sum().requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, "budget=0"),
        ({"restarts": 0}, "restarts=0"),
        ({"p": 0.0}, "p must be above 0 and at most 1, got 0.0"),
        ({"objective": "margn"}, "did you mean 'margin'"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict, message: str) -> None:
    x = images(1)
    with pytest.raises(InputError, match=message):
        square(net(), x, torch.zeros(1, dtype=torch.int64), Threat("linf", 0.1), **options)
