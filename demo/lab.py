"""What the demo computes: answers, attacks, distances, curves and certificates of one exhibit's models."""

import secrets
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fdml.attacks import FEATURES
from fdml.attacks.tuned import tuned
from fdml.certify.assault import fooled_at
from fdml.certify.noise import GridNoise
from fdml.certify.smoothing import ALPHA, SELECTION, Smoother
from fdml.checkpoint import load
from fdml.craft import whole_levels
from fdml.demo.attempt import Attempt, Ended, Look, streams
from fdml.demo.choices import MAX_SAMPLES, MAX_STEPS, METHODS, NORMS, USUAL_STEPS, WHOM, usual_eps
from fdml.demo.exhibit import Exhibit, Side
from fdml.errors import InputError
from fdml.evaluate.curve import around, curve
from fdml.models import Frozen
from fdml.randomness import Streams
from fdml.sequence import LOOK, mixture_lower, radius_of
from fdml.threat import Threat

SECONDS = 60.0
"""An attack or a certificate that takes longer is stopped."""

SHOWN = 0.08
"""Seconds between two pictures of an attack under way."""

VISIBLE = 0.5
"""Seconds over which the steps of a quick attack are spread, so that they can be seen."""

RADII = (1.0, 1.15, 1.3, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0)
"""How many times the certified radius an attack on the smoothed model tries, until one changes its answer."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """An attack as a visitor asked for it. ``image`` is uint8 (c, h, w), ``label`` its class; None is the answer of the
    model that is attacked. ``steps`` None is the usual number; ``target`` is the class to end in, None any other.

    Raises ``InputError`` for a value out of its range.
    """

    method: str
    norm: str
    eps: float
    image: Tensor
    label: int | None = None
    steps: int | None = None
    target: int | None = None
    whom: str = "each"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InputError(f"unknown attack {self.method!r}: one of {', '.join(METHODS)}")
        if self.whom not in WHOM:
            raise InputError(f"whom to attack is {self.whom!r}: one of {', '.join(WHOM)}")
        if self.method != "fgsm" and self.steps is not None and not 1 <= self.steps <= MAX_STEPS:
            raise InputError(f"{self.steps} steps are out of range: 1 to {MAX_STEPS}")
        if not 0 <= self.seed < 1 << 31:
            raise InputError(f"seed {self.seed} is out of range: 0 to {(1 << 31) - 1}")
        if self.target is not None and self.target == self.label:
            raise InputError("the target is the class that the picture already shows: choose another")
        Threat(self.norm, self.eps)

    @property
    def threat(self) -> Threat:
        """What the attack may do."""
        return Threat(self.norm, self.eps)


@dataclass(frozen=True)
class Seen:
    """What one model makes of a picture: the picture (c, h, w) in [0, 1] and the probabilities (classes,)."""

    x: Tensor
    probabilities: Tensor

    @property
    def answer(self) -> int:
        """The index of the likeliest class."""
        return int(self.probabilities.argmax())

    @property
    def confidence(self) -> float:
        """The probability of the answer."""
        return float(self.probabilities.max())


@dataclass(frozen=True)
class Faced:
    """One model beside the picture: ``clean``, and ``attacked`` as far as the attack has come. ``label`` is the class
    that it is to lose; ``trace`` are the attack's looks with their losses, where this model was attacked."""

    side: Side
    clean: Seen
    attacked: Seen
    label: int
    trace: tuple[tuple[int, float], ...] = ()

    @property
    def distances(self) -> dict[str, float]:
        """How far the attacked picture is from the clean one, in each norm."""
        return {norm: float(Threat(norm, 0.0).distance(self.attacked.x[None], self.clean.x[None])) for norm in NORMS}


@dataclass(frozen=True)
class Moment:
    """An attack at some moment. ``state`` is ``running``, ``stopped`` or ``done``; ``looks`` counts the pictures that
    the attack has shown the models it attacks."""

    asked: Asked
    faced: tuple[Faced, ...]
    state: str
    looks: int
    seconds: float


@dataclass(frozen=True)
class Distances:
    """How far, in one tap of a model, the picture is from its clean self (``to_self``) and from the nearest picture of
    the class that it is most nearly mistaken for (``to_other``): 1 − cos of pooled features, before and after."""

    tap: str
    before_self: float
    before_other: float
    after_self: float
    after_other: float
    other: int


