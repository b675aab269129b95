"""A minimal-norm attack within a threat model, and the search along the line to the image that ends such attacks."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fdml.attacks.objective import Model
from fdml.attacks.within import Nearest, within
from fdml.errors import InputError
from fdml.randomness import Generator
from fdml.threat import NORMS, Images, Threat

EPS = {"linf": 0.1, "l2": 0.8, "l1": 3.0}


def model(x: Tensor) -> Tensor:
    """Class 1 from a mean of 0.6 on."""
    rise = torch.expm1(3 * (x.flatten(1).mean(1) - 0.6))
    return torch.stack([-rise, rise], 1)


@pytest.mark.parametrize("norm", NORMS)
def test_found_within_eps_it_stays_and_found_beyond_it_is_projected(norm: str) -> None:
    threat, given = Threat(norm, EPS[norm]), {}

    def attack(
        model: Model, x: Images, y: Tensor, norm: str, *, enough: float, generator: Generator, **options: Any
    ) -> Images:
        given.update(norm=norm, enough=enough, generator=generator, **options)
        return (x + torch.linspace(0, 0.5, len(x))[:, None, None, None]).clamp(0, 1)

    x, y, generator = torch.rand(12, 1, 4, 4), torch.zeros(12, dtype=torch.int64), torch.Generator()
    x_adv = within(attack)(model, x, y, threat, generator=generator, steps=3)
    assert given == {"norm": norm, "enough": threat.eps, "generator": generator, "steps": 3}
    assert threat.contains(x_adv, x).all()
    found = attack(model, x, y, norm, enough=0.0, generator=None)
    inside = threat.contains(found, x)
    assert 0 < inside.sum() < 12
    assert torch.equal(x_adv[inside], found[inside])
    assert (threat.distance(x_adv, x)[~inside] > 0.5 * threat.eps).all()


def start(level: Tensor) -> Images:
    return level[:, None, None, None].expand(-1, 1, 4, 4)


@pytest.mark.parametrize(("far", "looks"), [(0.61, 4), (0.7, 6), (1.0, 8)])
def test_the_line_is_followed_to_the_boundary(far: float, looks: int) -> None:
    x, y = start(torch.tensor([0.1, 0.3, 0.55, 0.5999])), torch.zeros(4, dtype=torch.int64)
    nearest = Nearest(x, y, "linf", None)
    for x_adv in (x, torch.full_like(x, far)):
        nearest.see(nearest.remaining(), x_adv, nearest.threat.distance(x_adv, x), model(x_adv))
    x_adv = nearest.closer(model, looks)
    assert (model(x_adv).argmax(1) == 1).all()
    torch.testing.assert_close(x_adv, torch.full_like(x, 0.6), rtol=0, atol=5e-4)


def test_only_what_is_nearer_and_misclassified_is_kept() -> None:
    x, y = start(torch.tensor([0.5, 0.5, 0.5, 0.7])), torch.zeros(4, dtype=torch.int64)
    nearest = Nearest(x, y, "linf", 0.2)
    rows = nearest.remaining()

    def see(level: list[float]) -> list[list[bool]]:
        x_adv = start(torch.tensor(level))
        seen = nearest.see(rows, x_adv, nearest.threat.distance(x_adv, x), model(x_adv))
        return [flags.tolist() for flags in seen]

    # The last is misclassified without an attack.
    assert see([0.5, 0.5, 0.5, 0.7]) == [[False, False, False, True], [True, True, True, False]]
    assert see([0.8, 0.55, 0.69, 0.9]) == [[True, False, True, True], [True, True, False, False]]
    assert see([0.9, 0.59, 0.95, 0.8])[0] == [True, False, True, True]
    assert nearest.x_adv[:, 0, 0, 0].tolist() == pytest.approx([0.8, 0.5, 0.69, 0.7])
    assert nearest.distance.tolist() == pytest.approx([0.3, torch.inf, 0.19, 0])
    assert nearest.remaining().tolist() == [0, 1]
    # Drawn nearer is only what was not near enough.
    assert nearest.closer(model)[:, 0, 0, 0].tolist() == pytest.approx([0.6, 0.5, 0.69, 0.7], abs=1e-3)


@pytest.mark.parametrize(("norm", "enough"), [("l3", None), ("l2", -1.0), ("l2", float("nan"))])
def test_wrong_arguments_are_refused(norm: str, enough: float | None) -> None:
    with pytest.raises(InputError, match=norm if enough is None else str(enough)):
        Nearest(torch.rand(1, 1, 2, 2), torch.zeros(1, dtype=torch.int64), norm, enough)
