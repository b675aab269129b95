"""Recipe: everything that decides what a training run computes, flat and frozen."""

import dataclasses
import sys
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

from fdml.errors import InputError, unknown

CUTMIX = "cutmix"
"""The one augmentation that mixes labels too."""

BY_KL = ("trades", "hat", "rslad", "lbgat")
"""The bases whose inner attack ascends a KL divergence: from the student's answer to x or, rslad, the teacher's."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run. Sizes are in images and steps, eps in pixel units, shares in [0, 1]; 0 switches a term off.

    Raises ``InputError`` for a value out of its range. ``override`` changes a field by its name.
    """

    name: str
    seed: int = 0

    # The threat model, which fdml.threat.Threat checks. eps is in pixel units: 8/255, never 8.
    norm: str = "linf"
    eps: float = 8 / 255

    # The network. `width` None is the architecture's own.
    architecture: str = "cnn"
    width: int | None = None
    preact: bool = False
    start: Literal["random", "teacher"] = "random"

    # The loop. A batch is learnt from in `accumulate` parts, one after the other; `extra_share` of it are extra images
    # where the data set has any. `warmup` is the share of training in which a one-cycle rate rises; a multi-step one
    # falls tenfold at 50% and 75%. Of several processes each normalises by the global batch or, without `sync_norm`, by
    # its own rows, which saves two exchanges a layer; the running statistics kept are then the first one's. `one_pass`
    # sends all kinds of images that a step looks at through the student together, normalised by the mixture that the
    # running statistics will describe; without it each kind is normalised by itself, as in most published codes.
    epochs: int = 30
    batch_size: int = 128
    accumulate: int = 1
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: Literal["one-cycle", "multi-step", "constant"] = "one-cycle"
    warmup: float = 0.2
    clip: float = 0.0
    ema: float = 0.999
    augment: str = "none"
    extra_share: float = 0.7
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    sync_norm: bool = True
    one_pass: bool = False

    # The inner attack: the radius of its ball in units of eps, and the step in units of that radius. n-fgsm takes one
    # step of the radius. PGD starts `near` the image, a hair beside it, or at a `random` point of the ball; as
    # `published`, it is near for a base whose attack ascends a KL. `attack_target` confused: towards the wrong class
    # that the clean image is nearest to.
    attack: Literal["none", "pgd", "n-fgsm"] = "pgd"
    attack_radius: float = 1.0
    attack_steps: int = 10
    attack_step: float = 0.25
    attack_start: Literal["published", "near", "random"] = "published"
    attack_target: Literal["none", "confused"] = "none"

    # Randomised smoothing: the deviation of the Gaussian noise (pixel units, not clipped) that the student sees every
    # image through, in training and validation, and the draws of it that each image is attacked and learnt through.
    sigma: float = 0.0
    noise_copies: int = 1

    # Learning the label: a method of fdml.bases, with the weights of its terms; `answer` is the teacher's share of the
    # target.
    base: Literal["ce", "trades", "mart", "alp", "hat", "rslad", "tla", "agkd-bml", "lbgat"] = "ce"
    beta: float = 6.0
    gamma: float = 0.5
    label_smoothing: float = 0.1
    answer: float = 0.0
    temperature: float = 2.0

    # Interval bounds (linf): their share of the loss, whose other terms have the rest. The box has the radius of the
    # attack's ball, and grows to that from 0 until the share `ibp_warmup` of training.
    ibp: float = 0.0
    ibp_warmup: float = 0.5

    # Guidance by the teacher: feature distillation at `fd_layers`, and the metric term. `ramp` raises both weights
    # from 0 until the share `guidance_until` of training, `fade` lowers them to 0 by then, `hold` keeps them.
    fd: float = 0.0
    fd_layers: str = "stage3"
    ml: float = 0.0
    margin: float = 0.03
    positive: Literal["teacher", "student"] = "teacher"
    negative: Literal["clean", "adversarial"] = "clean"
    guidance: Literal["ramp", "fade", "hold"] = "fade"
    guidance_until: float = 0.7

    # Adversarial weight perturbation: gamma, and the share of training before it begins.
    awp: float = 0.0
    awp_after: float = 0.1

    # The teacher: the same network, trained on clean images or, `robust`, by adversarial training.
    teacher_kind: Literal["clean", "robust"] = "clean"
    teacher_epochs: int = 20
    teacher_lr: float = 0.1
    teacher_width: int | None = None

    # Validation: a share of the training images, and the steps and images of the attack that chooses the best epoch.
    val_fraction: float = 0.1
    val_steps: int = 10
    val_limit: int = 1000

    # The closing table: test images attacked.
    test_limit: int = 1000

    def __post_init__(self) -> None:
        for field, kind in typing.get_type_hints(type(self)).items():
            value = getattr(self, field)
            choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
            if choices and value not in choices:
                raise unknown(f"value of {field}", str(value), choices)
            if isinstance(value, (int, float)) and not abs(value) <= sys.float_info.max:
                raise InputError(f"{field}={value} is out of range: it must be a finite number")
            low, high = _RANGES.get(field, (None, None))
            if value is not None and ((low is not None and value < low) or (high is not None and value > high)):
                wanted = f"between {low} and {high}" if high is not None else f"at least {low}"
                raise InputError(f"{field}={value} is out of range: it must be {wanted}")
        if self.ibp and (self.norm != "linf" or self.sigma or self.compile):
            raise InputError(f"ibp={self.ibp} needs norm=linf, sigma=0 and compile=false")
        if self.base == "rslad" and (self.attack != "pgd" or self.sigma):
            raise InputError("base=rslad needs attack=pgd and sigma=0: its inner attack is its own")
        if self.sigma and (self.base in ("tla", "agkd-bml", "lbgat") or self.mixes):
            raise InputError(
                f"sigma={self.sigma} does not go with base={self.base}, augment={self.augment}: no method"
                " that looks at further images, and no cutmix, is defined through noise"
            )
        if self.attack_target != "none" and (self.attack != "pgd" or self.sigma or self.base in BY_KL):
            raise InputError(
                f"attack_target={self.attack_target} needs attack=pgd, sigma=0 and a base whose attack leaves the"
                f" label, not {self.base}"
            )

    @property
    def needs_teacher(self) -> bool:
        """Whether any term of the student's loss looks at the teacher."""
        guided = self.answer > 0 or self.fd > 0 or self.ml > 0
        return guided or self.start == "teacher" or self.base in ("hat", "rslad", "agkd-bml")

    @property
    def is_defended(self) -> bool:
        """Whether the student learns from more than the images themselves within the threat model."""
        return self.attack != "none" or self.ibp > 0

    @property
    def has_peer(self) -> bool:
        """Whether a second network learns beside the student."""
        return self.base == "lbgat"

    @property
    def looks_beside(self) -> bool:
        """Whether a step has further images, each chosen or moved at random."""
        return self.base in ("tla", "agkd-bml")

    @property
    def looks_at_confused(self) -> bool:
        """Whether a step begins with the wrong class that each clean image is nearest to."""
        return self.attack_target == "confused" or self.base == "agkd-bml"

    @property
    def layers(self) -> tuple[str, ...]:
        """The taps that feature distillation compares."""
        return tuple(name.strip() for name in self.fd_layers.split(",") if name.strip())

    @property
    def augmentations(self) -> tuple[str, ...]:
        """Names for ``fdml.data.augment``; empty for none."""
        return tuple(name for name in self._augment if name != CUTMIX)

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with others of the batch, after all other augmentation."""
        return CUTMIX in self._augment

    @property
    def _augment(self) -> tuple[str, ...]:
        return () if self.augment == "none" else tuple(name.strip() for name in self.augment.split(","))

    def teacher(self) -> "Recipe":
        """The recipe of this recipe's teacher: no guidance, and clean images unless it is to be robust."""
        robust = self.teacher_kind == "robust"
        return replace(
            self,
            name="pgd-at" if robust else "standard",
            epochs=self.teacher_epochs,
            lr=self.teacher_lr,
            width=self.teacher_width or self.width,
            attack="pgd" if robust else "none",
            attack_target="none",
            one_pass=False,
            base="ce",
            answer=0.0,
            fd=0.0,
            ml=0.0,
            awp=0.0,
            sigma=0.0,
            ibp=0.0,
            start="random",
        )

    def peer(self) -> "Recipe":
        """The recipe whose network learns beside the student: of the teacher's width, from random weights."""
        return replace(self, width=self.teacher_width or self.width, start="random")

    def to_dict(self) -> dict[str, object]:
        """Every field, as JSON values."""
        return dataclasses.asdict(self)


