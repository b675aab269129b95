"""The losses against sums done by hand, and at the edges where a formula would divide by zero."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fdml import losses

Loss = Callable[[Tensor, Tensor], Tensor]


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def softmax(row: list[float]) -> list[float]:
    powers = [math.exp(value - max(row)) for value in row]
    return [power / sum(powers) for power in powers]


def naive_margin(row: list[float], y: int) -> float:
    return max(value for k, value in enumerate(row) if k != y) - row[y]


def naive_dlr(row: list[float], y: int) -> float:
    ordered = sorted(row, reverse=True)
    return naive_margin(row, y) / (ordered[0] - ordered[2])


def naive_bce(row: list[float], y: int) -> float:
    p = softmax(row)
    return -math.log(p[y]) - math.log(1.0001 - max(value for k, value in enumerate(p) if k != y))


@pytest.mark.parametrize("classes", [3, 10])
@pytest.mark.parametrize(
    ("loss", "naive"),
    [
        (losses.cross_entropy, lambda row, y: -math.log(softmax(row)[y])),
        (losses.margin, naive_margin),
        (losses.dlr, naive_dlr),
        (losses.boosted_cross_entropy, naive_bce),
    ],
)
def test_each_image_by_hand(loss: Loss, naive: Callable[[list[float], int], float], classes: int) -> None:
    logits, y = 3 * rand(20, classes), torch.arange(20) % classes
    expected = [naive(row, label) for row, label in zip(logits.tolist(), y.tolist(), strict=True)]
    torch.testing.assert_close(loss(logits, y), torch.tensor(expected), atol=1e-5, rtol=1e-5)


def test_dlr_ignores_shift_and_scale_and_is_the_margin_of_two_classes() -> None:
    logits, y = rand(20, 5), torch.arange(20) % 5
    torch.testing.assert_close(losses.dlr(100 * logits + 7, y), losses.dlr(logits, y), atol=1e-4, rtol=1e-4)
    two, y = rand(20, 2), torch.arange(20) % 2
    assert torch.equal(losses.dlr(two, y), losses.margin(two, y))
    torch.testing.assert_close(
        losses.margin(two, y), two.gather(1, 1 - y[:, None])[:, 0] - two.gather(1, y[:, None])[:, 0]
    )


@pytest.mark.parametrize("loss", [losses.margin, losses.dlr])
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_above_zero_is_fooled(loss: Loss, classes: int) -> None:
    logits, y = rand(200, classes), torch.arange(200) % classes
    assert torch.equal(loss(logits, y) > 0, logits.argmax(1) != y)


def test_kl_divergence() -> None:
    p, q = 2 * rand(30, 4), 2 * rand(30, 4, seed=1)
    found = losses.kl_divergence(p, q)
    expected = [
        sum(a * math.log(a / b) for a, b in zip(softmax(one), softmax(other), strict=True))
        for one, other in zip(p.tolist(), q.tolist(), strict=True)
    ]
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-5, rtol=1e-5)
    assert found.min() > 0
    torch.testing.assert_close(losses.kl_divergence(p, p + 5), torch.zeros(30), atol=1e-6, rtol=0)
    # The direction matters: KL(p ‖ q) punishes a q that is small where p is large.
    sure, even = torch.tensor([[9.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    assert losses.kl_divergence(sure, even) < losses.kl_divergence(even, sure)


EXTREMES = torch.tensor(
    [
        [1e4, 0.0, 0.0, 0.0],
        [0.0, 1e4, 0.0, 0.0],
        [-1e4, 1e4, -1e4, 1e4],
        [1e4, 1e4, 1e4, 1e4],
        [-1e4, 0.0, 0.0, 0.0],
        [0.0, 0.0, 0.0, 0.0],
    ]
)


@pytest.mark.parametrize(
    "loss",
    [
        losses.cross_entropy,
        losses.margin,
        losses.dlr,
        losses.boosted_cross_entropy,
        lambda z, _: losses.kl_divergence(z, z.flip(1)),
        lambda z, _: losses.kl_divergence(z, z.detach()),
        lambda z, _: losses.kl_divergence(z.detach().flip(0), z),
    ],
)
def test_extreme_logits_have_finite_values_and_gradients(loss: Loss) -> None:
    for label in range(4):
        logits = EXTREMES.clone().requires_grad_()
        value = loss(logits, torch.full((len(EXTREMES),), label))
        (grad,) = torch.autograd.grad(value.sum(), logits)
        assert value.isfinite().all()
        assert grad.isfinite().all()


@pytest.mark.parametrize(
    ("smoothing", "weight", "temperature"),
    [(0.0, 0.0, 1.0), (0.1, 0.0, 1.0), (0.1, 0.3, 2.0), (0.0, 1.0, 0.5), (1.0, 0.0, 1.0)],
)
def test_soft_target(smoothing: float, weight: float, temperature: float) -> None:
    y, answer = torch.tensor([2, 0, 1]), 3 * rand(3, 4)
    target = losses.soft_target(y, 4, smoothing=smoothing, answer=answer, weight=weight, temperature=temperature)
    torch.testing.assert_close(target.sum(1), torch.ones(3))
    for row, label, logits in zip(target.tolist(), y.tolist(), answer.tolist(), strict=True):
        soft = softmax([value / temperature for value in logits])
        hard = [smoothing / 4 + (1 - smoothing) * (k == label) for k in range(4)]
        mixed = [(1 - weight) * h + weight * s for h, s in zip(hard, soft, strict=True)]
        assert row == pytest.approx(mixed, abs=1e-6)


def test_soft_target_without_a_teacher_is_the_label() -> None:
    y = torch.tensor([2, 0])
    assert losses.soft_target(y, 3, weight=0.5).tolist() == [[0, 0, 1], [1, 0, 0]]


@pytest.mark.parametrize("shape", [(6, 8), (6, 3, 4, 4)])
def test_feature_distance(shape: tuple[int, ...]) -> None:
    a, b = rand(*shape), rand(*shape, seed=1)
    rows = zip(a.flatten(1).double(), b.flatten(1).double(), strict=True)
    expected = sum(1 - float(s @ t / (s.norm() * t.norm())) for s, t in rows) / 6
    assert float(losses.feature_distance(a, b)) == pytest.approx(expected, abs=1e-6)
    for other, distance in ((3 * a, 0.0), (-a, 2.0), (torch.zeros_like(a), 1.0)):
        assert float(losses.feature_distance(a, other)) == pytest.approx(distance, abs=1e-6)


def test_feature_distance_of_a_dead_layer_has_finite_gradients() -> None:
    student = torch.zeros(4, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(losses.feature_distance(student, rand(4, 8)), student)
    assert grad.isfinite().all()


def distance(a: Tensor, b: Tensor) -> float:
    return 1 - float(a @ b / (a.norm() * b.norm()))


def naive_triplet(
    anchor: Tensor, positive: Tensor, candidates: Tensor, y: list[int], confused: list[int], candidate_y: list[int]
) -> tuple[float, float, float, float]:
    """The loss at margin 0.5 without the norm term, the active share, and both mean distances: two loops."""
    hinges, positives, negatives = [], [], []
    for i in range(len(y)):
        near: dict[str, list[float]] = {"confused": [], "other": []}
        for j in range(len(candidate_y)):
            d = distance(anchor[i], candidates[j])
            if candidate_y[j] == confused[i]:
                near["confused"].append(d)
            if candidate_y[j] != y[i]:
                near["other"].append(d)
        pool = near["confused"] or near["other"]
        positives.append(distance(anchor[i], positive[i]))
        negatives.append(min(pool) if pool else 2.0)
        hinges.append(max(0.0, 0.5 + positives[-1] - negatives[-1]) if pool else 0.0)
    n = len(y)
    return sum(hinges) / n, sum(h > 0 for h in hinges) / n, sum(positives) / n, sum(negatives) / n


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "candidate_y",
    [
        pytest.param([0, 1, 2, 3, 0, 1, 2, 3, 0, 1], id="every class there"),
        pytest.param([0, 1, 0, 1, 0, 1, 0, 1, 0, 1], id="some confused classes missing"),
        pytest.param([0] * 10, id="one class"),
        pytest.param([0, 1, 2], id="another number than the anchors"),
    ],
)
def test_triplet_is_the_double_loop(seed: int, candidate_y: list[int]) -> None:
    y, confused = [0, 1, 0, 1, 0, 1], [3, 2, 1, 0, 2, 3]
    anchor, positive = rand(6, 5, seed=seed), rand(6, 5, seed=seed + 100)
    candidates = rand(len(candidate_y), 5, seed=seed + 200)
    found = losses.triplet(
        anchor,
        positive,
        candidates,
        torch.tensor(y),
        torch.tensor(confused),
        torch.tensor(candidate_y),
        margin=0.5,
        norm_weight=0.0,
    )
    expected = naive_triplet(anchor, positive, candidates, y, confused, candidate_y)
    assert [float(value) for value in found] == pytest.approx(expected, abs=1e-5)


def test_the_hinge_pulls_the_anchor_to_the_positive_and_off_the_negative() -> None:
    anchor = torch.tensor([[1.0, 0.2]], requires_grad=True)
    positive, negative = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
    y, other = torch.tensor([0]), torch.tensor([1])
    found = losses.triplet(anchor, positive, negative, y, other, other, margin=0.1, norm_weight=0.0)
    assert found.active == 1
    (grad,) = torch.autograd.grad(found.loss, anchor)
    moved = (anchor - 0.1 * grad).detach()
    assert distance(moved[0], positive[0]) < distance(anchor[0].detach(), positive[0])
    assert distance(moved[0], negative[0]) > distance(anchor[0].detach(), negative[0])
    saturated = losses.triplet(anchor, anchor.detach(), -anchor.detach(), y, other, other, margin=0.1, norm_weight=0.0)
    assert saturated.active == 0
    assert saturated.loss == 0


def test_a_batch_of_one_class_has_no_hinge_and_finite_gradients() -> None:
    anchor, positive = rand(4, 5).requires_grad_(), rand(4, 5, seed=1)
    zeros, confused = torch.zeros(4, dtype=torch.int64), torch.ones(4, dtype=torch.int64)
    found = losses.triplet(anchor, positive, positive, zeros, confused, zeros, margin=2.0, norm_weight=0.0)
    assert found.loss == 0
    assert found.active == 0
    assert found.d_an == 2
    (grad,) = torch.autograd.grad(found.loss, anchor)
    assert torch.equal(grad, torch.zeros_like(grad))


def test_the_norm_term_is_the_mean_square_of_the_three() -> None:
    anchor, positive, candidates = rand(2, 3), rand(2, 3, seed=1), rand(2, 3, seed=2)
    y, other = torch.tensor([0, 1]), torch.tensor([1, 0])

    def loss(norm_weight: float) -> float:
        found = losses.triplet(anchor, positive, candidates, y, other, other, margin=0.1, norm_weight=norm_weight)
        return float(found.loss)

    # Each anchor has one candidate of its confused class, so both are mined.
    square = sum(float(features.square().mean()) for features in (anchor, positive, candidates)) / 3
    assert loss(0.5) - loss(0.0) == pytest.approx(0.5 * square, abs=1e-6)


def test_features_of_zero_have_finite_gradients() -> None:
    anchor = torch.zeros(2, 3, requires_grad=True)
    y, other = torch.tensor([0, 1]), torch.tensor([1, 0])
    found = losses.triplet(anchor, rand(2, 3), rand(2, 3, seed=1), y, other, other, margin=0.5)
    (grad,) = torch.autograd.grad(found.loss, anchor)
    assert grad.isfinite().all()
