"""Attacks by name with a budget and a target of the user's own."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fdml.attacks import ATTACKS, FEATURES
from fdml.attacks.tuned import AIMED, BUDGETS, tuned
from fdml.errors import InputError
from fdml.randomness import Streams
from fdml.threat import Threat

THREAT = Threat("linf", 0.1)
LABEL = torch.zeros(1, dtype=torch.int64)


class Seen(NamedTuple):
    logits: Tensor
    taps: dict[str, Tensor]


class Firm:
    """A model that no image inside the threat model fools, and that counts the images that it is shown."""

    def __init__(self) -> None:
        self.weight, self.shown = 1e-3 * torch.randn(64, 4, generator=torch.Generator().manual_seed(0)), 0

    def outputs(self, x: Tensor) -> Seen:
        self.shown += len(x)
        tap = torch.tanh(x.flatten(1))
        return Seen(tap @ self.weight + torch.tensor([5.0, 0, 0, 0]), {"tap": tap})

    def __call__(self, x: Tensor) -> Tensor:
        return self.outputs(x).logits


def shown(attack: Callable[..., Tensor], name: str) -> int:
    model = Firm()
    threat = Threat("l2", 0.5) if name == "cw-l2" else THREAT
    if name in FEATURES:
        attack = partial(attack, guides=torch.full((4, 1, 8, 8), 0.5), guide_y=torch.arange(4))
    attack(model, torch.full((1, 1, 8, 8), 0.4), LABEL, threat, generator=Streams.of(torch.arange(1), 0))
    return model.shown


@pytest.mark.parametrize("name", BUDGETS)
def test_the_budget_is_the_one_chosen(name: str) -> None:
    little, more = (shown(tuned(name, steps=steps), name) for steps in (30, 60))
    assert little < more
    if BUDGETS[name] == "budget":
        assert more <= 60


@pytest.mark.parametrize(("name", "looks"), [("pgd20", 8), ("pgd50x3", 24), ("apgd-ce", 8), ("noise", 8)])
def test_looks_of_seven_steps(name: str, looks: int) -> None:
    assert shown(tuned(name, steps=7), name) == looks


def test_every_attack_has_a_budget_but_these() -> None:
    assert set(ATTACKS) - set(BUDGETS) == {"fgsm", "r-fgsm", "spatial"}


@pytest.mark.parametrize("name", ATTACKS)
def test_with_nothing_chosen_it_is_the_attack_of_the_name(name: str) -> None:
    assert tuned(name) is ATTACKS[name]


def quarters(x: Tensor) -> Tensor:
    """Linear: the logit of a class is the sum of its quarter of the image."""
    return x.flatten(1).unflatten(1, (4, -1)).sum(2)


@pytest.mark.parametrize("name", AIMED)
@pytest.mark.parametrize("target", [1, 2, 3])
def test_the_target_is_answered(name: str, target: int) -> None:
    x = torch.full((5, 1, 8, 8), 0.5) + 0.02 * torch.rand(5, 1, 8, 8)
    x[:, :, :2] += 0.05
    y = quarters(x).argmax(1)
    assert (y == 0).all()
    for steps in (None, 10):
        attack = tuned(name, steps=steps, target=target)
        x_adv = attack(quarters, x, y, THREAT, generator=Streams.of(torch.arange(5), 0))
        assert (quarters(x_adv).argmax(1) == target).all()
        assert THREAT.contains(x_adv, x).all()


def test_a_target_out_of_reach_is_come_near_to_as_far_as_can_be() -> None:
    def far(x: Tensor) -> Tensor:
        return quarters(x) + torch.tensor([20.0, 0, 0, 0])

    x = torch.full((1, 1, 8, 8), 0.5)
    x_adv = tuned("pgd20", steps=10, target=2)(far, x, LABEL, THREAT, generator=Streams.of(torch.arange(1), 0))
    # What is best against class 0 is best for no other quarter but the target's, which grows as much as it may.
    torch.testing.assert_close(x_adv.flatten().unflatten(0, (4, -1))[2], torch.full((16,), 0.6))
    torch.testing.assert_close(x_adv.flatten().unflatten(0, (4, -1))[0], torch.full((16,), 0.4))


def test_other_options_go_through() -> None:
    queries = torch.zeros(1, dtype=torch.int64)
    attack = tuned("square", steps=25)
    attack(Firm(), torch.full((1, 1, 8, 8), 0.4), LABEL, THREAT, queries=queries)
    assert 1 < int(queries) <= 25
    attack = tuned("pgd20", steps=3, target=1)
    x = torch.full((1, 1, 8, 8), 0.4)
    assert torch.equal(attack(Firm(), x, LABEL, THREAT, random_start=False, step_size=0.0), x)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("pgd2", {}, "attack 'pgd2'.*'pgd20'"),
        ("autoattack", {"steps": 5}, "unknown attack"),
        ("fgsm", {"steps": 5}, "'fgsm' takes no steps"),
        ("spatial", {"steps": 5}, "'spatial' takes no steps"),
        ("pgd20", {"steps": 0}, "from 1 to 1,000,000, got 0"),
        ("square", {"steps": 1_000_001}, "got 1000001"),
        ("apgd-ce", {"target": 1}, "'apgd-ce'.*target.*pgd20, pgd50x3"),
        ("pgd20", {"target": -1}, "at least 0, got -1"),
    ],
)
def test_mistakes(name: str, options: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tuned(name, **options)
