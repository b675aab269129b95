"""The curve over eps: exact on a model whose answers are known, monotone everywhere."""

import pytest
import torch
from torch import Tensor

from fdml.errors import InputError
from fdml.evaluate.curve import POINTS, around, curve
from fdml.randomness import Streams


def bright(x: Tensor) -> Tensor:
    """Class 1 for a mean above one half: the smallest linf change is the distance of the mean from it."""
    excess = x.mean((1, 2, 3)) - 0.5
    return torch.stack([-excess, excess], 1)


X = torch.tensor([0.42, 0.58, 0.3, 0.7, 0.55])[:, None, None, None].expand(-1, 1, 4, 4).clone()
Y = torch.tensor([0, 1, 0, 1, 0])  # the last is answered wrongly


def test_each_image_falls_at_its_distance() -> None:
    epsilons = (0.0, 0.07, 0.09, 0.19, 0.21)
    stands = curve(bright, X, Y, "linf", epsilons, generator=Streams.of(torch.arange(5), 0))
    assert stands.tolist() == [
        [True, True, True, True, False],
        [True, True, True, True, False],
        [False, False, True, True, False],
        [False, False, True, True, False],
        [False] * 5,
    ]


def test_what_fell_is_not_looked_at_again() -> None:
    seen = []

    def watched(x: Tensor) -> Tensor:
        seen.append(len(x))
        return bright(x)

    curve(watched, X[:2], Y[:2], "linf", (0.1, 0.2, 0.3), generator=Streams.of(torch.arange(2), 0))
    before = len(seen)
    curve(watched, X[:2], Y[:2], "linf", (0.1,), generator=Streams.of(torch.arange(2), 0))
    assert len(seen) == 2 * before


def test_the_points_around_a_threat() -> None:
    points = around(0.1, "linf")
    assert len(points) == POINTS
    assert points[0] == 0
    assert points[6] == pytest.approx(0.1)
    assert points[-1] == pytest.approx(0.2)
    assert around(0.8, "linf")[-1] == 1
    assert around(0.8, "l2")[-1] == pytest.approx(1.6)


@pytest.mark.parametrize(("epsilons", "steps"), [((0.1, 0.1), 20), ((0.2, 0.1), 20), ((0.1,), 0)])
def test_mistakes(epsilons: tuple[float, ...], steps: int) -> None:
    with pytest.raises(InputError, match="rising"):
        curve(bright, X, Y, "linf", epsilons, steps=steps)
