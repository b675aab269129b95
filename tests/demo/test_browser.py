"""The demo's page as a visitor uses it: a real browser, no page error, no request beyond this machine."""

import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from live_demo import live_demo
from playwright.sync_api import Browser, Page, expect, sync_playwright

from fdml.demo.browser import ARGUMENTS, BROWSER

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine"),
]

PATIENCE = 30_000
"""Milliseconds that a step may take on a busy machine."""

expect.set_options(timeout=PATIENCE)

LOCAL = re.compile(r"(https?|wss?)://(127\.0\.0\.1|localhost)[:/]|data:|blob:|about:")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with live_demo() as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=BROWSER, args=ARGUMENTS)
        yield opened
        opened.close()


class Visitor:
    """A visitor's own window. What the page complains of, and whatever it asks of other machines, is kept."""

    def __init__(self, browser: Browser, address: str, **options: object) -> None:
        self.context = browser.new_context(viewport={"width": 1280, "height": 900}, **options)  # pyright: ignore[reportArgumentType]
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE)
        self.troubles: list[str] = []
        self.page.on("console", lambda said: self.troubles.append(said.text) if said.type == "error" else None)
        self.page.on("pageerror", lambda error: self.troubles.append(str(error)))
        self.page.on(
            "request", lambda asked: None if LOCAL.match(asked.url) else self.troubles.append(f"asked {asked.url}")
        )
        self.page.goto(address)
        self.page.locator("#compare .fd-side").first.wait_for()

    def attack(self) -> None:
        self.page.locator("#go").click()
        self.page.locator("#details .fd-distances").wait_for()

    def more(self) -> None:
        self.page.get_by_role("button", name="More").click()
        self.page.locator("#steps").wait_for()

    def upload(self, file: Path) -> None:
        with self.page.expect_file_chooser() as chooser:
            self.page.locator("#upload").click()
        chooser.value.set_files(file)

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name).click()


@pytest.fixture
def visitor(browser: Browser, address: str) -> Iterator[Visitor]:
    found = Visitor(browser, address)
    yield found
    found.context.close()
    assert not found.troubles


def test_a_visitor_chooses_attacks_and_reads_what_became_of_it(visitor: Visitor) -> None:
    page = visitor.page
    expect(page.locator("#verdict")).to_contain_text("Press Attack")
    page.locator("#thumbs button").nth(2).click()
    expect(page.locator("#thumbs button[aria-pressed=true]")).to_have_attribute("title", re.compile("Trouser"))
    expect(page.locator("#compare")).to_contain_text("Clean model: says Trouser")
    page.locator("#thumbs button[title^='Ankle boot']").first.click()
    expect(page.locator("#compare")).to_contain_text("Clean model: says Ankle boot")
    page.locator("#go").click()
    page.locator("#verdict .running").wait_for()
    expect(page.locator("#verdict")).to_contain_text("The clean model is fooled, the defended one holds.")
    expect(page.locator("#compare .clean .fd-verdict")).to_contain_text("Clean model: fooled. It now says ")
    expect(page.locator("#compare .defended .fd-verdict")).to_contain_text("holds. It still says Ankle boot")
    expect(page.locator("#compare figcaption").nth(1)).to_contain_text("of linf 0.1")
    expect(page.locator("#details svg").first).to_have_attribute("aria-label", re.compile("Loss along the attack"))
    expect(page.locator("#details")).to_contain_text("d(a,p): to its clean self")


def test_stop_ends_a_long_attack_at_once(visitor: Visitor) -> None:
    page = visitor.page
    visitor.more()
    page.locator("#method input").click()
    page.get_by_role("option", name=re.compile("APGD")).click()
    steps = page.locator("#steps input[type=number]")
    expect(steps).to_have_value("50")
    steps.fill("2000")
    steps.press("Tab")
    expect(page.locator("#halt")).to_be_disabled()
    page.locator("#eps input[type=number]").fill("0.02")
    page.locator("#eps input[type=number]").press("Tab")
    page.locator("#go").click()
    page.locator("#verdict .running").wait_for()
    page.locator("#halt").click()
    expect(page.locator("#verdict .stopped")).to_contain_text("Stopped.")
    expect(page.locator("#go")).to_be_enabled()
    expect(page.locator("#halt")).to_be_disabled()


