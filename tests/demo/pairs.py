"""The shipped pairs, and attacks on their pictures."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fdml
from fdml.card import Card
from fdml.demo.exhibit import Exhibit, Side, shipped
from fdml.demo.lab import Asked, Faced, Lab, Moment, Seen
from fdml.threat import Threat

CLOTHES, DIGITS = shipped()
LABS = {exhibit.name: Lab(exhibit) for exhibit in (CLOTHES, DIGITS)}
LAB = LABS["digits"]
PLACE = 4
"""A digit that both models answer rightly."""


def ask(method: str = "pgd-best", lab: Lab = LAB, place: int = PLACE, **rest: Any) -> Asked:
    """An attack inside the exhibit's own threat."""
    exhibit = lab.exhibit
    image = torch.from_numpy(exhibit.images[place])
    return Asked(**{"method": method, "norm": exhibit.norm, "eps": exhibit.eps, "image": image, **rest})


def attacked(method: str = "pgd-best", lab: Lab = LAB, place: int = PLACE, **rest: Any) -> Moment:
    """How such an attack ends."""
    (moment,) = lab.attack(ask(method, lab, place, **rest))
    return moment


def answers(moment: Moment) -> dict[str, int]:
    return {faced.side.key: faced.attacked.answer for faced in moment.faced}


def fits_a_file(faced: Faced, threat: Threat) -> bool:
    """Whether the attacked picture is inside the threat, and of whole grey levels."""
    x, x_adv = faced.clean.x[None], faced.attacked.x[None]
    levels = x_adv * 255
    return bool(threat.contains(x_adv, x)) and bool((levels - levels.round()).abs().max() < 1e-3)


def faced(side: Side, before: int, after: int, label: int = 0, sure: float = 0.9) -> Faced:
    """A model that answers ``before`` and ``after`` an attack."""

    def seen(answer: int) -> Seen:
        probabilities = torch.full((len(side.card.classes),), (1 - sure) / (len(side.card.classes) - 1))
        probabilities[answer] = sure
        return Seen(torch.full(side.card.input, 0.5), probabilities)

    return Faced(side, seen(before), seen(after), label)


def moment(*met: Faced, state: str = "done", looks: int = 7) -> Moment:
    return Moment(ask(), met, state, looks, 0.25)


def named(file: Path, out: Path, **fields: Any) -> Path:
    """The model of ``file`` under a card with other ``fields``."""
    fdml.save(fdml.load(file), replace(fdml.read_card(file), **fields), out)
    return out


def called(exhibit: Exhibit, *classes: str) -> Exhibit:
    """The exhibit with other names for its first classes."""

    def of(card: Card) -> Card:
        return replace(card, classes=(*classes, *card.classes[len(classes) :]))

    return replace(exhibit, sides=tuple(replace(side, card=of(side.card)) for side in exhibit.sides))


def few(exhibit: Exhibit, every: int = 10) -> Exhibit:
    """The exhibit with some of its pictures."""
    return replace(exhibit, images=exhibit.images[::every], labels=np.ascontiguousarray(exhibit.labels[::every]))
