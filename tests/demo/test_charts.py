"""The demo's charts: round numbers, marks in their places, and well-formed whatever a name holds."""

from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdml.demo.draw import HEIGHT, WIDTH, Line, Mark, chart, ring, ticks

HOSTILE = "</svg><script>alert('x')</script>\"&<"
PICTURE = "data:image/png;base64,AAAA"


def drawn(markup: str) -> ElementTree.Element:
    return ElementTree.fromstring(markup)


def texts(found: ElementTree.Element, kind: str) -> list[str]:
    return [element.text or "" for element in found.iter(kind)]


def points(found: ElementTree.Element) -> list[list[tuple[float, float]]]:
    """The points of each line."""
    lines = [element.get("points", "").split() for element in found.iter("polyline")]
    return [[(float(x), float(y)) for x, y in (point.split(",") for point in line)] for line in lines]


@pytest.mark.parametrize(
    ("low", "high", "found"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 0.4, [0, 0.1, 0.2, 0.3, 0.4]),
        (0, 7.3, [0, 2, 4, 6]),
        (-2, 3, [-2, -1, 0, 1, 2, 3]),
        (0, 1000, [0, 200, 400, 600, 800, 1000]),
    ],
)
def test_ticks_are_round_numbers(low: float, high: float, found: list[float]) -> None:
    assert ticks(low, high) == found


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e9))
def test_ticks_are_a_few_between_the_ends(low: float, size: float) -> None:
    high = low + size
    found = ticks(low, high)
    assert 2 <= len(found) <= 7
    assert found == sorted(set(found))
    slack = 1e-6 * (abs(low) + size)
    assert low - slack <= found[0]
    assert found[-1] <= high + slack


def test_a_chart_shows_its_points_in_their_places() -> None:
    lines = [Line("clean", "Clean model", [(0, 1), (0.1, 0.5), (0.2, 0)]), Line("defended", "Defended model", [])]
    found = drawn(chart("Accuracy", lines, across="eps", up="accuracy", marks=[Mark(0.1, "here")], percent=True))
    first, second = points(found)
    (left, top), (middle, half), (right, bottom) = first
    assert left < middle < right <= WIDTH
    assert 0 <= top < half < bottom <= HEIGHT
    assert middle == pytest.approx((left + right) / 2, abs=0.1)
    assert half == pytest.approx((top + bottom) / 2, abs=0.1)
    assert second == []
    assert {"0%", "100%", "here", "0.1"} <= set(texts(found, "text"))
    (mark,) = [line for line in found.iter("line") if line.get("class") == "mark"]
    assert float(mark.get("x1", "")) == middle
    assert next(found.iter("svg")).get("aria-label") == "Accuracy: accuracy over eps"
    assert ["".join(item.itertext()).strip() for item in found.iter("li")] == ["Clean model", "Defended model"]


@pytest.mark.parametrize("values", [[], [(1, 0.0)], [(1, 0.0), (2, 0.0)], [(1, 2.5), (21, 1e30)], [(1, -1.0)]])
def test_a_chart_of_any_values_stays_in_its_box(values: list[tuple[float, float]]) -> None:
    found = drawn(chart("Loss", [Line("clean", "Clean model", values)], across="pictures", up="loss"))
    (line,) = points(found)
    assert len(line) == len(values)
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in line)


def test_a_hostile_name_stays_text_in_a_chart() -> None:
    lines = [Line("clean", HOSTILE, [(0, 1)])]
    found = drawn(chart(HOSTILE, lines, across=HOSTILE, up=HOSTILE, marks=[Mark(1, HOSTILE)]))
    assert not list(found.iter("script"))
    assert texts(found, "figcaption") == [HOSTILE]
    assert HOSTILE in texts(found, "text")
    assert next(found.iter("svg")).get("aria-label") == f"{HOSTILE}: {HOSTILE} over {HOSTILE}"


def radii(found: ElementTree.Element) -> dict[str, float]:
    """The radii of the edges that are drawn, by their kind."""
    edges = [circle for circle in found.iter("circle") if "edge" in circle.get("class", "")]
    return {circle.get("class", "").split()[-1]: float(circle.get("r", "")) for circle in edges}


def test_a_ring_is_between_what_is_proved_and_what_is_broken() -> None:
    found = drawn(ring(0.2, 0.5, 0.4, PICTURE, "words"))
    edges = radii(found)
    assert set(edges) == {"certified", "broken"}
    assert edges["broken"] == pytest.approx(2.5 * edges["certified"], rel=1e-2)
    assert edges["broken"] < WIDTH
    said = " ".join("".join(item.itertext()).strip() for item in found.iter("li"))
    assert "certified up to 0.200" in said
    assert "broken by an attack from 0.500" in said
    assert next(found.iter("image")).get("href") == PICTURE


@pytest.mark.parametrize(
    ("certified", "broken", "tried", "edges"),
    [
        (0.0, None, None, set()),
        (0.3, None, None, {"certified"}),
        (0.3, None, 0.6, {"certified", "tried"}),
        (0.3, 0.345, None, {"certified", "broken"}),
    ],
)
def test_a_ring_shows_as_much_as_is_known(
    certified: float, broken: float | None, tried: float | None, edges: set[str]
) -> None:
    found = drawn(ring(certified, broken, tried, PICTURE, "words"))
    assert set(radii(found)) == edges
    said = " ".join(item for item in found.itertext())
    assert ("not yet broken" in said) == (broken is None)
    assert ("certified up to" in said) == (certified > 0)


def test_a_radius_is_rounded_toward_zero() -> None:
    assert "certified up to 0.199" in ring(0.1999, None, None, PICTURE, "words")


def test_a_hostile_name_stays_text_in_a_ring() -> None:
    found = drawn(ring(0.1, 0.2, 0.15, PICTURE, HOSTILE))
    assert not list(found.iter("script"))
    assert next(found.iter("svg")).get("aria-label") == HOSTILE
