"""What the page shows of what the lab found, and that no name in a card becomes markup."""

import json
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from pairs import CLOTHES, DIGITS, LAB, PLACE, attacked, called, faced, few, moment

from fdml.demo import page
from fdml.demo.exhibit import Exhibit
from fdml.demo.lab import Lab, Moment, Proof

HOSTILE = "<script>alert(1)</script>"
QUOTED = "\"><img src=x onerror='alert(1)'>"
CHANGED = called(DIGITS, *([HOSTILE, QUOTED] * 5))
CLEAN, DEFENDED = DIGITS.sides


class Page(HTMLParser):
    """The elements of a piece of the page: their tags with their attributes, and the text."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(str(markup))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str, kind: str = "") -> list[dict[str, str | None]]:
        """The attributes of those elements, all or of one class."""
        found = [attributes for name, attributes in self.elements if name == tag]
        return [each for each in found if not kind or kind in (each.get("class") or "").split()]


def proof(**fields: object) -> Proof:
    return replace(Proof(1, 0.1, 990, 1000, 2000, 0.25, 0.001, 5), **fields)  # pyright: ignore[reportArgumentType]


def scored() -> dict[str, Any]:
    """The report of the shipped digits."""
    return json.loads(DIGITS.reports[0].read_text(encoding="utf-8"))


def with_report(report: dict[str, Any], folder: Path) -> Exhibit:
    (folder / "report.json").write_text(json.dumps(report))
    return replace(DIGITS, reports=(folder / "report.json",))


@pytest.fixture(scope="module")
def ended() -> Moment:
    return attacked()


# Hostile names


@pytest.mark.parametrize(
    "shown",
    [
        lambda lab, ended: page.thumbs(lab.exhibit, PLACE),
        lambda lab, ended: page.headline(HOSTILE, QUOTED, HOSTILE),
        lambda lab, ended: page.verdict(ended, lab.exhibit),
        lambda lab, ended: page.compared(ended, lab.exhibit),
        lambda lab, ended: page.unattacked(ended.faced, lab.exhibit),
        lambda lab, ended: page.losses(ended),
        lambda lab, ended: page.distances(lab, ended),
        lambda lab, ended: page.accuracy({"clean": [(0.0, 1.0)]}, lab.exhibit, "linf"),
        lambda lab, ended: page.proof(proof(), lab.exhibit.images[0], lab.exhibit),
        lambda lab, ended: page.proof(proof(answer=0, broken=0.2), lab.exhibit.images[0], lab.exhibit),
    ],
)
def test_a_hostile_name_stays_text(shown: Callable[[Lab, Moment], str], ended: Moment) -> None:
    sides = tuple(replace(side, name=HOSTILE, about=QUOTED) for side in CHANGED.sides)
    met = tuple(replace(one, side=side) for one, side in zip(ended.faced, sides, strict=True))
    lab = Lab(replace(few(CHANGED), sides=sides))
    found = Page(shown(lab, replace(ended, faced=met)))
    assert found.elements
    assert not found.all("script")
    assert not [attributes for _, attributes in found.elements if any(name.startswith("on") for name in attributes)]
    assert all((attributes["src"] or "").startswith("data:image/png;base64,") for attributes in found.all("img"))


def test_a_hostile_report_stays_text(tmp_path: Path) -> None:
    report = scored()
    report["data"]["name"], report["threat"]["norm"] = HOSTILE, QUOTED
    found = Page(page.leaderboard([with_report(report, tmp_path)]))
    assert HOSTILE in found.text
    assert QUOTED in found.text
    assert not found.all("script")
    assert not found.all("img")


# Pictures to try


def test_two_pictures_of_each_class_are_to_be_tried_and_the_chosen_one() -> None:
    found = Page(page.thumbs(CLOTHES, 99))
    buttons = found.all("button")
    places = [int(button["data-place"] or "") for button in buttons]
    assert len(places) == len(set(places)) == 2 * 10 + 1
    labels = [int(CLOTHES.labels[place]) for place in places]
    assert labels == sorted(labels)
    assert [place for place, button in zip(places, buttons, strict=True) if button["aria-pressed"] == "true"] == [99]
    assert {len(found.all(tag)) for tag in ("button", "img")} == {21}
    assert not [1 for button in Page(page.thumbs(CLOTHES, None)).all("button") if button["aria-pressed"] == "true"]


def test_without_pictures_the_page_says_how_to_get_some() -> None:
    found = Page(page.thumbs(replace(DIGITS, images=DIGITS.images[:0], labels=DIGITS.labels[:0]), None))
    assert not found.all("button")
    assert "upload one, draw one, or start with --data" in found.text


# Models side by side


def test_each_model_is_shown_with_picture_attacked_picture_and_change(ended: Moment) -> None:
    found = Page(page.compared(ended, DIGITS))
    assert [side["aria-label"] for side in found.all("section")] == ["Clean model", "Defended model"]
    assert len(found.all("img")) == 6
    assert all(image["alt"] for image in found.all("img"))
    assert "of linf 0.2" in found.text
    assert "2.5 times larger" in found.text
    assert "Clean model: fooled." in found.text


def test_before_an_attack_each_model_is_shown_with_the_picture_alone() -> None:
    met = LAB.unattacked(DIGITS.images[PLACE], None)
    found = Page(page.unattacked(met, DIGITS))
    assert len(found.all("img")) == 2
    assert found.all("span", "before")
    assert not found.all("span", "after")
    assert "Clean model: says 9" in found.text


def test_one_model_by_itself_takes_the_whole_width(ended: Moment) -> None:
    for met, wide in ((ended.faced, False), (ended.faced[1:], True)):
        (outer,) = Page(page.compared(replace(ended, faced=met), DIGITS)).all("div", "fd-compare")
        assert ("one" in (outer["class"] or "").split()) == wide


@pytest.mark.parametrize(("before", "after", "bars"), [(0, 0, 4), (0, 7, 4), (3, 7, 4)])
def test_the_bars_show_the_true_class_and_the_likeliest(before: int, after: int, bars: int) -> None:
    met = faced(CLEAN, before, after, label=5)
    found = Page(page.compared(moment(met), DIGITS))
    rows = found.all("div", "true")
    assert len(rows) == 1
    names = [span["title"] for span in found.all("span", "name")]
    assert len(names) == bars
    assert names[0] == "5"
    assert {str(before), str(after)} <= set(names)


def test_the_headline_has_what_it_took_once_the_attack_has_ended(ended: Moment) -> None:
    assert "pictures in" in page.verdict(ended, DIGITS)
    running = page.verdict(replace(ended, state="running"), DIGITS)
    assert "pictures in" not in running
    assert 'class="fd-headline running"' in running


# Details


def test_losses_are_of_the_models_that_were_attacked(ended: Moment) -> None:
    found = Page(page.losses(ended))
    assert len(found.all("polyline")) == 2
    first, second = ended.faced
    assert len(Page(page.losses(replace(ended, faced=(first, replace(second, trace=()))))).all("polyline")) == 1
    assert page.losses(moment(faced(CLEAN, 1, 1))) == ""


def test_distances_are_shown_tap_by_tap(ended: Moment) -> None:
    found = Page(page.distances(LAB, ended))
    rows = 2 * len(LAB.models["clean"].tap_names)
    assert len(found.all("circle", "self")) == len(found.all("rect", "other")) == 2 * rows
    for circle in found.all("circle", "self"):
        assert 6 <= float(circle["cx"] or "") <= 154
    bare = Lab(replace(DIGITS, images=DIGITS.images[:0], labels=DIGITS.labels[:0]))
    assert page.distances(bare, ended) == ""


def test_a_curve_is_marked_where_the_models_were_trained() -> None:
    measured = {"clean": [(0.0, 1.0), (0.4, 0.0)]}
    assert "trained for" in page.accuracy(measured, DIGITS, "linf")
    assert "trained for" not in page.accuracy(measured, DIGITS, "l2")
    assert "on 100 test pictures" in page.accuracy(measured, DIGITS, "linf")


def test_a_certificate_is_shown_with_what_makes_it_again() -> None:
    text = Page(page.proof(proof(), DIGITS.images[0], DIGITS)).text
    assert (
        "990 of 1,000 noisy copies were answered alike; noise of sigma 0.25, chance of an error 0.001, seed 5" in text
    )


# The leaderboard


def test_the_leaderboard_begins_with_the_most_robust_of_each_data_set() -> None:
    found = Page(page.leaderboard([DIGITS, CLOTHES]))
    assert len(found.all("th")) == 10 + len(DIGITS.scores) + len(CLOTHES.scores)
    assert found.text.index("Defended model") < found.text.index("Clean model")
    assert f"{100 * DIGITS.scores[1]['autoattack']:.1f}%" in found.text


def test_without_a_report_the_leaderboard_says_how_to_make_one() -> None:
    assert "No evaluation of these models is at hand" in page.leaderboard([replace(DIGITS, reports=())])


def test_an_attack_that_was_not_run_has_no_number(tmp_path: Path) -> None:
    report = scored()
    for model in report["models"]:
        model["attacks"] = [attack for attack in model["attacks"] if attack["name"] != "square"]
    dash = "\N{EN DASH}"
    assert Page(page.leaderboard([with_report(report, tmp_path)])).text.count(dash) == 2
    assert dash not in Page(page.leaderboard([DIGITS])).text
