"""The threat model: nothing leaves it, and what it does inside is the geometry that it says."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from fdml.errors import InputError
from fdml.threat import NORMS, Threat

every_norm = pytest.mark.parametrize("norm", NORMS)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rand(*shape: int, low: float = 0.0, high: float = 1.0, seed: int = 0) -> Tensor:
    return torch.empty(shape).uniform_(low, high, generator=seeded(seed))


SHAPES = hnp.array_shapes(min_dims=4, max_dims=4, min_side=1, max_side=4)
EPS = st.sampled_from([0.0, 1e-30, 1e-6, 1.0]) | st.floats(0, 1)
# Some images at the border of the box, some adversarial ones far outside it.
PIXELS = st.sampled_from([0.0, 1.0]) | st.floats(0, 1, width=32)
ANYWHERE = st.sampled_from([0.0, 1.0]) | st.floats(-2, 3, width=32)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    shape = draw(SHAPES)
    x, x_adv = (draw(hnp.arrays(np.float32, shape, elements=values)) for values in (PIXELS, ANYWHERE))
    return torch.from_numpy(x), torch.from_numpy(x_adv)


@every_norm
@settings(max_examples=60)
@given(pair=pairs(), eps=EPS)
def test_projection_ends_inside_and_moves_nothing_that_is_inside(
    norm: str, pair: tuple[Tensor, Tensor], eps: float
) -> None:
    x, x_adv = pair
    threat = Threat(norm, eps if norm == "linf" else 5 * eps)
    before = x.clone(), x_adv.clone()
    projected = threat.project(x_adv, x)
    assert torch.equal(x, before[0])
    assert torch.equal(x_adv, before[1])
    assert threat.contains(projected, x).all()
    assert projected.min() >= 0
    assert projected.max() <= 1
    torch.testing.assert_close(threat.project(projected, x), projected, atol=1e-6, rtol=0)
    inside = x + 0.5 * (projected - x)
    torch.testing.assert_close(threat.project(inside, x), inside, atol=1e-6, rtol=0)
    assert torch.equal(threat.project(x, x), x)


@every_norm
@settings(max_examples=60)
@given(pair=pairs(), eps=EPS, seed=st.integers(0, 2**31))
def test_a_random_start_is_inside_and_decided_by_its_generator(
    norm: str, pair: tuple[Tensor, Tensor], eps: float, seed: int
) -> None:
    x, _ = pair
    threat = Threat(norm, eps if norm == "linf" else 5 * eps)
    start = threat.random(x, seeded(seed))
    assert threat.contains(start, x).all()
    assert start.min() >= 0
    assert start.max() <= 1
    assert torch.equal(threat.random(x, seeded(seed)), start)


@every_norm
@pytest.mark.parametrize("eps", [0.01, 0.5])
@pytest.mark.parametrize("pixel", [0.0, 0.7, 0.9])
def test_rounding_takes_no_large_image_out(norm: str, eps: float, pixel: float) -> None:
    # Equal pixels are the worst case: every one of 150,528 is rounded to the same side.
    x = torch.full((1, 3, 224, 224), pixel)
    threat = Threat(norm, eps)
    for x_adv in (x + 0.3, x - 0.1, x + 2 * eps / x.numel()):
        assert threat.contains(threat.project(x_adv, x), x).all()


@every_norm
def test_projection_is_the_nearest_point_of_the_ball(norm: str) -> None:
    # In the middle of the box p is the nearest iff <x_adv - p, q - p> <= 0 for every q of the ball (it is convex).
    x = torch.full((40, 1, 3, 4), 0.5)
    threat = Threat(norm, 0.4)
    x_adv = x + torch.randn(x.shape, generator=seeded(1))
    p = threat.project(x_adv, x)
    assert not threat.contains(x_adv, x).any()
    torch.testing.assert_close(threat.distance(p, x), torch.full((40,), 0.4))
    for seed in range(20):
        q = threat.random(x, seeded(seed))
        q = x + (q - x) * (0.4 / threat.distance(q, x))[:, None, None, None]
        assert ((x_adv - p) * (q - p)).sum((1, 2, 3)).max() <= 1e-6
    for corner in torch.eye(12).view(12, 1, 3, 4) * 0.4:
        for q in (x + corner, x - corner):
            assert ((x_adv - p) * (q - p)).sum((1, 2, 3)).max() <= 1e-6


@pytest.mark.parametrize(
    ("delta", "eps", "expected"),
    [
        ([0.3, 0.1], 0.2, [0.2, 0.0]),
        ([0.3, 0.2], 0.3, [0.2, 0.1]),
        ([-0.3, 0.2], 0.3, [-0.2, 0.1]),
        ([0.4, -0.4], 0.4, [0.2, -0.2]),
        ([0.1, 0.1], 0.3, [0.1, 0.1]),
        ([0.4, 0.1], 0.0, [0.0, 0.0]),
    ],
)
def test_l1_projection_by_hand(delta: list[float], eps: float, expected: list[float]) -> None:
    x = torch.full((1, 1, 1, 2), 0.5)
    projected = Threat("l1", eps).project(x + torch.tensor(delta).view_as(x), x)
    torch.testing.assert_close(projected - x, torch.tensor(expected).view_as(x))


def test_l1_projection_finds_the_threshold_that_bisection_finds() -> None:
    x = torch.full((30, 3, 4, 5), 0.5)
    delta = torch.randn(x.shape, generator=seeded()) * 0.1
    projected = Threat("l1", 0.4).project(x + delta, x)
    for one, found in zip(delta.double(), projected - x, strict=True):
        low, high = 0.0, float(one.abs().max())
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if (one.abs() - middle).clamp(min=0).sum() > 0.4 else (low, middle)
        expected = one.sign() * (one.abs() - high).clamp(min=0)
        torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=0)


@every_norm
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1.0, 1e10])
def test_a_step_has_its_length_whatever_the_gradient(norm: str, scale: float) -> None:
    x = rand(5, 3, 8, 8)
    grad = torch.randn(x.shape, generator=seeded()) * scale
    stepped = Threat(norm, 0.1).ascend(x, grad, 0.3)
    torch.testing.assert_close(Threat(norm, 0.1).distance(stepped, x), torch.full((5,), 0.3), atol=1e-5, rtol=1e-5)
    assert ((stepped - x) * grad).sum((1, 2, 3)).min() > 0


@pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2), ("l1", math.inf)])
def test_a_step_is_the_steepest(norm: str, dual: float) -> None:
    # Of all steps of one length the best gains length * dual norm of the gradient (below 200 pixels l1 moves one).
    x = rand(5, 1, 8, 8)
    grad = torch.randn(x.shape, generator=seeded())
    gained = ((Threat(norm, 0.1).ascend(x, grad, 0.2) - x) * grad).sum((1, 2, 3))
    torch.testing.assert_close(gained, 0.2 * grad.flatten(1).norm(p=dual, dim=1), atol=1e-5, rtol=1e-5)


def test_an_l1_step_is_shared_by_the_largest_hundredth() -> None:
    x, grad = torch.full((2, 3, 20, 20), 0.5), torch.randn(2, 3, 20, 20, generator=seeded())
    moved = Threat("l1", 1.0).ascend(x, grad, 0.3) - x
    for one, gradient in zip(moved.flatten(1), grad.flatten(1), strict=True):
        top = gradient.abs().topk(12).indices
        assert set(one.nonzero().squeeze(1).tolist()) == set(top.tolist())
        torch.testing.assert_close(one[top], gradient[top].sign() * 0.3 / 12)


def test_an_l1_step_is_not_spent_on_pixels_that_cannot_move() -> None:
    x = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.5]).view(1, 1, 1, 5)
    grad = torch.tensor([-9.0, 8.0, 7.0, -6.0, 5.0]).view_as(x)
    for chosen, sign in ((2, 1.0), (3, -1.0), (4, 1.0)):
        step = Threat("l1", 1.0).ascend(x, grad, 0.2) - x
        torch.testing.assert_close(step.flatten(), 0.2 * sign * torch.eye(5)[chosen])
        grad = grad.masked_fill(step != 0, 0.0)


@every_norm
def test_a_gradient_of_zero_moves_nothing(norm: str) -> None:
    x = rand(2, 1, 4, 4)
    assert torch.equal(Threat(norm, 0.1).ascend(x, torch.zeros_like(x), 0.3), x)


@pytest.mark.parametrize(("norm", "power"), [("linf", 0), ("l2", 12), ("l1", 1)])
def test_random_starts_are_spread_as_documented(norm: str, power: int) -> None:
    x = torch.full((4000, 1, 3, 4), 0.5)
    delta = Threat(norm, 0.4).random(x, seeded()) - x
    assert delta.mean().abs() < 0.01
    # Uniform in the cube: |delta| is; uniform in the ball of 12 dimensions: radius^12 is; l1: the radius is.
    uniform = delta.abs() / 0.4 if norm == "linf" else (Threat(norm, 0.4).distance(x + delta, x) / 0.4) ** power
    quartiles = torch.quantile(uniform.flatten()[:4000], torch.tensor([0.25, 0.5, 0.75]))
    torch.testing.assert_close(quartiles, torch.tensor([0.25, 0.5, 0.75]), atol=0.04, rtol=0)


@every_norm
def test_a_radius_of_zero_is_the_image_alone(norm: str) -> None:
    x, other = rand(3, 3, 4, 4), rand(3, 3, 4, 4, seed=1)
    threat = Threat(norm, 0.0)
    assert torch.equal(threat.project(other, x), x)
    assert torch.equal(threat.random(x, seeded()), x)
    assert threat.contains(x, x).all()
    assert not threat.contains(other, x).any()


@every_norm
@pytest.mark.parametrize("batch", [0, 1])
def test_batches_of_none_and_one(norm: str, batch: int) -> None:
    threat, x = Threat(norm, 0.3), rand(batch, 3, 4, 4)
    for out in (threat.random(x), threat.project(x + 1, x), threat.ascend(x, x - 0.5, 0.1)):
        assert out.shape == x.shape
    assert threat.contains(x, x).shape == (batch,)


@every_norm
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_memory_layout_and_dtype_are_kept_and_do_not_matter(norm: str, dtype: torch.dtype) -> None:
    threat, x = Threat(norm, 0.1), rand(4, 3, 8, 8).to(dtype)
    other = rand(4, 3, 8, 8, seed=1).to(dtype)
    last, other_last = (t.contiguous(memory_format=torch.channels_last) for t in (x, other))
    pairs = [
        (threat.project(other, x), threat.project(other_last, last)),
        (threat.ascend(x, other - 0.5, 0.2), threat.ascend(last, other_last - 0.5, 0.2)),
        (threat.random(x), threat.random(last)),
    ]
    for out, out_last in pairs:
        assert out.dtype == out_last.dtype == dtype
        assert out.is_contiguous()
        assert out_last.is_contiguous(memory_format=torch.channels_last)
    for out, out_last in pairs[:2]:
        torch.testing.assert_close(out, out_last, atol=1e-6, rtol=0)


@every_norm
def test_membership_sees_the_ball_and_the_box(norm: str) -> None:
    threat = Threat(norm, 0.2)
    x = torch.tensor([0.5, 0.1, 0.9])[:, None, None, None].expand(3, 1, 1, 1)
    moved = torch.tensor([0.2, -0.2, 0.2])[:, None, None, None]
    assert threat.contains(x + moved, x).tolist() == [True, False, False]
    assert threat.contains(x + 1.01 * moved, x).tolist() == [False, False, False]
    torch.testing.assert_close(threat.distance(x + moved, x), torch.full((3,), 0.2))


@pytest.mark.parametrize(("norm", "expected"), [("linf", 0.4), ("l2", 0.5), ("l1", 0.7)])
def test_distance_by_hand(norm: str, expected: float) -> None:
    x = torch.zeros(1, 1, 1, 3)
    x_adv = torch.tensor([0.3, 0.4, 0.0]).view_as(x)
    torch.testing.assert_close(Threat(norm, 0.1).distance(x_adv, x), torch.tensor([expected]))


@pytest.mark.parametrize(
    ("norm", "eps", "message"),
    [
        ("linf", 8, r"eps 8 .*8/255"),
        ("linf", 0.5 * 255, r"127\.5/255"),
        ("linf", 1000, r"1000 is larger"),
        ("linf", -0.1, r"-0\.1"),
        ("l2", -1e-9, r"-1e-09"),
        ("l2", math.nan, "nan"),
        ("linf", math.inf, "inf"),
        ("l1", math.inf, "inf"),
        ("Linf", 0.1, "'Linf'.*'linf'"),
        ("l_2", 0.1, "'l_2'.*'l2'"),
        ("euclid", 0.1, "'euclid'.*linf"),
    ],
)
def test_what_is_no_threat_is_refused(norm: str, eps: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Threat(norm, eps)


@pytest.mark.parametrize(
    ("threat", "text"),
    [
        (Threat("linf", 8 / 255), "linf 8/255"),
        (Threat("linf", 0.1), "linf 0.1"),
        (Threat("l2", 0.5), "l2 0.5"),
        (Threat("l1", 12), "l1 12"),
        (Threat("linf", 0), "linf 0"),
    ],
)
def test_how_it_is_written(threat: Threat, text: str) -> None:
    assert str(threat) == text
