"""One visitor: the picture in front of them, and the stopping of what they began."""

import copy
from dataclasses import replace

import numpy as np
import pytest
from pairs import CLOTHES, DIGITS

from fdml.demo import visit
from fdml.demo.exhibit import Exhibit
from fdml.demo.visit import Stops


@pytest.mark.parametrize("exhibit", [CLOTHES, DIGITS], ids=lambda exhibit: exhibit.name)
def test_a_visitor_sees_one_of_the_pictures_first(exhibit: Exhibit) -> None:
    now = visit.first(exhibit)
    assert now.exhibit == exhibit.name
    assert now.place is not None
    assert np.array_equal(now.image, exhibit.images[now.place])
    assert now.label == exhibit.labels[now.place]


def test_without_pictures_a_visitor_sees_a_blank_one() -> None:
    now = visit.first(replace(DIGITS, images=DIGITS.images[:0], labels=DIGITS.labels[:0]))
    assert (now.label, now.place) == (None, None)
    assert now.image.dtype == np.uint8
    assert now.image.shape == DIGITS.input
    assert not now.image.any()


def test_a_picture_is_picked_by_its_place() -> None:
    now = visit.picked(DIGITS, 7)
    assert (now.exhibit, now.place, now.label) == ("digits", 7, DIGITS.labels[7])
    assert type(now.label) is int
    assert np.array_equal(now.image, DIGITS.images[7])


def test_a_visit_is_never_copied() -> None:
    now = visit.picked(DIGITS, 0)
    assert copy.deepcopy([now])[0] is now


def test_what_a_visitor_began_is_stopped_when_they_begin_another() -> None:
    stops = Stops()
    first, other = stops.begin("a"), stops.begin("b")
    second = stops.begin("a")
    assert [event.is_set() for event in (first, second, other)] == [True, False, False]
    stops.stop("a")
    assert [event.is_set() for event in (second, other)] == [True, False]
    stops.stop("a")
    stops.stop("nobody")
    assert not stops.begin("a").is_set()


def test_of_too_many_visitors_the_one_who_was_idle_longest_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visit, "VISITORS", 3)
    stops = Stops()
    events = {name: stops.begin(name) for name in "abc"}
    events["a"] = stops.begin("a")
    assert not any(event.is_set() for event in events.values())
    stops.begin("d")
    assert {name for name, event in events.items() if event.is_set()} == {"b"}
