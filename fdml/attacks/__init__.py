"""Attacks: functions over any callable from images in [0, 1] to logits, and the dicts of their names."""

from collections.abc import Callable
from functools import partial
from typing import Protocol

from fdml.attacks.alma import alma
from fdml.attacks.apgd import apgd, apgd_targeted
from fdml.attacks.controls import noise, spatial
from fdml.attacks.cw import cw
from fdml.attacks.decision import hopskipjump
from fdml.attacks.deepfool import deepfool
from fdml.attacks.estimate import nes, spsa
from fdml.attacks.fab import fab
from fdml.attacks.feature import feature, metric
from fdml.attacks.fmn import fmn
from fdml.attacks.gradient import fgsm, n_fgsm, pgd
from fdml.attacks.objective import OBJECTIVES
from fdml.attacks.objective import Model as Model
from fdml.attacks.square import square
from fdml.attacks.transfer import di_ti, mi_fgsm
from fdml.attacks.within import within
from fdml.losses import Labels
from fdml.randomness import Generator
from fdml.threat import Images, Threat

__all__ = [
    "ATTACKS", "CLOSING", "FEATURES", "OBJECTIVES", "QUERIES", "Attack", "alma", "apgd", "apgd_targeted", "cw",
    "deepfool", "di_ti", "fab", "feature", "fgsm", "fmn", "hopskipjump", "metric", "mi_fgsm", "n_fgsm", "nes", "noise",
    "pgd", "spatial", "spsa", "square", "within",
]  # fmt: skip


class Attack(Protocol):
    """``attack(model, x, y, threat, generator=…) -> x_adv``, inside the threat model."""

    def __call__(
        self, model: Model, x: Images, y: Labels, threat: Threat, *, generator: Generator = None
    ) -> Images: ...


def _spatial(model: Model, x: Images, y: Labels, threat: Threat, *, generator: Generator = None) -> Images:
    # In the shape of an attack: it draws nothing, and leaves every threat model by design.
    return spatial(model, x, y)


CLOSING: dict[str, Attack] = {
    "fgsm": fgsm,
    "pgd20": partial(pgd, steps=20),
    "pgd50x3": partial(pgd, steps=50, restarts=3),
    "apgd50-ce": partial(apgd, steps=50, objective="ce"),
    "apgd50-dlr": partial(apgd, steps=50, objective="dlr"),
}
"""The attacks of the closing table of a training run, weakest first."""

ATTACKS: dict[str, Callable[..., Images]] = {
    **CLOSING,
    "r-fgsm": partial(fgsm, random_start=True),
    # Goes on once an image is fooled, for the largest margin.
    "pgd-best": partial(pgd, steps=20, keep="best"),
    "pgd100x5": partial(pgd, steps=100, restarts=5),
    "cw": partial(pgd, steps=50, objective="margin"),
    "cw-l2": within(cw),
    "deepfool": within(deepfool),
    "apgd-ce": partial(apgd, steps=100, objective="ce"),
    "apgd-dlr": partial(apgd, steps=100, objective="dlr"),
    "apgd-t": partial(apgd_targeted, steps=100, targets=9),
    "apgd-t3": partial(apgd_targeted, steps=100, targets=3),
    # In l1 the published cascade has these two in their place (Croce and Hein 2021).
    "apgd-ce-x5": partial(apgd, steps=100, restarts=5),
    "apgd-t5": partial(apgd_targeted, steps=100, targets=5),
    "fab-t": within(partial(fab, steps=100, targets=9, search=0)),
    # The published code counts neither the look at the clean image nor the start.
    "square": partial(square, budget=5002),
    "square1000": partial(square, budget=1000),
    "nes": partial(nes, budget=5000),
    "spsa": partial(spsa, budget=5000),
    "hopskipjump": within(partial(hopskipjump, budget=5000)),
    "mi-fgsm": partial(mi_fgsm, steps=20),
    "di-ti": partial(di_ti, steps=20),
    "pgd50-transfer": partial(pgd, steps=50, keep="best"),
    "feature-all": feature,
    "feature+ce": partial(feature, mix="ce"),
    "feature+dlr": partial(feature, mix="dlr"),
    "metric": metric,
    "metric+ce": partial(metric, mix="ce"),
    "metric+dlr": partial(metric, mix="dlr"),
    "noise": noise,
    "spatial": _spatial,
}
"""Every attack that an evaluation can run, by name, at the budget that the name stands for."""

QUERIES = ("square", "square1000", "nes", "spsa", "hopskipjump")
"""Those that ask for answers alone; they take ``queries``, a count an image."""

FEATURES = ("feature-all", "feature+ce", "feature+dlr", "metric", "metric+ce", "metric+dlr")
"""Those that look into the model: it must have ``outputs``, and they take ``guides`` and ``guide_y``."""