_RANGES: dict[str, tuple[float | None, float | None]] = {
    "seed": (0, 2**31 - 1),
    "eps": (0, None),
    "width": (1, 1024),
    "epochs": (1, 100_000),
    "batch_size": (1, 1_000_000),
    "accumulate": (1, 1_000_000),
    "extra_share": (0, 1),
    "lr": (0, 100),
    "momentum": (0, 1),
    "weight_decay": (0, 1),
    "warmup": (0, 1),
    "clip": (0, None),
    "ema": (0, 1),
    "attack_steps": (1, 10_000),
    "attack_radius": (0.1, 3),
    "attack_step": (0, 10),
    "sigma": (0, 4),
    "noise_copies": (1, 1000),
    "ibp": (0, 1),
    "ibp_warmup": (0, 1),
    "beta": (0, None),
    "gamma": (0, None),
    "label_smoothing": (0, 1),
    "answer": (0, 1),
    "temperature": (1e-3, 1e3),
    "fd": (0, None),
    "ml": (0, None),
    "margin": (0, 2),
    "guidance_until": (0, 1),
    "awp": (0, 1),
    "awp_after": (0, 1),
    "teacher_epochs": (1, 100_000),
    "teacher_lr": (0, 100),
    "teacher_width": (1, 1024),
    "val_fraction": (0.001, 0.5),
    "val_steps": (1, 10_000),
    "val_limit": (1, None),
    "test_limit": (1, None),
}


