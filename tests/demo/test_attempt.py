"""An attack under way: what is seen of it, and how it ends."""

from collections.abc import Callable

import pytest
import torch
from pairs import LAB, PLACE
from torch import Tensor

from fdml.demo.attempt import Attempt, streams
from fdml.errors import InputError
from fdml.losses import cross_entropy
from fdml.threat import Threat

MODEL = LAB.models["clean"]
X = LAB.samples[0][[PLACE]]
Y = LAB.samples[1][[PLACE]]
THREAT = Threat("linf", 0.2)


def begun(attack: Callable[..., Tensor], *, seconds: float = 60, pause: float = 0.0) -> Attempt:
    return Attempt(MODEL, X, Y, THREAT, attack, streams(0, "own"), seconds=seconds, pause=pause)


def ended(attempt: Attempt) -> Attempt:
    assert attempt.over.wait(60)
    return attempt


def brighter(looks: int) -> Callable[..., Tensor]:
    """An attack that brightens the picture, and shows it to the model so many times on its way to eps."""

    def attack(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, threat: Threat, **_: object) -> Tensor:
        x_adv = x
        for look in range(1, looks + 1):
            x_adv = (x + threat.eps * look / looks).clamp(max=1)
            model(x_adv)
        return x_adv

    return attack


def endless(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, threat: Threat, **_: object) -> Tensor:
    while True:
        model((x + 2 * threat.eps).clamp(max=1))


def test_every_look_is_counted_with_its_loss() -> None:
    attempt = ended(begun(brighter(5)))
    assert (attempt.looks, attempt.stopped, attempt.error) == (5, False, None)
    assert attempt.last is not None
    assert attempt.last.number == 5
    assert torch.equal(attempt.found, (X + 0.2).clamp(max=1))
    assert torch.equal(attempt.last.x, attempt.found)
    assert torch.equal(attempt.last.logits, MODEL(attempt.found))
    losses = [float(cross_entropy(MODEL((X + 0.2 * look / 5).clamp(max=1)), Y)) for look in range(1, 6)]
    assert attempt.trace == list(enumerate(losses, 1))


@pytest.mark.parametrize("looks", [40, 41, 127])
def test_the_trace_is_thinned_out_evenly(looks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fdml.demo.attempt.MAX_TRACE", 40)
    attempt = ended(begun(brighter(looks)))
    assert attempt.looks == looks
    numbers = [number for number, _ in attempt.trace]
    every = numbers[0]
    assert 20 <= len(numbers) <= 40
    assert numbers == list(range(every, looks + 1, every))


def test_pictures_far_outside_the_threat_are_not_shown() -> None:
    def attack(model: Callable[[Tensor], Tensor], x: Tensor, *_: object, **__: object) -> Tensor:
        model(1 - x)
        model(x)
        return x

    attempt = ended(begun(attack))
    assert attempt.looks == 1
    assert attempt.last is not None
    assert torch.equal(attempt.last.x, X)


def test_of_several_pictures_at_once_the_first_is_shown() -> None:
    def attack(model: Callable[[Tensor], Tensor], x: Tensor, *_: object, **__: object) -> Tensor:
        logits = model(torch.cat([x, 1 - x]))
        assert len(logits) == 2
        return x

    attempt = ended(begun(attack))
    assert attempt.error is None
    assert attempt.last is not None
    assert attempt.last.x.shape == X.shape


def test_a_stop_ends_it_inside_the_threat() -> None:
    attempt = begun(endless)
    while attempt.looks < 3:
        assert not attempt.over.wait(0.001)
    attempt.stop()
    ended(attempt)
    assert (attempt.stopped, attempt.error) == (True, None)
    assert THREAT.contains(attempt.found, X).all()
    assert not torch.equal(attempt.found, X)


def test_a_stop_ends_its_pauses() -> None:
    attempt = begun(endless, pause=3600.0)
    attempt.stop()
    assert ended(attempt).stopped


def test_it_ends_when_its_time_is_up() -> None:
    attempt = ended(begun(endless, seconds=-1))
    assert attempt.stopped
    assert attempt.last is None
    assert torch.equal(attempt.found, X)


def test_what_it_raises_is_kept() -> None:
    def attack(*_: object, **__: object) -> Tensor:
        raise InputError("not like this")

    attempt = ended(begun(attack))
    assert isinstance(attempt.error, InputError)
    assert not attempt.stopped
    assert torch.equal(attempt.found, X)


def test_an_attack_on_features_sees_what_the_model_has() -> None:
    def attack(model: Attempt, x: Tensor, *_: object, **__: object) -> Tensor:
        assert model.tap_names == MODEL.tap_names
        found, own = model.outputs(x), MODEL.outputs(x)
        assert torch.equal(found.logits, own.logits)
        assert all(torch.equal(found.taps[name], own.taps[name]) for name in model.tap_names)
        return x

    attempt = ended(begun(attack))
    assert attempt.error is None
    assert attempt.looks == 1
