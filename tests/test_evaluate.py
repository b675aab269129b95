"""Accuracy under attack, on a model whose every answer is known: is the image brighter than one half?"""

import itertools
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from fdml.attacks import Attack, pgd
from fdml.evaluate import Accuracy, evaluate, interval, predictions
from fdml.randomness import Generator
from fdml.threat import Threat

THREAT = Threat("linf", 0.1)


def bright(x: Tensor) -> Tensor:
    """Class 1 for a mean above one half, class 0 below."""
    excess = x.mean((1, 2, 3)) - 0.5
    return torch.stack([-excess, excess], 1)


def pictures(*means: float) -> Tensor:
    return torch.tensor(means)[:, None, None, None].expand(-1, 1, 4, 4).clone()


def shift(by: float) -> Attack:
    def attack(model: Callable, x: Tensor, y: Tensor, threat: Threat, *, generator: Generator = None) -> Tensor:
        return threat.project(x + by, x)

    return attack


X = pictures(0.2, 0.45, 0.55, 0.8, 0.9, 0.3)
Y = torch.tensor([0, 0, 1, 1, 0, 0])  # the fifth is answered wrongly


def test_which_images_stand() -> None:
    found = evaluate(bright, X, Y, THREAT, {"lighter": shift(0.1), "darker": shift(-0.1), "none": shift(0)})
    assert list(found.standing) == ["clean", "lighter", "darker", "none"]
    assert {name: stands.tolist() for name, stands in found.standing.items()} == {
        "clean": [True, True, True, True, False, True],
        "lighter": [True, False, True, True, False, True],
        # Darker makes the fifth image no longer wrong, yet what was wrong before the attack has fallen.
        "darker": [True, True, False, True, False, True],
        "none": [True, True, True, True, False, True],
    }
    assert found.shares() == pytest.approx(
        {"clean": 5 / 6, "lighter": 4 / 6, "darker": 4 / 6, "none": 5 / 6, "worst": 3 / 6}
    )


def test_an_attack_cannot_make_a_wrong_answer_right() -> None:
    found = evaluate(bright, pictures(0.52), torch.tensor([0]), THREAT, {"darker": shift(-0.1)})
    assert found.shares() == {"clean": 0.0, "darker": 0.0, "worst": 0.0}


def test_worst_is_at_most_each() -> None:
    generator = torch.Generator().manual_seed(0)
    standing = {name: torch.rand(100, generator=generator) < 0.8 for name in ("clean", "a", "b")}
    shares = Accuracy(standing).shares()
    every = [all(bool(standing[name][i]) for name in standing) for i in range(100)]
    assert shares["worst"] == pytest.approx(sum(every) / 100)
    assert shares["worst"] < min(shares[name] for name in standing)


@pytest.mark.parametrize(("batch_size", "batches"), [(1, 5), (2, 3), (5, 1), (250, 1)])
def test_the_batch_size_changes_the_ticks_and_nothing_else(batch_size: int, batches: int) -> None:
    ticks: list[None] = []
    attacks = {"lighter": shift(0.1), "darker": shift(-0.1)}
    found = evaluate(bright, X, Y, THREAT, attacks, batch_size=batch_size, tick=lambda: ticks.append(None))
    assert len(ticks) == 2 * batches
    assert found.shares() == evaluate(bright, X, Y, THREAT, attacks).shares()


def test_only_images_answered_rightly_are_attacked_and_each_once() -> None:
    seen: list[float] = []

    def attack(model: Callable, x: Tensor, y: Tensor, threat: Threat, *, generator: Generator = None) -> Tensor:
        seen.extend(x[:, 0, 0, 0].tolist())
        return x

    evaluate(bright, X, Y, THREAT, {"spy": attack}, batch_size=2)
    assert seen == pytest.approx([0.2, 0.45, 0.55, 0.8, 0.3])


def test_adding_an_attack_changes_no_other() -> None:
    def noise(model: Callable, x: Tensor, y: Tensor, threat: Threat, *, generator: Generator = None) -> Tensor:
        return threat.random(x, generator)

    x, threat = torch.rand(200, 1, 2, 2, generator=torch.Generator().manual_seed(0)), Threat("linf", 0.5)
    y = bright(x).argmax(1)
    run = partial(evaluate, bright, x, y, threat)
    alone = run({"a": noise}, seed=1).standing["a"]
    assert 0 < alone.sum() < 200
    beside = run({"b": noise, "a": noise}, seed=1).standing["a"]
    assert torch.equal(alone, beside)
    assert not torch.equal(alone, run({"a": noise}, seed=2).standing["a"])


def test_an_attack_that_leaves_the_threat_model_is_caught() -> None:
    def outside(model: Callable, x: Tensor, y: Tensor, threat: Threat, *, generator: Generator = None) -> Tensor:
        return x + 2 * threat.eps

    with pytest.raises(AssertionError, match="cheat left the threat model"):
        evaluate(bright, X, Y, THREAT, {"cheat": outside})


def test_a_model_that_is_always_wrong_has_nothing_left_to_attack() -> None:
    found = evaluate(bright, X, 1 - bright(X).argmax(1), Threat("l2", 0.1), {"pgd": partial(pgd, steps=2)})
    assert found.shares() == {"clean": 0.0, "pgd": 0.0, "worst": 0.0}


def test_the_model_is_judged_in_eval_mode_and_left_as_it_was() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.9), nn.Flatten(), nn.Linear(16, 3))
    x = torch.rand(50, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.eval()(x).argmax(1)
    before = {name: value.clone() for name, value in model.train().state_dict().items()}
    assert torch.equal(predictions(model, x, batch_size=7), expected)
    assert evaluate(model, x, expected, THREAT, {"none": shift(0)}).shares()["worst"] == 1
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [
        # Solutions of |p - share| = 1.959964 sqrt(p (1 - p) / n).
        (50, 100, 0.4038315, 0.5961685),
        (0, 10, 0.0, 0.2775328),
        (10, 10, 0.7224672, 1.0),
        (8, 10, 0.4901625, 0.9433178),
        (1, 1000, 0.0001765, 0.0056426),
        (470, 1000, 0.4392399, 0.5009897),
    ],
)
def test_wilsons_interval(right: int, n: int, low: float, high: float) -> None:
    found = interval(right / n, n)
    assert found == pytest.approx((low, high), abs=2e-5)
    for p in found:
        if 0 < p < 1:
            assert abs(p - right / n) == pytest.approx(1.96 * (p * (1 - p) / n) ** 0.5)
    wider = interval(right / n, n, z=2.576)
    ordered = [wider[0], found[0], right / n, found[1], wider[1]]
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(ordered))
