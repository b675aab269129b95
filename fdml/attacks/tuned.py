"""An attack by its name, with the budget and the target that a user chose."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from fdml.attacks import ATTACKS
from fdml.attacks.objective import Model
from fdml.errors import InputError, unknown
from fdml.losses import Labels
from fdml.randomness import Generator
from fdml.threat import Images, Threat

MOST = 1_000_000
"""The largest budget that is taken."""

_OPTIONS = {name: inspect.signature(getattr(attack, "minimal", attack)).parameters for name, attack in ATTACKS.items()}

BUDGETS: dict[str, str] = {
    name: option for name, options in _OPTIONS.items() for option in ("steps", "budget", "draws") if option in options
}
"""name -> the option that says how much an attack may do; one that is not here does always the same."""

AIMED = tuple(name for name, options in _OPTIONS.items() if "target" in options)
"""The attacks that can be aimed at a class."""


def tuned(name: str, *, steps: int | None = None, target: int | None = None) -> Callable[..., Images]:
    """The attack of that name, with ``steps`` for its steps, queries or draws, and aimed at the class ``target``.

    What is None stays as the name has it. ``steps`` is from 1 to 1,000,000; ``target`` is a class index. More keywords
    (``guides``, ``queries``, …) may be given when it is called.

    Raises ``InputError`` for an unknown name, steps outside their range or where there is nothing to choose, and a
    target where the attack takes none or below 0.
    """
    if name not in ATTACKS:
        raise unknown("attack", name, ATTACKS)
    attack = ATTACKS[name]
    if steps is not None:
        if name not in BUDGETS:
            raise InputError(f"attack {name!r} takes no steps: it always does the same")
        if not 1 <= steps <= MOST:
            raise InputError(f"steps must be from 1 to {MOST:,}, got {steps}")
        attack = partial(attack, **{BUDGETS[name]: steps})
    if target is None:
        return attack
    if name not in AIMED:
        raise InputError(f"attack {name!r} cannot be aimed at a target: take {', '.join(AIMED)}")
    if target < 0:
        raise InputError(f"target must be a class index of at least 0, got {target}")

    def aimed(
        model: Model, x: Images, y: Labels, threat: Threat, *, generator: Generator = None, **options: Any
    ) -> Images:
        return attack(model, x, y, threat, target=torch.full_like(y, target), generator=generator, **options)

    return aimed