def test_a_bad_file_is_refused_in_the_page_and_a_good_one_is_shown(visitor: Visitor, tmp_path: Path) -> None:
    from PIL import Image

    page = visitor.page
    bad = tmp_path / "not-a-picture.png"
    bad.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50))
    visitor.upload(bad)
    expect(page.locator("#verdict .error")).to_contain_text("not-a-picture.png: not a readable PNG")
    expect(page.locator("#compare .fd-side").first).to_be_visible()
    good = tmp_path / "wide.png"
    Image.radial_gradient("L").resize((300, 150)).save(good)
    visitor.upload(good)
    expect(page.locator("#verdict")).to_contain_text("Press Attack")
    expect(page.locator("#thumbs button[aria-pressed=true]")).to_have_count(0)
    natural = page.locator("#compare img").first.evaluate("image => [image.naturalWidth, image.naturalHeight]")
    assert natural == [28, 28], "shown as the model sees it"
    visitor.attack()


def test_a_drawing_is_classified(visitor: Visitor) -> None:
    page = visitor.page
    page.get_by_text("Handwritten digits").click()
    page.locator("#thumbs button[title^='0,']").first.wait_for()
    page.get_by_role("button", name="Draw one").click()
    box = page.locator("#pad canvas").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 0.15 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 0.85 * box["height"], steps=8)
    page.mouse.up()
    page.locator("#pad .use").click()
    expect(page.locator("#thumbs button[aria-pressed=true]")).to_have_count(0)
    expect(page.locator("#compare .defended .fd-verdict")).to_contain_text("says 1")


def test_another_norm_has_another_range(visitor: Visitor) -> None:
    page = visitor.page
    visitor.more()
    page.get_by_label("all changes together (l2)").first.click()
    expect(page.locator("#eps input[type=number]")).to_have_value("1.4")
    visitor.attack()
    expect(page.locator("#compare figcaption").nth(1)).to_contain_text("of l2 1.4")
    expect(page.locator("#label input")).to_have_value("Ankle boot")
    page.get_by_text("Handwritten digits").click()
    expect(page.locator("#label input")).not_to_have_value("Ankle boot")
    expect(page.locator("#eps input[type=number]")).to_have_value("0.2")
    visitor.attack()
    expect(page.locator("#compare figcaption").nth(1)).to_contain_text("of linf 0.2")


def test_a_mistake_is_said_in_the_page(visitor: Visitor) -> None:
    page = visitor.page
    visitor.more()
    page.locator("#method input").click()
    page.get_by_role("option", name=re.compile("Square")).click()
    page.locator("#target input").click()
    page.get_by_role("option", name="Bag").click()
    page.locator("#go").click()
    expect(page.locator("#verdict .error")).to_contain_text("cannot be aimed")
    expect(page.locator("#go")).to_be_enabled()


def test_the_curves_the_certificate_and_the_leaderboard(visitor: Visitor) -> None:
    page = visitor.page
    visitor.tab("How much each takes")
    page.locator("#measure").click()
    expect(page.locator("#curve polyline")).to_have_count(2)
    visitor.tab("Certify")
    page.locator("#samples input[type=number]").fill("4000")
    page.locator("#samples input[type=number]").press("Tab")
    page.locator("#prove").click()
    expect(page.locator("#certificate")).to_contain_text("Proved with 99.9% confidence")
    expect(page.locator("#prove")).to_be_enabled()
    expect(page.locator("#certificate svg").first).to_have_attribute(
        "aria-label", re.compile("the truth lies between|No attack")
    )
    visitor.tab("Leaderboard")
    expect(page.locator("#leaderboard tbody tr")).to_have_count(4)
    visitor.tab("What is this?")
    expect(page.get_by_role("heading", name="What is an adversarial example?")).to_be_visible()


