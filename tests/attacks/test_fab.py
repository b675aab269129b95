"""FAB: against closed forms and the published iteration written out, and what it must leave as it was."""

import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fdml.attacks.fab import RADIUS, fab, nearest_boundary, tighten
from fdml.attacks.projection import DUAL, TO_HYPERPLANE, length
from fdml.errors import InputError
from fdml.losses import margin
from fdml.randomness import Streams
from fdml.threat import Threat

# Not by import: the package has the function under this name.
module = sys.modules["fdml.attacks.fab"]

each_norm = pytest.mark.parametrize("norm", TO_HYPERPLANE)
quick = partial(fab, steps=8)


def linear(classes: int = 2, pixels: int = 64) -> nn.Sequential:
    layer = nn.Linear(pixels, classes)
    with torch.no_grad():
        layer.weight.normal_(0, 0.1)
    return nn.Sequential(nn.Flatten(), layer).double()


def weights(model: nn.Sequential) -> Tensor:
    layer = model[1]
    assert isinstance(layer, nn.Linear)
    return layer.weight.detach()


def smooth(classes: int = 4, shape: tuple[int, int, int] = (2, 3, 4)) -> nn.Sequential:
    """A small net in double precision without kinks, so that rounding decides nothing."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 10), nn.Tanh(), nn.Linear(10, classes))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0, 0.5)
    return net.double()


def images(n: int, shape: tuple[int, int, int] = (2, 3, 4)) -> Tensor:
    return torch.rand(n, *shape, dtype=torch.float64)


def answers(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).argmax(1)


def far(x_adv: Tensor, x: Tensor, norm: str) -> Tensor:
    return length((x_adv - x).flatten(1), norm)


@each_norm
@pytest.mark.parametrize("box", [False, True], ids=["inside", "at-the-sides"])
@pytest.mark.parametrize("targeted", [True, False])
def test_on_a_linear_model_the_shortest_way_is_found(norm: str, box: bool, targeted: bool) -> None:
    model = linear()
    x = torch.rand(40, 1, 8, 8, dtype=torch.float64)
    x = (1.6 * x - 0.3).clamp(0, 1) if box else 0.45 + 0.1 * x
    y = answers(model, x)
    rows = torch.arange(40)
    w = weights(model)[1 - y] - weights(model)[y]
    logits = model(x).detach()
    gap = logits[rows, 1 - y] - logits[rows, y]
    shortest = TO_HYPERPLANE[norm](x.flatten(1), w, gap)
    at_sides = (x.flatten(1) + shortest - 0.5).abs() >= 0.5
    assert norm == "l1" or bool((at_sides & (shortest != 0)).any()) == box
    x_adv = fab(model, x, y, norm, steps=20, targeted=targeted)
    assert (answers(model, x_adv) != y).all()
    torch.testing.assert_close(far(x_adv, x, norm), length(shortest, norm), rtol=1e-3, atol=0)


def published(model: nn.Module, x: Tensor, y: int, target: int | None, norm: str, steps: int) -> float:
    """The distance that the published iteration finds for one image, from the image, without the final search."""
    classes = [target] if target is not None else [k for k in range(model(x[None]).shape[1]) if k != y]
    point, best = x.flatten(), math.inf
    for _ in range(steps):
        options = []
        for k in classes:
            at = point.clone().requires_grad_()
            logits = model(at.view(1, *x.shape))[0]
            gap = logits[k] - logits[y]
            (w,) = torch.autograd.grad(gap, at)
            gap = gap.detach()
            options.append((gap.abs() / length(w[None], DUAL[norm])[0], gap, w))
        _, gap, w = min(options, key=lambda option: float(option[0]))
        offset = w @ point - gap
        ways = [TO_HYPERPLANE[norm](p[None], w[None], (w @ p - offset)[None])[0] for p in (point, x.flatten())]
        here, there = (max(float(length(way[None], norm)), 1e-8) for way in ways)
        alpha = min(here / (here + there), 0.1)
        point = ((1 - alpha) * (point + 1.05 * ways[0]) + alpha * (x.flatten() + 1.05 * ways[1])).clamp(0, 1)
        if int(model(point.view(1, *x.shape)).argmax()) != y:
            best = min(best, float(length((point - x.flatten())[None], norm)))
            point = 0.9 * point + 0.1 * x.flatten()
    return best


@each_norm
@pytest.mark.parametrize("targeted", [True, False])
def test_it_walks_as_published(norm: str, targeted: bool) -> None:
    model, x = smooth(), images(6)
    logits = model(x).detach()
    y = logits.argmax(1)
    expected = []
    for i in range(6):
        order = logits[i].argsort(descending=True).tolist()
        heads = order[1:3] if targeted else [None]
        expected.append(min(published(model, x[i], int(y[i]), head, norm, 12) for head in heads))
    x_adv = fab(model, x, y, norm, steps=12, targets=2, targeted=targeted, search=0)
    found = torch.where(answers(model, x_adv) != y, far(x_adv, x, norm), torch.inf)
    torch.testing.assert_close(found, torch.tensor(expected).to(found), rtol=1e-5, atol=1e-8)
    assert found.isfinite().any()


@each_norm
def test_more_work_never_finds_less(norm: str) -> None:
    model, x = smooth(5), images(12)
    y = answers(model, x)

    def distance(**options: Any) -> Tensor:
        x_adv = fab(model, x, y, norm, **{"steps": 6, "targets": 2, "search": 0, **options}, generator=streams(12))
        return torch.where(answers(model, x_adv) != y, far(x_adv, x, norm), torch.inf)

    least = distance()
    for more in ({"steps": 12}, {"targets": 4}, {"restarts": 3}, {"search": 3}):
        assert (distance(**more) <= least * (1 + 1e-9)).all(), more
    assert (distance(search=3) < least).any()


@each_norm
def test_restarts_find_what_the_first_walk_does_not(norm: str) -> None:
    model, x = smooth(5), images(40)
    with torch.no_grad():
        weights(model).mul_(8)
    y = answers(model, x)
    one, four = (quick(model, x, y, norm, targets=1, search=0, restarts=n, generator=streams(40)) for n in (1, 4))
    one, four = (torch.where(answers(model, found) != y, far(found, x, norm), torch.inf) for found in (one, four))
    assert (four <= one * (1 + 1e-9)).all()
    assert (four < 0.9 * one).any()


def streams(n: int) -> Streams:
    return Streams.of(torch.arange(n), 0)


@each_norm
def test_no_image_depends_on_its_company(norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = smooth(5), images(6)
    y = answers(model, x)
    y[4] = (y[4] + 1) % 5
    enough = float(far(quick(model, x, y, norm), x, norm).median())
    attack = partial(quick, norm=norm, restarts=2, enough=enough, eps=RADIUS[norm])
    together = attack(model, x, y, generator=streams(6))
    torch.testing.assert_close(together[4], x[4], rtol=0, atol=0)
    alone = [attack(model, x[i : i + 1], y[i : i + 1], generator=streams(6)[torch.tensor([i])]) for i in range(6)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-9)
    monkeypatch.setattr(module, "ROWS", 5)
    monkeypatch.setattr(module, "CHUNK", 2)
    torch.testing.assert_close(attack(model, x, y, generator=streams(6)), together, rtol=0, atol=1e-9)


@each_norm
def test_an_image_found_within_enough_is_done(norm: str) -> None:
    model, x = smooth(5), images(40)
    y = answers(model, x)
    rows = 0

    def counted(z: Tensor) -> Tensor:
        nonlocal rows
        rows += len(z)
        return model(z)

    nearest = quick(counted, x, y, norm, search=0)
    distance = torch.where(answers(model, nearest) != y, far(nearest, x, norm), torch.inf)
    enough, everything = float(distance.median()), rows
    rows = 0
    x_adv = quick(counted, x, y, norm, search=0, enough=enough)
    torch.testing.assert_close((answers(model, x_adv) != y) & (far(x_adv, x, norm) <= enough), distance <= enough)
    assert rows < 0.8 * everything
    rows = 0
    quick(counted, x, y, norm, enough=math.inf)
    assert rows < 0.3 * everything


def test_gradients_are_the_models_and_answers_may_come_from_elsewhere() -> None:
    model, x = smooth(), images(5)
    y = answers(model, x)
    looks = []

    def with_gradient(z: Tensor) -> Tensor:
        assert z.requires_grad
        return model(z)

    def answering(z: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        looks.append(len(z))
        return model(z)

    x_adv = quick(with_gradient, x, y, "linf", forward=answering)
    torch.testing.assert_close(x_adv, quick(model, x, y, "linf"), rtol=0, atol=0)
    assert len(looks) == 1 + 8 + 8 + 2 + 3  # clean, the first target, the others, and the final search


def test_the_nearest_boundary_is_that_of_least_distance() -> None:
    model, x = linear(4, 24), images(7)
    y = answers(model, x)
    others = torch.stack([torch.tensor([k for k in range(4) if k != int(label)]) for label in y])
    for norm, dual in DUAL.items():
        gap, w = nearest_boundary(model, x, y, others, norm)
        weight, logits = weights(model), model(x).detach()
        rows = torch.arange(7)[:, None]
        gaps = logits.gather(1, others) - logits[rows, y[:, None]]
        normals = weight[others] - weight[y[:, None]]
        ratio = gaps.abs() / length(normals, dual)
        nearest = ratio.argmin(1)
        torch.testing.assert_close(gap, gaps[rows[:, 0], nearest])
        torch.testing.assert_close(w, normals[rows[:, 0], nearest])


@each_norm
def test_the_final_search_stays_wrong_and_comes_nearer(norm: str) -> None:
    model, x = smooth(), images(30)
    y = answers(model, x)
    for x_adv in (images(30), quick(model, x, y, norm, search=0)):
        wrong = answers(model, x_adv) != y
        assert wrong.any()
        before, start = far(x_adv[wrong], x[wrong], norm), x_adv[wrong]
        distance = before
        for steps in (1, 3, 8):
            found = tighten(model, start, x[wrong], y[wrong], norm, steps)
            assert (answers(model, found) != y[wrong]).all()
            assert ((found >= 0) & (found <= 1)).all()
            assert (far(found, x[wrong], norm) <= distance * (1 + 1e-9)).all()
            distance = far(found, x[wrong], norm)
    # From a walk's point, close to the boundary, the boundary is reached.
    with torch.no_grad():
        left = margin(model(found), y[wrong]) / margin(model(start), y[wrong])
    assert float(left.max()) < 1e-3


@each_norm
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("targeted", [True, False])
def test_few_classes(norm: str, classes: int, targeted: bool) -> None:
    model, x = smooth(classes), images(8)
    y = answers(model, x)
    x_adv = fab(model, x, y, norm, steps=20, targeted=targeted)
    assert ((x_adv >= 0) & (x_adv <= 1)).all()
    same = (x_adv == x).flatten(1).all(1)
    assert torch.equal(answers(model, x_adv) == y, same)
    assert not same.all()


@pytest.mark.filterwarnings("error")
def test_the_model_and_the_caller_are_left_as_they_were() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
    model[2].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.rand(4, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    kept = x.clone()
    y = answers(model.eval(), x)
    model.train()
    model[2].eval()
    seen = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    state = torch.get_rng_state()
    x_adv = quick(model, x, y, "l2", restarts=2, generator=streams(4))
    assert torch.equal(torch.get_rng_state(), state)
    assert [part.training for part in model] == [True, True, False, True, True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(x, kept)
    assert all(z.is_contiguous(memory_format=torch.channels_last) for z in (x_adv, *seen))


def test_without_gradients_the_images_come_back() -> None:
    def constant(z: Tensor) -> Tensor:
        return torch.tensor([1.0, 0.0, 0.0]) + 0 * z.flatten(1)[:, :3]

    x = torch.rand(3, 1, 2, 2)
    for norm in TO_HYPERPLANE:
        assert torch.equal(quick(constant, x, torch.zeros(3, dtype=torch.long), norm), x)


def test_no_images_are_no_trouble() -> None:
    x, y = torch.zeros(0, 2, 3, 4).double(), torch.zeros(0, dtype=torch.long)
    assert quick(smooth(), x, y, "linf").shape == x.shape


@each_norm
def test_restarts_begin_at_half_the_radius(norm: str) -> None:
    x = torch.full((4, 3, 1, 5, 5), 0.5)
    start = module._around(x, norm, 0.1, streams(4))
    torch.testing.assert_close(length((start - x).flatten(2), norm), torch.full((4, 3), 0.1))
    assert (start[:, 0] != start[:, 1]).any()


def test_what_is_wrong_is_said() -> None:
    model, x = smooth(), images(1)
    y = answers(model, x)
    with pytest.raises(InputError, match="unknown norm 'l3'"):
        fab(model, x, y, "l3")
    for name in ("steps", "restarts", "targets"):
        with pytest.raises(InputError, match=f"{name}=0"):
            partial(fab, **{name: 0})(model, x, y, "linf")


def test_inside_the_threat_model_where_enough_says_so() -> None:
    model, x = smooth(), images(20).float()
    model = model.float()
    y = answers(model, x)
    for norm, eps in (("linf", 0.2), ("l2", 0.5), ("l1", 2.0)):
        x_adv = fab(model, x, y, norm, steps=20, enough=eps)
        near = far(x_adv, x, norm) <= eps
        assert near.any()
        assert Threat(norm, eps).contains(x_adv[near], x[near], slack=0).all()
