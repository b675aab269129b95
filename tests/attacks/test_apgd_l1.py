"""APGD in l1: the projection against bisection, the points against the published algorithm, and what must hold."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fdml.attacks import OBJECTIVES, Attack, apgd, apgd_targeted, pgd
from fdml.attacks.apgd_l1 import project_l1
from fdml.losses import margin
from fdml.randomness import Streams
from fdml.threat import Threat

ATTACKS: dict[str, Attack] = {
    "ce": partial(apgd, steps=12),
    "ce-narrow": partial(apgd, steps=12, wide=False),
    "dlr-restarts": partial(apgd, steps=5, objective="dlr", restarts=3),
    "targeted": partial(apgd_targeted, steps=8, targets=2),
    "targeted-narrow": partial(apgd_targeted, steps=8, targets=2, wide=False),
}
each_attack = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=seeded(seed), dtype=torch.float64)


def smooth(classes: int = 4, shape: tuple[int, int, int] = (1, 6, 6), scale: float = 0.5) -> nn.Module:
    """A small net in double precision without kinks, so that rounding decides no sign."""
    torch.manual_seed(2)
    net = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 10), nn.Tanh(), nn.Linear(10, classes))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0, scale)
    return net.double()


@torch.no_grad()
def labels(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).argmax(1)


@torch.no_grad()
def margins(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return margin(model(x), y)


# The projection


def bisected(x_adv: Tensor, x: Tensor, eps: float) -> Tensor:
    """The projection of one image: its every pixel for a guessed price of moving, and the price by bisection."""

    def at(price: float) -> Tensor:
        move = (x_adv - x).sign() * ((x_adv - x).abs() - price).clamp(min=0)
        return (x + move).clamp(0, 1)

    low, high = 0.0, float((x_adv - x).abs().max())
    if float((at(0) - x).abs().sum()) <= eps:
        return at(0)
    for _ in range(52):
        middle = (low + high) / 2
        low, high = (middle, high) if float((at(middle) - x).abs().sum()) > eps else (low, middle)
    return at(high)


pixels = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1))
moves = st.one_of(st.sampled_from([0.0, 0.5, -0.5]), st.floats(-3, 3))


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, float]:
    d = draw(st.integers(1, 12))
    x = torch.tensor(draw(st.lists(pixels, min_size=d, max_size=d)), dtype=torch.float64)
    move = torch.tensor(draw(st.lists(moves, min_size=d, max_size=d)), dtype=torch.float64)
    eps = draw(st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 6)))
    return (x + move).view(1, 1, 1, d), x.view(1, 1, 1, d), eps


@given(problem=problems())
@settings(max_examples=50)
def test_the_projection_is_the_nearest_point_in_the_ball_and_the_box(problem: tuple[Tensor, Tensor, float]) -> None:
    x_adv, x, eps = problem
    found = project_l1(x_adv, x, eps)
    assert ((found >= 0) & (found <= 1)).all()
    assert float((found - x).abs().sum()) <= eps + 1e-14
    torch.testing.assert_close(found, bisected(x_adv, x, eps), atol=1e-12, rtol=0)
    torch.testing.assert_close(project_l1(found, x, eps), found, atol=1e-14, rtol=0)
    away = float((x_adv - found).norm())
    for other in (x, Threat("l1", eps).project(x_adv, x), Threat("l1", eps).random(x, seeded())):
        assert away <= float((x_adv - other).norm()) + 1e-12


def test_what_the_box_takes_back_is_spent_elsewhere() -> None:
    x = torch.tensor([0.9, 0.5, 0.2]).view(1, 1, 1, 3)
    x_adv = torch.tensor([1.4, 1.0, 0.1]).view(1, 1, 1, 3)
    expected = torch.tensor([1.0, 0.9, 0.2]).view(1, 1, 1, 3)
    torch.testing.assert_close(project_l1(x_adv, x, 0.5), expected)
    clipped = Threat("l1", 0.5).project(x_adv, x)
    assert float((clipped - x).abs().sum()) < 0.4


@pytest.mark.parametrize("noise", [1e-6, 0.01, 1.0])
@pytest.mark.parametrize("eps", [1e-3, 1.0, 12.0, 300.0])
def test_single_precision_stays_inside_and_is_close_to_double(eps: float, noise: float) -> None:
    x = (rand(8, 3, 20, 20) * (rand(8, 3, 20, 20, seed=1) < 0.5)).float()
    x_adv = x + noise * torch.randn(x.shape, generator=seeded(2))
    found = project_l1(x_adv, x, eps)
    moved = (found != x).flatten(1).sum(1)
    # What rounding a pixel may add, and nothing for the projection.
    assert (Threat("l1", eps).distance(found.double(), x.double()) <= eps * (1 + 1e-6) + 3e-8 * moved).all()
    torch.testing.assert_close(found.double(), project_l1(x_adv.double(), x.double(), eps), atol=1e-5, rtol=0)
    # A pixel that is not moved is the clean one to the bit: the steps are as sparse as these pixels are many.
    assert ((found == x) | ((found - x).abs() > 1e-8)).double().mean() > 0.99


def test_every_image_is_projected_as_if_it_were_alone() -> None:
    x = rand(9, 1, 5, 5)
    x_adv = x + torch.linspace(0, 3, 9).view(9, 1, 1, 1) * torch.randn(x.shape, generator=seeded(), dtype=x.dtype)
    alone = torch.cat([project_l1(x_adv[[i]], x[[i]], 2.0) for i in range(9)])
    assert torch.equal(project_l1(x_adv, x, 2.0), alone)


# The attack


@pytest.mark.parametrize(("objective", "wide"), [("ce", False), ("ce", True), ("dlr", True)])
def test_it_visits_the_points_of_the_published_algorithm(objective: str, wide: bool) -> None:
    model, eps = smooth(), 1.5
    x, start = rand(2, 1, 6, 6, seed=3), rand(2, 1, 6, 6, seed=4)
    y = labels(model, x)
    seen: list[Tensor] = []

    def watched(images: Tensor) -> Tensor:
        seen.append(images.detach().clone())
        return model(images)

    apgd(watched, x, y, Threat("l1", eps), objective=objective, start=start, keep="best", wide=wide)
    assert len(seen) == (103 if wide else 101)
    for i in range(len(x)):
        points: list[Tensor] = []
        begin = start[[i]]
        for times, steps in ((3, 30), (2, 30), (1, 40)) if wide else ((1, 100),):
            visited, begin = published(model, x[[i]], y[[i]], begin, times * eps, objective, steps)
            points += visited
        for step, (ours, theirs) in enumerate(zip(seen, points, strict=True)):
            torch.testing.assert_close(ours[[i]], theirs, atol=1e-9, rtol=0, msg=f"image {i}, point {step}")


def published(
    model: nn.Module, x: Tensor, y: Tensor, start: Tensor, eps: float, objective: str, steps: int
) -> tuple[list[Tensor], Tensor]:
    """Every point that a run of Croce and Hein 2021 evaluates for one image, and the best of them."""

    def look(point: Tensor) -> tuple[float, Tensor]:
        point = point.detach().requires_grad_()
        value = OBJECTIVES[objective](model(point), y).sum()
        return float(value.detach()), torch.autograd.grad(value, point)[0]

    d = x.numel()
    k, eta, nonzeros = math.ceil(0.2 * d), eps, d
    point = bisected(start, x, eps)
    points, (f, grad) = [point], look(point)
    f_max, x_max, grad_max = f, point, grad
    for step in range(1, steps + 1):
        largest = grad.flatten().abs().argsort(descending=True)[:k]
        direction = torch.zeros(d, dtype=x.dtype)
        direction[largest] = grad.flatten()[largest].sign() / k
        point = bisected(point + eta * direction.view_as(x), x, eps)
        points.append(point)
        f, grad = look(point)
        if f > f_max:
            f_max, x_max, grad_max = f, point, grad
        if step % max(1, int(0.04 * steps)) == 0:
            before, nonzeros = nonzeros, int(((x_max - x).abs() > 1e-6).sum())
            k = max(1, min(math.ceil(nonzeros / 1.5), nonzeros - 1))
            if nonzeros < 0.95 * before:
                eta, point, grad = eps, x_max, grad_max
            else:
                eta = max(eta / 1.5, eps / 10)
    return points, x_max


def linear() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(1)
    layer = nn.Linear(64, 2)
    with torch.no_grad():
        layer.weight.normal_(0, 0.1)
    return nn.Sequential(nn.Flatten(), layer), (layer.weight[1] - layer.weight[0]).detach()


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(("eps", "tolerance"), [(0.3, 1e-3), (2.5, 1e-2)])
def test_a_linear_model_is_attacked_optimally_inside_the_box(eps: float, tolerance: float, wide: bool) -> None:
    model, w = linear()
    x, y = rand(20, 1, 8, 8).float(), torch.arange(20) % 2
    uphill = torch.where(y[:, None] == 0, w, -w)
    # The best there is: pixel after pixel as far as the box goes, the largest weight first.
    order = uphill.abs().argsort(1, descending=True)
    room = torch.where(uphill > 0, 1 - x.flatten(1), x.flatten(1)).gather(1, order)
    spent = torch.minimum((eps - (room.cumsum(1) - room)).clamp(min=0), room)
    best = margins(model, x, y) + (spent * uphill.abs().gather(1, order)).sum(1)
    x_adv = apgd(model, x, y, Threat("l1", eps), keep="best", wide=wide, generator=seeded())
    torch.testing.assert_close(margins(model, x_adv, y), best, atol=tolerance, rtol=0)


@each_attack
def test_the_result_is_inside_and_nothing_moves_at_a_radius_of_zero(attack: Attack) -> None:
    model, threat = smooth(), Threat("l1", 1.0)
    x = torch.cat([rand(6, 1, 6, 6), rand(6, 1, 6, 6).round()]).float()
    model.float()
    y = labels(model, x)
    assert threat.contains(attack(model, x, y, threat, generator=seeded()), x).all()
    assert torch.equal(attack(model, x, y, Threat("l1", 0.0), generator=seeded()), x)


@each_attack
def test_an_image_is_attacked_as_if_it_were_alone(attack: Attack) -> None:
    model, threat, x = smooth(), Threat("l1", 1.0), rand(6, 1, 6, 6)
    y, numbers = labels(model, x), torch.arange(6)
    together = attack(model, x, y, threat, generator=Streams.of(numbers, 0))
    alone = [attack(model, x[[i]], y[[i]], threat, generator=Streams.of(numbers[[i]], 0)) for i in range(6)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-9, rtol=0)
    assert 0 < int((margins(model, together, y) > 0).sum()) < 6


def test_images_leave_once_they_are_fooled() -> None:
    model, x = smooth(), rand(30, 1, 6, 6)
    y, sizes = labels(model, x), []

    def watched(images: Tensor) -> Tensor:
        sizes.append(len(images))
        return model(images)

    x_adv = apgd(watched, x, y, Threat("l1", 1.5), steps=100, generator=seeded())
    stood = int((margins(model, x_adv, y) <= 0).sum())
    # The wider balls are no threat model: nobody leaves there.
    assert sizes[:62] == [30] * 62
    assert sizes[62:] == sorted(sizes[62:], reverse=True)
    assert sizes[-1] == stood < 20


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_few_steps_are_made_in_full(steps: int) -> None:
    model, x, calls = smooth(), rand(2, 1, 6, 6), []
    y = labels(model, x)

    def watched(images: Tensor) -> Tensor:
        calls.append(len(images))
        return model(images)

    x_adv = apgd(watched, x, y, Threat("l1", 0.1), steps=steps, keep="best", generator=seeded())
    assert len(calls) - steps == (3 if steps == 4 else 1)
    assert Threat("l1", 0.1).contains(x_adv, x).all()


@pytest.mark.parametrize("classes", [2, 3])
def test_few_classes(classes: int) -> None:
    model, x = smooth(classes), rand(10, 1, 6, 6)
    y = labels(model, x)
    for attack in ATTACKS.values():
        x_adv = attack(model, x, y, Threat("l1", 1.0), generator=seeded())
        assert (margins(model, x_adv, y) > margins(model, x, y)).all()


def test_it_beats_pgd_and_the_wide_run_is_no_weaker() -> None:
    model, x = smooth(scale=1.0), rand(60, 1, 6, 6)
    y, threat = labels(model, x), Threat("l1", 1.0)
    plain = pgd(model, x, y, threat, steps=50, keep="best", generator=seeded())
    narrow, wide = (
        apgd(model, x, y, threat, steps=50, keep="best", wide=wide, generator=seeded()) for wide in (False, True)
    )
    reached = [float(margins(model, x_adv, y).mean()) for x_adv in (plain, narrow, wide)]
    assert reached[0] < reached[1] <= reached[2]