@dataclass(frozen=True)
class Proof:
    """A certificate that fills in. The smoothed model answers ``answer`` everywhere closer than ``radius`` (L2), but
    for a chance of ``alpha``, after ``hits`` of ``count`` samples; None where nothing was shown. ``tried`` are the
    radii at which an attack on the smoothed model failed, ``broken`` the one at which it succeeded. ``state`` is
    ``sampling``, ``attacking``, ``done`` or ``stopped``.
    """

    answer: int | None
    radius: float
    hits: int
    count: int
    samples: int
    sigma: float
    alpha: float
    seed: int
    tried: tuple[float, ...] = ()
    broken: float | None = None
    state: str = "sampling"


@dataclass
class Lab:
    """An exhibit whose models are loaded when first they are asked. Several visitors may ask at once."""

    exhibit: Exhibit
    _curves: dict[tuple[str, str], list[tuple[float, float]]] = field(default_factory=dict)

    @cached_property
    def models(self) -> dict[str, Frozen]:
        """The models by key, frozen for good: attacks by several threads then change nothing in them."""
        return {side.key: Frozen(load(side.file)) for side in self.exhibit.sides}

    @cached_property
    def samples(self) -> tuple[Tensor, Tensor]:
        """The pictures that come with the exhibit, (n, c, h, w) in [0, 1], and their classes."""
        found = torch.from_numpy(self.exhibit.images).float() / 255
        return found, torch.from_numpy(self.exhibit.labels).long()

    @cached_property
    def _known(self) -> dict[str, dict[str, Tensor]]:
        """The features of the exhibit's pictures, by model and tap."""
        with torch.no_grad():
            found = {key: model.outputs(self.samples[0]).taps for key, model in self.models.items()}
        return {key: {name: _pooled(tap) for name, tap in taps.items()} for key, taps in found.items()}

    def seen(self, key: str, x: Tensor) -> Seen:
        """What the model of that key makes of one picture (1, c, h, w)."""
        with torch.no_grad():
            return Seen(x[0], self.models[key](x).softmax(1)[0])

    def unattacked(self, image: np.ndarray, label: int | None) -> tuple[Faced, ...]:
        """What the models make of a picture, uint8 (c, h, w), that nobody has attacked; ``label`` is its class, None
        the answer of each."""
        x = torch.tensor(image)[None].float() / 255
        faced = []
        for side in self.exhibit.sides:
            seen = self.seen(side.key, x)
            faced.append(Faced(side, seen, seen, seen.answer if label is None else label))
        return tuple(faced)

    def usual_eps(self, norm: str) -> float:
        """The eps to begin with in a norm; raises ``InputError`` for an unknown one."""
        Threat(norm, 0.0)
        return usual_eps(norm, self.exhibit)

    def asked(self, image: np.ndarray, *, label: str | None, target: str | None, **rest: Any) -> Asked:
        """An attack on a picture, uint8 (c, h, w), with classes by their names; raises ``InputError`` as ``Asked``."""
        known = {
            key: None if name is None else self.exhibit.class_index(name)
            for key, name in (("label", label), ("target", target))
        }
        return Asked(image=torch.tensor(image), **known, **rest)

    # Attacks ---------------------------------------------------------------------------------------------------------

    def attack(self, asked: Asked, *, stop: threading.Event | None = None, paced: bool = False) -> Iterator[Moment]:
        """The attack as it goes, ending in a moment that is ``done`` or ``stopped``; what a file of whole grey levels
        holds is then shown, as ``fdml attack`` writes it.

        Raises ``InputError`` for an attack that this exhibit or norm does not allow.
        """
        began = time.monotonic()
        x = asked.image[None].float() / 255
        sides = self.exhibit.sides
        victims = [side for side in sides if asked.whom in ("each", side.key)]
        if not victims:
            raise InputError(f"there is no {asked.whom} model here to attack")
        clean = {side.key: self.seen(side.key, x) for side in sides}
        labels = {side.key: clean[side.key].answer if asked.label is None else asked.label for side in sides}
        if asked.target is not None and any(labels[side.key] == asked.target for side in victims):
            raise InputError("the target is what the model already answers: choose another class")
        # A picture that a model gets wrong by itself is left alone, as fdml attack leaves it.
        attempts = {
            side.key: self._begin(side.key, x, labels[side.key], asked, paced)
            for side in victims
            if clean[side.key].answer == labels[side.key]
        }
        shown = {side.key: x for side in victims}

        def moment(state: str) -> Moment:
            faced = []
            for side in sides:
                source = side.key if side.key in shown else victims[0].key
                attacked = self.seen(side.key, shown[source])
                trace = tuple(attempts[side.key].trace) if side.key in attempts else ()
                faced.append(Faced(side, clean[side.key], attacked, labels[side.key], trace))
            looks = max((attempt.looks for attempt in attempts.values()), default=0)
            return Moment(asked, tuple(faced), state, looks, time.monotonic() - began)

        try:
            drawn = dict.fromkeys(attempts, 0)
            while not all(attempt.over.wait(SHOWN / len(attempts)) for attempt in attempts.values()):
                if stop is not None and stop.is_set():
                    for attempt in attempts.values():
                        attempt.stop()
                news: dict[str, Look] = {
                    key: attempt.last
                    for key, attempt in attempts.items()
                    if attempt.last is not None and attempt.last.number > drawn[key]
                }
                if paced and news:
                    for key, look in news.items():
                        shown[key], drawn[key] = look.x.clamp(0, 1), look.number
                    yield moment("running")
        finally:
            for attempt in attempts.values():
                attempt.stop()
        for key, attempt in attempts.items():
            if attempt.error is not None:
                raise attempt.error
            y = torch.tensor([labels[key]])
            shown[key] = whole_levels(self.models[key], x, attempt.found, y, asked.threat)
        stopped = any(attempt.stopped for attempt in attempts.values())
        yield moment("stopped" if stopped else "done")

    def _begin(self, key: str, x: Tensor, label: int, asked: Asked, paced: bool) -> Attempt:
        steps = asked.steps if asked.method != "fgsm" else None
        chosen = tuned(asked.method, steps=steps, target=asked.target)
        if asked.method in FEATURES:
            guides, guide_y = self.samples
            if not len(guides):
                raise InputError("the feature attack needs pictures of other classes, and this exhibit has none")
            chosen = partial(chosen, guides=guides, guide_y=guide_y)
        pause = min(0.06, VISIBLE / (steps or USUAL_STEPS.get(asked.method, 1))) if paced else 0.0
        y = torch.tensor([label])
        stream = streams(asked.seed, asked.method)
        return Attempt(self.models[key], x, y, asked.threat, chosen, stream, seconds=SECONDS, pause=pause)

    def distances(self, moment: Moment, key: str) -> list[Distances]:
        """What the attack did to the features of the model of that key, tap by tap; nothing where the exhibit has no
        pictures to compare with."""
        _, guide_y = self.samples
        faced = next(faced for faced in moment.faced if faced.side.key == key)
        if not len(guide_y):
            return []
        known = self._known[key]
        with torch.no_grad():
            pair = self.models[key].outputs(torch.stack([faced.clean.x, faced.attacked.x]))
        found = []
        # The confused class is that of the attacked picture, for both: the two are then comparable.
        rivals = pair.logits[1].clone()
        rivals[faced.label] = -torch.inf
        other = int(rivals.argmax())
        rows = (guide_y == other) if bool((guide_y == other).any()) else (guide_y != faced.label)
        for name, tap in pair.taps.items():
            clean, attacked = _pooled(tap)
            near = known[name][rows]
            found.append(
                Distances(
                    name,
                    0.0,
                    _apart((near @ clean).max()),
                    _apart(clean @ attacked),
                    _apart((near @ attacked).max()),
                    other,
                )
            )
        return found

    # Curves ----------------------------------------------------------------------------------------------------------

    def curves(
        self, norm: str, stop: threading.Event | None = None
    ) -> Iterator[Mapping[str, list[tuple[float, float]]]]:
        """Accuracy over eps on the exhibit's pictures, for one model after the other, by PGD-20 of each against itself;
        kept for the next visitor. Raises ``InputError`` for an unknown norm and where there are no pictures."""
        x, y = self.samples
        if not len(x):
            raise InputError("there are no pictures to measure on: name a data set with --data, and its folder")
        values = around(self.usual_eps(norm), norm)
        found: dict[str, list[tuple[float, float]]] = {}
        for side in self.exhibit.sides:
            if (side.key, norm) not in self._curves:
                model = self.models[side.key]

                def watched(images: Tensor, model: Frozen = model) -> Tensor:
                    if stop is not None and stop.is_set():
                        raise Ended
                    return model(images)

                streams = Streams.of(torch.arange(len(x)), 0, "curve")
                try:
                    stands = curve(watched, x, y, norm, values, generator=streams)
                except Ended:
                    return
                shares = stands.float().mean(1).tolist()
                self._curves[side.key, norm] = list(zip(values, shares, strict=True))
            found[side.key] = self._curves[side.key, norm]
            yield dict(found)

    # Certificates ----------------------------------------------------------------------------------------------------

    def certify(
        self,
        image: np.ndarray,
        key: str,
        *,
        sigma: float,
        samples: int,
        alpha: float = ALPHA,
        seed: int | None = None,
        stop: threading.Event | None = None,
        every: float = 0.15,
    ) -> Iterator[Proof]:
        """The certificate of a picture, uint8 (c, h, w), by randomised smoothing, as its samples come: what is shown
        holds at every moment (``fdml.sequence``). Then an attack on the smoothed model looks for where it breaks.

        The noise is new each time unless ``seed`` is given. Raises ``InputError`` for a value out of its range.
        """
        if not 0 < sigma <= 4:
            raise InputError(f"noise of {sigma:g} is out of range: above 0 and at most 4, as pixels are in [0, 1]")
        if not SELECTION <= samples <= MAX_SAMPLES:
            raise InputError(f"{samples} samples are out of range: {SELECTION} to {MAX_SAMPLES:,}")
        if not 0 < alpha < 0.5:
            raise InputError(f"a chance of an error of {alpha:g} is out of range: above 0 and below 0.5")
        seed = secrets.randbelow(1 << 31) if seed is None else seed
        model, ends = self.models[self.exhibit.side(key).key], time.monotonic() + SECONDS
        grid = torch.tensor(image)
        noise = GridNoise(sigma, seed, "cpu")
        smoother = Smoother(model, len(self.exhibit.classes), noise, alpha=alpha, batch=2 * LOOK)
        candidate = smoother.candidate(grid, 0, SELECTION)
        hits = count = 0

        def proof(state: str, **rest: object) -> Proof:
            radius = radius_of(mixture_lower(hits, count, alpha), sigma) if count else 0.0
            answer = candidate if radius > 0 else None
            return Proof(answer, radius, hits, count, samples, sigma, alpha, seed, state=state, **rest)  # pyright: ignore[reportArgumentType]

        def ended() -> bool:
            return time.monotonic() > ends or (stop is not None and stop.is_set())

        last = time.monotonic()
        for more, seen in smoother.looks(grid, 0, candidate, samples):
            hits, count = hits + more, count + seen
            if ended():
                break
            if time.monotonic() - last >= every:
                yield proof("sampling")
                last = time.monotonic()
        now = proof("attacking")
        if now.answer is None or ended():
            yield proof("done" if not ended() else "stopped")
            return
        yield now
        tried: list[float] = []
        for times in RADII[1:]:
            radius = times * now.radius
            if fooled_at(smoother, model, grid, candidate, 0, [radius]) is not None:
                yield proof("done", tried=tuple(tried), broken=radius)
                return
            tried.append(radius)
            if ended():
                break
            yield proof("attacking", tried=tuple(tried))
        yield proof("stopped" if ended() else "done", tried=tuple(tried))


def _pooled(tap: Tensor) -> Tensor:
    """Features as the metric loss takes them: (b, c), of length one."""
    return F.normalize(tap.mean((2, 3)) if tap.ndim == 4 else tap, dim=1, eps=1e-6)


def _apart(cosine: Tensor) -> float:
    """1 − cos, without what rounding leaves between equal features."""
    return max(0.0, round(1.0 - float(cosine), 6))
