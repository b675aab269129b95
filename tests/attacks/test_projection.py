"""The projections: against sorting in double precision, and what must hold of any shortest way."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fdml.attacks.projection import DUAL, TO_HYPERPLANE, length

each_norm = pytest.mark.parametrize("norm", TO_HYPERPLANE)


def sorted_length(x: Tensor, w: Tensor, gap: float, norm: str) -> tuple[float, bool]:
    """The length of the shortest move of one point, and whether it closes the gap: every candidate, one by one."""
    size = w.abs()
    room = torch.where((w > 0) == (gap > 0), x, 1 - x)[size > 0]
    size, gap = size[size > 0], abs(gap)
    if float(size @ room) <= gap:
        return float(length(room, norm)) if len(room) else 0.0, float(size @ room) == gap
    if norm == "l1":
        total, spent = 0.0, 0.0
        for i in size.argsort(descending=True).tolist():
            step = min(float(room[i]), (gap - spent) / float(size[i]))
            total, spent = total + step, spent + step * float(size[i])
        return total, True
    speed = torch.ones_like(size) if norm == "linf" else size
    until = room / speed
    for t in until.sort().values.tolist():
        if float(size @ (speed * t).minimum(room)) >= gap:
            stuck = until < t
            t = (gap - float((size * room)[stuck].sum())) / float((size * speed)[~stuck].sum())
            return float(length((speed * t).minimum(room), norm)), True
    raise AssertionError


pixels = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1))
# Of a size that the squares of the plain computation here can hold.
numbers = st.one_of(st.sampled_from([0.0, 1.0, -1.0]), st.integers(-5000, 5000).map(lambda n: n / 1000))


def doubles(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, float]:
    d = draw(st.integers(1, 12))
    x = draw(st.lists(pixels, min_size=d, max_size=d))
    w = draw(st.lists(numbers, min_size=d, max_size=d))
    scale = 10.0 ** draw(st.integers(-8, 8))
    return doubles(x), doubles(w) * scale, draw(numbers) * scale


@each_norm
@given(problem=problems())
@settings(max_examples=80)
def test_the_way_is_shortest_and_ends_on_the_hyperplane_inside_the_box(
    norm: str, problem: tuple[Tensor, Tensor, float]
) -> None:
    x, w, gap = problem
    (move,) = TO_HYPERPLANE[norm](x[None], w[None], doubles([gap]))
    best, closes = sorted_length(x, w, gap, norm)
    assert ((x + move >= 0) & (x + move <= 1)).all()
    assert not move[w == 0].any()
    assert float(length(move, norm)) <= best * (1 + 1e-9) + 1e-12
    scale = float(w.abs().sum()) + abs(gap)
    if closes:
        assert float(w @ move) == pytest.approx(-gap, abs=1e-9 * scale)
    else:  # as far as the box goes
        room = torch.where((w > 0) == (gap > 0), x, 1 - x)
        assert abs(float(w @ move)) == pytest.approx(float(w.abs() @ room), abs=1e-9 * scale)


@each_norm
def test_single_precision_is_close_to_double(norm: str) -> None:
    x = torch.rand(2, 40, 784) * (torch.rand(2, 40, 784) < 0.5)
    w = torch.randn(40, 784) * 10.0 ** torch.linspace(-25, 8, 40)[:, None]
    gap = w.abs().sum(-1) * 0.2 * torch.randn(2, 40)
    single = TO_HYPERPLANE[norm](x, w, gap)
    double = TO_HYPERPLANE[norm](x.double(), w.double(), gap.double())
    torch.testing.assert_close(length(single.double(), norm), length(double, norm), rtol=2e-5, atol=1e-6)
    error = (w.double() * (single - double)).sum(-1).abs() / w.double().abs().sum(-1)
    assert float(error.max()) < 1e-6


@each_norm
def test_points_that_share_a_normal_are_as_alone(norm: str) -> None:
    x, w, gap = torch.rand(2, 7, 30), torch.randn(7, 30), torch.randn(2, 7)
    both = TO_HYPERPLANE[norm](x, w, gap)
    for i in range(7):
        for k in range(2):
            alone = TO_HYPERPLANE[norm](x[k, i : i + 1], w[i : i + 1], gap[k, i : i + 1])
            torch.testing.assert_close(both[k, i], alone[0], rtol=0, atol=1e-7)


@each_norm
@pytest.mark.parametrize(("weight", "gap"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0), (1.0, float("nan"))])
def test_nothing_to_go_by_is_no_way(norm: str, weight: float, gap: float) -> None:
    move = TO_HYPERPLANE[norm](torch.rand(1, 5), torch.full((1, 5), weight), torch.tensor([gap]))
    assert not move.nan_to_num().any()


@pytest.mark.parametrize("norm", DUAL)
def test_the_dual_norm_bounds_the_product(norm: str) -> None:
    a, b = torch.randn(50, 9), torch.randn(50, 9)
    assert ((a * b).sum(1).abs() <= length(a, norm) * length(b, DUAL[norm]) * (1 + 1e-5)).all()
    # Met with equality: the shortest way to a hyperplane far from the box's sides.
    x, gap = torch.full((50, 9), 0.5), 0.01 * torch.randn(50)
    reached = length(TO_HYPERPLANE[norm](x, a, gap), norm)
    torch.testing.assert_close(reached, gap.abs() / length(a, DUAL[norm]), rtol=1e-4, atol=1e-6)