def test_an_example_is_kept_as_files(visitor: Visitor, tmp_path: Path) -> None:
    visitor.attack()
    keep = visitor.page.locator("#keep")
    keep.wait_for()
    with visitor.page.expect_download() as download:
        keep.click()
    path = tmp_path / "example.zip"
    download.value.save_as(path)
    with zipfile.ZipFile(path) as archive:
        assert {"example.json", "clean.png", "adversarial-clean.png", "adversarial-defended.png"} <= set(
            archive.namelist()
        )


@pytest.mark.parametrize("scheme", ["light", pytest.param("dark", marks=pytest.mark.slow)])
def test_nothing_serious_is_in_the_way_of_people_with_disabilities(browser: Browser, address: str, scheme: str) -> None:
    visitor = Visitor(browser, address, color_scheme=scheme, reduced_motion="reduce")
    visitor.attack()
    visitor.more()
    visitor.page.get_by_role("button", name="Draw one").click()
    everything = ("Attack", "How much each takes", "Certify", "Leaderboard", "What is this?")
    for tab in everything if scheme == "light" else ("Attack", "Certify", "Leaderboard"):
        visitor.tab(tab)
        if tab == "How much each takes":
            visitor.page.locator("#measure").click()
            expect(visitor.page.locator("#curve polyline")).to_have_count(2)
        if tab == "Certify":
            visitor.page.locator("#samples input[type=number]").fill("1000")
            visitor.page.locator("#samples input[type=number]").press("Tab")
            visitor.page.locator("#prove").click()
            visitor.page.locator("#certificate .fd-ring").wait_for()
            expect(visitor.page.locator("#halt-proof")).to_be_disabled()
        visitor.page.wait_for_timeout(400)  # colours that fade from one state to the next
        found = Axe().run(visitor.page).response["violations"]
        grave = {
            each["id"]: [node["html"] for node in each["nodes"]]
            for each in found
            if each["impact"] in ("serious", "critical")
        }
        assert not grave, (scheme, tab, grave)
    visitor.context.close()
    assert not visitor.troubles


def test_it_is_readable_on_a_phone(browser: Browser, address: str) -> None:
    visitor = Visitor(browser, address, is_mobile=True, has_touch=True)
    visitor.page.set_viewport_size({"width": 390, "height": 844})
    visitor.attack()
    assert visitor.page.evaluate("document.documentElement.scrollWidth") <= 390
    first, second = (visitor.page.locator("#compare .fd-side").nth(place).bounding_box() for place in (0, 1))
    assert first is not None
    assert second is not None
    assert second["y"] > first["y"] + first["height"] - 1, "one below the other"
    for box in (
        visitor.page.locator("#go").bounding_box(),
        visitor.page.locator("#thumbs button").first.bounding_box(),
    ):
        assert box is not None
        assert box["height"] >= 40, "large enough for a thumb"
    visitor.context.close()
    assert not visitor.troubles


def test_it_is_used_by_keyboard_alone(visitor: Visitor) -> None:
    page = visitor.page
    page.locator("#thumbs button").nth(4).focus()
    page.keyboard.press("Enter")
    expect(page.locator("#thumbs button").nth(4)).to_have_attribute("aria-pressed", "true")
    page.locator("#go").focus()
    page.keyboard.press("Space")
    page.locator("#verdict .done").wait_for()


def test_two_visitors_do_not_see_each_other(browser: Browser, address: str) -> None:
    one, two = Visitor(browser, address), Visitor(browser, address)
    one.page.locator("#thumbs button").nth(0).click()
    two.page.locator("#thumbs button").nth(2).click()
    expect(one.page.locator("#compare")).to_contain_text("says T-shirt/top")
    expect(two.page.locator("#compare")).to_contain_text("says Trouser")
    for visitor in (one, two):
        visitor.page.locator("#go").click()
    for visitor, name in ((one, "T-shirt/top"), (two, "Trouser")):
        visitor.page.locator("#verdict .done").wait_for()
        expect(visitor.page.locator("#compare .true .name").first).to_contain_text(name)
        visitor.context.close()
        assert not visitor.troubles
