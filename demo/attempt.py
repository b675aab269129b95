"""An attack under way: in a thread of its own, seen at every step, and stopped when somebody asks."""

import math
import threading
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fdml.attacks import Attack
from fdml.losses import cross_entropy
from fdml.models import Frozen, Outputs
from fdml.randomness import Streams
from fdml.threat import Threat

MAX_TRACE = 400
"""Points that are kept of an attack's way: when there are more, every second is dropped."""

_FAR = 3.0
"""Looks further away than so many eps are not shown: an attack's guides, and the far ends of its searches."""


class Ended(Exception):  # noqa: N818 — nothing went wrong
    """Ends a computation from inside the model that it asks."""


@dataclass(frozen=True)
class Look:
    """The ``number``-th picture that the attack showed the model: (1, c, h, w), its logits (1, classes) and its loss,
    the cross-entropy of the class that it is to lose."""

    number: int
    x: Tensor
    logits: Tensor
    loss: float


class Attempt:
    """Begins ``attack`` on one picture ``x`` (1, c, h, w) of class ``y`` (1,); ``last`` and ``trace`` grow as it goes.

    It looks at most every ``pause`` seconds, for people to see its steps, and after ``seconds`` it is stopped. Once it
    is ``over``, ``found`` is its picture, of the last look where it was stopped; ``error`` is what it raised, if
    anything.
    """

    def __init__(
        self,
        model: Frozen,
        x: Tensor,
        y: Tensor,
        threat: Threat,
        attack: Attack,
        streams: Streams,
        *,
        seconds: float,
        pause: float = 0.0,
    ) -> None:
        self._model, self._x, self._y, self._threat = model, x, y, threat
        self._attack, self._streams, self._pause = attack, streams, pause
        self._began = time.monotonic()
        self._ends = self._began + seconds
        self._every = 1
        self._stop, self.over = threading.Event(), threading.Event()
        self.looks = 0
        self.last: Look | None = None
        self.trace: list[tuple[int, float]] = []
        self.found: Tensor = x
        self.stopped = False
        self.error: Exception | None = None
        threading.Thread(target=self._run, name="fdml-attack", daemon=True).start()

    def stop(self) -> None:
        """Ends it at its next look."""
        self._stop.set()

    def _run(self) -> None:
        try:
            self.found = self._attack(self, self._x, self._y, self._threat, generator=self._streams)  # pyright: ignore[reportArgumentType]
        except Ended:
            self.stopped = True
            if self.last is not None:
                self.found = self._threat.project(self.last.x, self._x)
        except Exception as error:
            self.error = error
        self.over.set()

    # What the attack sees of the model -------------------------------------------------------------------------------

    def __call__(self, x: Tensor) -> Tensor:
        logits = self._model(x)
        self._see(x, logits)
        return logits

    def outputs(self, x: Tensor) -> Outputs:
        """As ``Frozen.outputs``."""
        found = self._model.outputs(x)
        self._see(x, found.logits)
        return found

    @property
    def tap_names(self) -> Any:
        """As ``Frozen.tap_names``."""
        return self._model.tap_names

    def _see(self, x: Tensor, logits: Tensor) -> None:
        if self._stop.is_set() or time.monotonic() > self._ends:
            raise Ended
        x, logits = x.detach()[:1], logits.detach()[:1]
        if float(self._threat.distance(x, self._x)) > _FAR * self._threat.eps + 1e-6:
            return
        self.looks += 1
        self.last = Look(self.looks, x.clone(), logits, float(cross_entropy(logits, self._y)))
        if self.looks % self._every == 0 and math.isfinite(self.last.loss):
            self.trace.append((self.looks, self.last.loss))
            if len(self.trace) > MAX_TRACE:
                del self.trace[::2]
                self._every *= 2
        if self._pause:
            self._stop.wait(max(0.0, self._began + self.looks * self._pause - time.monotonic()))


def streams(seed: int, name: str) -> Streams:
    """The random numbers that ``fdml attack --seed`` gives its first picture."""
    return Streams.of(torch.tensor([0]), seed, name)
