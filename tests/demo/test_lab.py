"""What the demo computes: attacks, what they do to features, curves and certificates, on the shipped pairs."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pairs import CLOTHES, DIGITS, LAB, LABS, PLACE, answers, ask, attacked, few, fits_a_file

from fdml import data
from fdml.attacks import pgd
from fdml.attacks.tuned import AIMED
from fdml.certify.smoothing import ALPHA
from fdml.demo import visit
from fdml.demo.choices import MAX_SAMPLES, MAX_STEPS, METHODS, NORMS
from fdml.demo.lab import RADII, Lab, Proof
from fdml.errors import InputError
from fdml.randomness import Streams
from fdml.sequence import mixture_lower, radius_of
from fdml.threat import Threat

IMAGE = DIGITS.images[PLACE]
LABEL = int(DIGITS.labels[PLACE])
ALONE = Lab(replace(DIGITS, sides=DIGITS.sides[1:]))
BARE = Lab(replace(DIGITS, images=DIGITS.images[:0], labels=DIGITS.labels[:0]))

STRONG = [
    pytest.param("clean", 0.0, 0.05, id="clean"),
    pytest.param("defended", 0.7, 1.0, id="defended", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("key", "least", "most"), STRONG)
def test_the_shipped_digits_hold_what_they_are_shown_for(key: str, least: float, most: float) -> None:
    test = data.load("digits").test
    index, x, y = test.head(len(test)).all()
    threat = Threat(DIGITS.norm, DIGITS.eps)
    x_adv = pgd(LAB.models[key], x, y, threat, steps=50, restarts=3, generator=Streams.of(index, 0, "pgd50x3"))
    assert least <= float((LAB.models[key](x_adv).argmax(1) == y).float().mean()) <= most


def test_of_what_is_seen_first_the_clean_model_is_fooled_and_the_defended_one_holds() -> None:
    now = visit.first(CLOTHES)
    assert now.place is not None
    clean, defended = attacked("pgd-best", LABS["fashion-mnist"], now.place).faced
    assert clean.clean.answer == defended.clean.answer == defended.attacked.answer == now.label
    assert clean.attacked.answer != now.label


# Attacks


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("method", METHODS)
def test_every_attack_ends_inside_the_threat_in_whole_grey_levels(method: str, norm: str) -> None:
    asked = ask(method, norm=norm, eps=LAB.usual_eps(norm), steps=8)
    (moment,) = LAB.attack(asked)
    assert moment.state == "done"
    assert moment.looks >= 1
    for faced in moment.faced:
        assert fits_a_file(faced, asked.threat)
        assert faced.label == faced.clean.answer == LABEL
        assert faced.trace[-1][0] <= moment.looks
        assert all(loss >= 0 for _, loss in faced.trace)


def test_an_attack_that_is_watched_is_seen_on_its_way() -> None:
    moments = list(LAB.attack(ask(steps=40), paced=True))
    assert [moment.state for moment in moments] == ["running"] * (len(moments) - 1) + ["done"]
    assert len(moments) > 1
    looks = [moment.looks for moment in moments]
    assert looks == sorted(looks)
    assert looks[0] < looks[-1]
    for moment in moments:
        for faced in moment.faced:
            assert bool(((faced.attacked.x >= 0) & (faced.attacked.x <= 1)).all())
    last = attacked(steps=40)
    for watched, alone in zip(moments[-1].faced, last.faced, strict=True):
        assert torch.equal(watched.attacked.x, alone.attacked.x), "watching changes nothing"
        assert watched.trace == alone.trace


def test_a_stop_ends_an_attack_inside_the_threat() -> None:
    stop = threading.Event()
    asked = ask(steps=MAX_STEPS)
    moments = LAB.attack(asked, stop=stop, paced=True)
    assert next(moments).state == "running"
    stop.set()
    *_, moment = moments
    assert moment.state == "stopped"
    assert 0 < moment.looks < MAX_STEPS
    assert all(fits_a_file(faced, asked.threat) for faced in moment.faced)


def test_an_attack_that_nobody_watches_any_more_ends() -> None:
    before = set(threading.enumerate())
    moments = LAB.attack(ask(steps=MAX_STEPS), paced=True)
    assert next(moments).state == "running"
    begun = {thread for thread in threading.enumerate() if thread.name == "fdml-attack"} - before
    moments.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert len(begun) == 2
    for thread in begun:
        thread.join(60)
        assert not thread.is_alive()


@pytest.mark.parametrize("method", [name for name in METHODS if name not in AIMED])
def test_an_attack_that_cannot_be_aimed_says_which_can(method: str) -> None:
    with pytest.raises(InputError, match=rf"'{method.replace('+', '.')}' cannot be aimed at a target: take .*pgd-best"):
        attacked(method, target=(LABEL + 1) % 10)


@pytest.mark.parametrize("method", [name for name in METHODS if name in AIMED])
def test_an_aimed_attack_ends_in_its_target(method: str) -> None:
    for target in (1, 2):
        found = answers(attacked(method, target=target, eps=0.5, steps=40))
        assert found == {"clean": target, "defended": target}


def test_what_is_the_target_already_is_refused() -> None:
    with pytest.raises(InputError, match="the target is what the model already answers: choose another class"):
        attacked(target=LABEL)


def test_there_must_be_a_model_to_attack_and_pictures_to_steer_by() -> None:
    with pytest.raises(InputError, match="no clean model here to attack"):
        attacked(lab=ALONE, whom="clean")
    with pytest.raises(InputError, match="needs pictures of other classes, and this exhibit has none"):
        list(BARE.attack(ask("feature+ce")))
    assert list(answers(attacked(lab=ALONE))) == ["defended"]


def test_a_picture_that_a_model_gets_wrong_by_itself_is_left_alone() -> None:
    moment = attacked(label=(LABEL + 1) % 10)
    assert (moment.state, moment.looks) == ("done", 0)
    for faced in moment.faced:
        assert torch.equal(faced.attacked.x, faced.clean.x)
        assert faced.trace == ()


@pytest.mark.parametrize("whom", ["clean", "defended"])
def test_the_picture_made_against_one_model_is_shown_to_both(whom: str) -> None:
    moment = attacked(whom=whom)
    first, second = moment.faced
    assert torch.equal(first.attacked.x, second.attacked.x)
    assert [bool(faced.trace) for faced in moment.faced] == [faced.side.key == whom for faced in moment.faced]
    each = next(faced for faced in attacked().faced if faced.side.key == whom)
    assert torch.equal(first.attacked.x, each.attacked.x), "it is the attack on that model, and no other"


def test_no_attack_leaves_anything_in_the_models() -> None:
    models = LAB.models.values()
    modes = [module.training for model in models for module in model.modules()]
    before = [{name: value.clone() for name, value in model.state_dict().items()} for model in models]
    for method in METHODS:
        attacked(method, steps=3)
    assert modes == [module.training for model in models for module in model.modules()]
    for model, kept in zip(models, before, strict=True):
        assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())
        assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())


def test_several_visitors_at_once_find_what_one_finds_alone() -> None:
    asked = [
        ask(method, place=place, steps=12, seed=place) for place in (4, 14) for method in ("pgd-best", "square1000")
    ]
    asked.append(ask("feature+ce", steps=5))
    alone = [list(LAB.attack(each))[-1] for each in asked]
    with ThreadPoolExecutor(4) as visitors:
        together = list(visitors.map(lambda each: list(LAB.attack(each))[-1], asked))
    for one, other in zip(alone, together, strict=True):
        assert one.looks == other.looks
        for mine, theirs in zip(one.faced, other.faced, strict=True):
            assert torch.equal(mine.attacked.x, theirs.attacked.x)
            assert torch.equal(mine.attacked.probabilities, theirs.attacked.probabilities)
            assert mine.trace == theirs.trace


def test_another_seed_is_another_attack() -> None:
    first, again, other = (attacked("noise", steps=5, seed=seed).faced[0].attacked.x for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_classes_are_asked_for_by_their_names() -> None:
    lab = LABS["fashion-mnist"]
    asked = lab.asked(CLOTHES.images[0], label="Ankle boot", target="Bag", method="cw", norm="l2", eps=1, seed=7)
    assert (asked.label, asked.target, asked.threat, asked.seed) == (9, 8, Threat("l2", 1), 7)
    with pytest.raises(InputError, match="unknown class 'Boot'"):
        lab.asked(CLOTHES.images[0], label=None, target="Boot", method="cw", norm="l2", eps=1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"method": "pgd"}, "unknown attack 'pgd': one of fgsm, pgd-best"),
        ({"method": "spatial"}, "unknown attack 'spatial'"),
        ({"whom": "both"}, "whom to attack is 'both': one of each, clean, defended"),
        ({"steps": 0}, "0 steps are out of range: 1 to 2000"),
        ({"steps": MAX_STEPS + 1}, "2001 steps"),
        ({"eps": -1.0}, "eps must be a finite number of at least 0, got -1"),
        ({"eps": 2.0}, "eps 2 is larger than the whole pixel range"),
        ({"eps": float("nan")}, "eps must be a finite number"),
        ({"norm": "l3"}, "unknown norm 'l3'"),
        ({"label": 3, "target": 3}, "the target is the class that the picture already shows"),
        ({"seed": -1}, "seed -1 is out of range: 0 to 2147483647"),
        ({"seed": 1 << 31}, "seed 2147483648"),
    ],
)
def test_what_cannot_be_asked(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ask(**wrong)


def test_what_the_models_see_before_any_attack() -> None:
    for faced in LAB.unattacked(IMAGE, None):
        assert faced.label == faced.clean.answer == LABEL
        assert faced.attacked is faced.clean
        assert float(faced.clean.probabilities.sum()) == pytest.approx(1)
        assert faced.clean.confidence == float(faced.clean.probabilities[LABEL])
    assert [faced.label for faced in LAB.unattacked(IMAGE, 3)] == [3, 3]
    assert LAB.usual_eps("linf") == DIGITS.eps
    with pytest.raises(InputError, match="unknown norm"):
        LAB.usual_eps("l0")


# Distances


@pytest.mark.parametrize(("name", "place"), [("fashion-mnist", 0), ("digits", 4)])
def test_the_defence_keeps_an_attacked_picture_nearer_to_itself(name: str, place: int) -> None:
    lab = LABS[name]
    moment = attacked("pgd-best", lab, place)
    clean, defended = (lab.distances(moment, key) for key in ("clean", "defended"))
    assert [each.tap for each in clean] == [each.tap for each in defended] == list(lab.models["clean"].tap_names)
    for each in (*clean, *defended):
        assert each.before_self == 0
        assert all(0 <= value <= 2 for value in (each.before_other, each.after_self, each.after_other))
    assert all(after.after_self < before.after_self for before, after in zip(clean, defended, strict=True))
    assert clean[-1].other == moment.faced[0].attacked.answer, "the class that it is mistaken for"
    assert clean[-1].after_other < clean[-1].after_self, "the attack succeeds"
    assert defended[-1].after_self < defended[-1].after_other, "it fails"


def test_what_did_not_change_is_at_no_distance_from_itself() -> None:
    for place in range(10):
        moment = attacked("fgsm", place=place, eps=0.0)
        for key in LAB.models:
            for each in LAB.distances(moment, key):
                assert each.after_self == 0
                assert each.after_other == each.before_other > 0


def test_without_pictures_there_is_nothing_to_compare_with() -> None:
    (moment,) = BARE.attack(ask())
    assert BARE.distances(moment, "clean") == []


# Curves


def test_curves_fall_and_are_kept_for_the_next_visitor() -> None:
    lab = Lab(few(DIGITS, 34))
    first, whole = lab.curves("linf")
    assert list(first) == ["clean"]
    assert list(whole) == ["clean", "defended"]
    for points in whole.values():
        shares = [share for _, share in points]
        assert shares == sorted(shares, reverse=True)
        assert [eps for eps, _ in points][::6] == pytest.approx([0, 0.2, 0.4])
        assert all(0 <= share <= 1 for share in shares)
    clean, defended = (points[6][1] for points in whole.values())
    assert clean < defended
    *_, again = lab.curves("linf")
    assert again == whole
    assert all(again[key] is whole[key] for key in whole), "nothing is measured twice"


def test_a_stop_ends_curves_between_models() -> None:
    stop = threading.Event()
    found = []
    for measured in Lab(few(DIGITS, 50)).curves("l2", stop):
        found.append(measured)
        stop.set()
    assert [list(measured) for measured in found] == [["clean"]]


def test_curves_need_pictures_and_a_norm() -> None:
    with pytest.raises(InputError, match="no pictures to measure on: name a data set with --data"):
        next(BARE.curves("linf"))
    with pytest.raises(InputError, match="unknown norm 'l0'"):
        next(LAB.curves("l0"))


# Certificates


SAMPLES = 1000
FIRM = DIGITS.images[0]
"""A zero, which much noise leaves one."""


def certified(key: str = "defended", **options: Any) -> list[Proof]:
    settings: dict[str, Any] = {"sigma": 0.25, "samples": SAMPLES, "seed": 1, "every": 0.0}
    return list(LAB.certify(FIRM, key, **(settings | options)))


@pytest.fixture(scope="module")
def proofs() -> list[Proof]:
    return certified()


def test_the_same_seed_gives_the_same_certificate(proofs: list[Proof]) -> None:
    assert certified(every=3600.0)[-1] == proofs[-1]
    other = next(LAB.certify(FIRM, "defended", sigma=0.25, samples=SAMPLES, seed=2, every=0.0))
    assert (other.count, other.seed) == (proofs[0].count, 2)
    assert other.hits != proofs[0].hits


def test_every_certificate_on_the_way_holds(proofs: list[Proof]) -> None:
    counts = [proof.count for proof in proofs if proof.state == "sampling"]
    assert counts == sorted(set(counts))
    assert proofs[-1].count == proofs[-1].samples == SAMPLES
    for proof in proofs:
        assert proof.hits <= proof.count
        assert proof.radius == radius_of(mixture_lower(proof.hits, proof.count, ALPHA), 0.25)
        assert proof.answer == (0 if proof.radius > 0 else None)


def test_an_attack_looks_for_where_it_breaks(proofs: list[Proof]) -> None:
    states = [proof.state for proof in proofs]
    assert states == sorted(states, key=["sampling", "attacking", "done"].index)
    last = proofs[-1]
    assert (last.answer, last.state) == (0, "done")
    assert last.radius > 0
    assert last.broken is None or last.broken > last.radius
    looked = [*last.tried, *([last.broken] if last.broken is not None else [])]
    assert looked == pytest.approx([times * last.radius for times in RADII[1 : len(looked) + 1]])
    assert [len(proof.tried) for proof in proofs if proof.state == "attacking"] == list(range(len(last.tried) + 1))


def test_where_the_answer_changes_with_the_noise_nothing_is_proved() -> None:
    last = certified(sigma=4.0)[-1]
    assert (last.answer, last.radius, last.tried, last.broken, last.state) == (None, 0.0, (), None, "done")


def test_a_stop_ends_a_certificate_that_still_holds() -> None:
    for until in ("sampling", "attacking"):
        stop = threading.Event()
        proofs = LAB.certify(FIRM, "defended", sigma=0.1, samples=4000, seed=1, stop=stop, every=0.0)
        for proof in proofs:
            if proof.state == until:
                stop.set()
                break
        *_, last = proofs
        assert last.state == "stopped"
        assert last.broken is None
        assert (last.count < 4000) == (until == "sampling")
        assert last.radius == radius_of(mixture_lower(last.hits, last.count, ALPHA), 0.1)


def test_without_a_seed_the_noise_is_new() -> None:
    first, second = (certified(seed=None, sigma=4.0, samples=100)[-1].seed for _ in range(2))
    assert first != second


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sigma": 0.0}, "noise of 0 is out of range: above 0 and at most 4"),
        ({"sigma": 4.1}, "noise of 4.1"),
        ({"sigma": float("nan")}, "noise of nan"),
        ({"samples": 99}, "99 samples are out of range: 100 to 100,000"),
        ({"samples": MAX_SAMPLES + 1}, "100001 samples"),
        ({"alpha": 0.0}, "chance of an error of 0 is out of range"),
        ({"alpha": 0.5}, "chance of an error of 0.5"),
        ({"key": "teacher"}, "no model 'teacher' here"),
    ],
)
def test_what_cannot_be_certified(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        certified(**wrong)


def test_a_picture_is_of_the_exhibit() -> None:
    x, y = LAB.samples
    assert np.array_equal((x * 255).round().byte().numpy(), DIGITS.images)
    assert y.tolist() == DIGITS.labels.tolist()