def override(recipe: Recipe, assignments: Iterable[str]) -> Recipe:
    """The recipe with ``key=value`` assignments applied; fractions such as ``eps=8/255`` are read as numbers.

    Raises ``InputError`` for an assignment without ``=``, an unknown key (with the nearest one), and a value that is
    not of the key's type or out of its range.
    """
    kinds = typing.get_type_hints(Recipe)
    changes: dict[str, object] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        key = key.strip().replace("-", "_")
        if not equals:
            raise InputError(f"{assignment!r} is not an override: write key=value, for example eps=8/255")
        if key not in kinds or key == "name":
            raise unknown("recipe key", key, [known for known in kinds if known != "name"])
        changes[key] = _parse(key, text.strip(), kinds[key])
    return replace(recipe, **changes)


def _parse(key: str, text: str, kind: object) -> object:
    if typing.get_origin(kind) is Literal or kind is str:
        return text
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        if text.lower() == "none":
            return None
        kind = next(option for option in typing.get_args(kind) if option is not type(None))
    if kind is bool:
        if text.lower() in ("true", "yes", "on", "1"):
            return True
        if text.lower() in ("false", "no", "off", "0"):
            return False
        raise InputError(f"{key}={text!r}: write true or false")
    try:
        if kind is int:
            return int(text)
        number = float(Fraction(text)) if "/" in text else float(text)
    except (ValueError, ZeroDivisionError, OverflowError):
        wanted = "a whole number" if kind is int else "a number, such as 0.1 or 8/255"
        raise InputError(f"{key}={text!r}: write {wanted}") from None
    if number != number or number in (float("inf"), float("-inf")):
        raise InputError(f"{key}={text!r}: write a finite number")
    return number


def from_dict(values: dict[str, object]) -> Recipe:
    """The recipe of a ``recipe.json``; raises ``InputError`` for a key, a type or a value that is not a recipe's."""
    kinds = typing.get_type_hints(Recipe)
    for key, value in values.items():
        if key not in kinds:
            raise unknown("recipe key", str(key), kinds)
        allowed = typing.get_args(kinds[key]) or (kinds[key],)
        is_choice = typing.get_origin(kinds[key]) is Literal
        fits = (
            isinstance(value, str) if is_choice else isinstance(value, (*allowed, int) if float in allowed else allowed)
        )
        if not fits or (isinstance(value, bool) and bool not in allowed):
            raise InputError(f"recipe key {key!r} has the value {value!r}, which is not of its type")
    if "name" not in values:
        raise InputError("a recipe needs a name")
    return Recipe(**typing.cast("dict[str, typing.Any]", values))
