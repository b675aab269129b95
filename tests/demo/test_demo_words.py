"""What the demo says in each state."""

from dataclasses import replace

import pytest
from pairs import DIGITS, faced, moment

from fdml.demo import words
from fdml.demo.choices import METHODS
from fdml.demo.lab import Proof

CLEAN, DEFENDED = DIGITS.sides
CLASSES = ("a cat", "a dog", *DIGITS.classes[2:])


@pytest.mark.parametrize(
    ("before", "after", "state", "kind", "said"),
    [
        (1, 1, "done", "wrong", "Clean model: wrong even before an attack. It says a dog, 90%."),
        (1, 0, "clean", "wrong", "Clean model: wrong even before an attack. It says a dog, 90%."),
        (0, 0, "clean", "clean", "Clean model: says a cat, 90%."),
        (0, 0, "done", "holds", "Clean model: holds. It still says a cat, 90%."),
        (0, 1, "done", "fooled", "Clean model: fooled. It now says a dog, 90%."),
        (0, 1, "running", "fooled", "Clean model: fooled. It now says a dog, 90%."),
    ],
)
def test_the_verdict_on_a_model(before: int, after: int, state: str, kind: str, said: str) -> None:
    assert words.verdict(faced(CLEAN, before, after), CLASSES, state) == (kind, said)


@pytest.mark.parametrize(
    ("clean", "defended", "said"),
    [
        ((0, 1), (0, 0), "The clean model is fooled, the defended one holds."),
        ((0, 0), (0, 1), "The defended model is fooled here, and the clean one is not"),
        ((0, 0), (0, 0), "Both models withstand this attack."),
        ((0, 1), (0, 2), "Both models are fooled"),
        ((1, 1), (0, 0), "A model is wrong without any attack."),
        ((0, 1), (1, 1), "A model is wrong without any attack."),
        ((1, 1), (1, 1), "A model is wrong without any attack."),
    ],
)
def test_the_headline_on_two_models(clean: tuple[int, int], defended: tuple[int, int], said: str) -> None:
    ended = moment(faced(CLEAN, *clean), faced(DEFENDED, *defended))
    assert words.headline(ended, CLASSES).startswith(said)
    stopped = words.headline(replace(ended, state="stopped"), CLASSES)
    assert stopped.startswith(f"Stopped. {said}")


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ((0, 1), "The attack succeeds."),
        ((0, 0), "The model withstands this attack."),
        ((1, 1), "The model is wrong without any attack: there is nothing to attack."),
    ],
)
def test_the_headline_on_one_model(answers: tuple[int, int], said: str) -> None:
    assert words.headline(moment(faced(DEFENDED, *answers)), CLASSES) == said


@pytest.mark.parametrize("method", METHODS)
def test_the_headline_while_an_attack_runs(method: str) -> None:
    running = moment(faced(CLEAN, 0, 0), state="running", looks=1234)
    said = words.headline(replace(running, asked=replace(running.asked, method=method)), CLASSES)
    assert said.startswith(METHODS[method].split(":")[0])
    assert said.endswith("picture 1,234 …")


def test_what_an_attack_took() -> None:
    assert words.cost(moment(looks=1)) == "The attack tried 1 picture in 0.25 s."
    assert words.cost(moment(looks=5000)) == "The attack tried 5,000 pictures in 0.25 s."


def test_what_is_not_certain_is_not_said_to_be() -> None:
    assert words.said("a\n very long name of a class", 0.9999) == "a very long name of…, >99%"


PROOF = Proof(1, 0.1239, 990, 1000, 20_000, 0.25, 0.001, 0)
NOTHING = replace(PROOF, answer=None, radius=0.0)
PROVED = (
    "Proved with 99.9% confidence: no change smaller than 0.123 (l2) makes the smoothed model say anything but a dog."
)


@pytest.mark.parametrize(
    ("proof", "said"),
    [
        (NOTHING, "Nothing is proved yet, after 1,000 of 20,000 noisy copies."),
        (replace(NOTHING, state="stopped"), "Nothing is proved yet, after 1,000 of 20,000 noisy copies."),
        (
            replace(NOTHING, state="done"),
            "Nothing is proved after 1,000 of 20,000 noisy copies: under this much noise no answer is frequent enough."
            " Try less noise, or another picture.",
        ),
        (PROOF, f"{PROVED} So far 1,000 of 20,000 noisy copies."),
        (replace(PROOF, state="attacking"), f"{PROVED} Now an attack looks for where it breaks …"),
        (replace(PROOF, state="attacking", tried=(0.2,)), f"{PROVED} Now an attack looks for where it breaks …"),
        (
            replace(PROOF, state="done", tried=(0.2, 0.25)),
            f"{PROVED} No attack that was tried up to 0.250 changes its answer.",
        ),
        (
            replace(PROOF, state="done", tried=(0.2, 0.25), broken=0.3),
            f"{PROVED} An attack changes its answer at 0.300: the truth lies between.",
        ),
        (
            replace(PROOF, state="stopped"),
            f"{PROVED} It was stopped before an attack looked for where that breaks.",
        ),
        (
            replace(PROOF, state="stopped", tried=(0.2,)),
            f"{PROVED} No attack that was tried up to 0.200 changes its answer.",
        ),
    ],
)
def test_what_a_certificate_says_so_far(proof: Proof, said: str) -> None:
    assert words.proved(proof, CLASSES) == said
