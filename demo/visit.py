"""One visitor: the picture in front of them, and what is being computed for them."""

import threading
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from fdml.demo.exhibit import Exhibit

VISITORS = 1000
"""Visitors whose stop signals are kept; the one who was idle longest is forgotten first."""


@dataclass(frozen=True, eq=False)
class Visit:
    """What a visitor looks at: ``image`` (c, h, w) uint8 of an exhibit, its class if that is known, and its place among
    the exhibit's pictures if it is one of them."""

    exhibit: str
    image: np.ndarray
    label: int | None = None
    place: int | None = None

    def __deepcopy__(self, memo: object) -> "Visit":
        return self  # it is never changed


def first(exhibit: Exhibit) -> Visit:
    """What a visitor sees first: the first picture there is, or a blank one."""
    if not len(exhibit.images):
        return Visit(exhibit.name, np.zeros(exhibit.input, np.uint8))
    return picked(exhibit, 0)


def picked(exhibit: Exhibit, place: int) -> Visit:
    """The exhibit's own picture at ``place``."""
    return Visit(exhibit.name, exhibit.images[place], int(exhibit.labels[place]), place)


class Stops:
    """A stop signal for each visitor, by the name of their session."""

    def __init__(self) -> None:
        self._events: OrderedDict[str, threading.Event] = OrderedDict()
        self._lock = threading.Lock()

    def begin(self, session: str) -> threading.Event:
        """A new signal for what this visitor begins; what they had begun before is stopped."""
        with self._lock:
            self._set(session)
            event = self._events[session] = threading.Event()
            while len(self._events) > VISITORS:
                self._events.popitem(last=False)[1].set()
            return event

    def stop(self, session: str) -> None:
        """Stops what this visitor began."""
        with self._lock:
            self._set(session)

    def _set(self, session: str) -> None:
        if session in self._events:
            self._events.pop(session).set()
