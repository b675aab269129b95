"""Attacks: functions over any callable from images in [0, 1] to logits, and the dict of their names."""

from functools import partial
from typing import Protocol

from fdml.attacks.apgd import apgd, apgd_targeted
from fdml.attacks.gradient import fgsm, n_fgsm, pgd
from fdml.attacks.objective import OBJECTIVES
from fdml.attacks.objective import Model as Model
from fdml.losses import Labels
from fdml.randomness import Generator
from fdml.threat import Images, Threat

__all__ = ["ATTACKS", "OBJECTIVES", "Attack", "apgd", "apgd_targeted", "fgsm", "n_fgsm", "pgd"]


class Attack(Protocol):
    """``attack(model, x, y, threat, generator=…) -> x_adv``, inside the threat model."""

    def __call__(
        self, model: Model, x: Images, y: Labels, threat: Threat, *, generator: Generator = None
    ) -> Images: ...


ATTACKS: dict[str, Attack] = {
    "fgsm": fgsm,
    "pgd20": partial(pgd, steps=20),
    "pgd50x3": partial(pgd, steps=50, restarts=3),
    "apgd50-ce": partial(apgd, steps=50, objective="ce"),
    "apgd50-dlr": partial(apgd, steps=50, objective="dlr"),
}
"""The attacks of the closing table, weakest first."""
