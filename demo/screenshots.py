"""The pictures of the demo that the README shows, taken of the running page:

    python -m fdml.demo.screenshots docs/images

It needs playwright (in the dev extra) and a Chromium of the system.
"""

import argparse
import io
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from fdml.demo import exhibit
from fdml.demo.app import launch
from fdml.demo.browser import ARGUMENTS, BROWSER
from fdml.files import write_whole

WAIT = 60_000
_COLOURS = 200


def _page(browser: Browser, address: str, width: int, height: int, scheme: str) -> Page:
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme, device_scale_factor=1.5)  # pyright: ignore[reportArgumentType]
    page.set_default_timeout(WAIT)
    page.goto(address)
    page.locator("#compare .fd-side").first.wait_for()
    return page


def _attacked(page: Page) -> None:
    page.locator("#go").click()
    page.locator("#details .fd-distances").wait_for()
    page.wait_for_timeout(300)
    page.evaluate("window.scrollTo(0, 0)")


def _saved(page: Page, path: Path) -> None:
    """Few colours, so that the repository and the README stay light."""
    image = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    buffer = io.BytesIO()
    image.quantize(_COLOURS, dither=Image.Dither.NONE).save(buffer, format="png", optimize=True)
    write_whole(path, buffer.getvalue())


def take(address: str, browser: Browser, out: Path) -> None:
    """Writes ``demo-attack.png``, ``demo-attack-dark.png``, ``demo-certify.png`` and ``demo-phone.png``."""
    for scheme, name in (("light", "demo-attack"), ("dark", "demo-attack-dark")):
        page = _page(browser, address, 1240, 1010, scheme)
        _attacked(page)
        _saved(page, out / f"{name}.png")
        page.close()
    page = _page(browser, address, 1240, 960, "light")
    page.get_by_role("tab", name="Certify").click()
    page.locator("#prove").click()
    page.locator("#halt-proof:enabled").wait_for()
    page.locator("#halt-proof:disabled").wait_for(timeout=2 * WAIT)
    page.wait_for_timeout(500)
    page.evaluate("window.scrollTo(0, 0)")
    _saved(page, out / "demo-certify.png")
    page.close()
    page = _page(browser, address, 390, 844, "light")
    _attacked(page)
    page.evaluate("document.querySelector('#verdict').scrollIntoView()")
    page.wait_for_timeout(300)
    _saved(page, out / "demo-phone.png")
    page.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    chosen = parser.parse_args()
    if BROWSER is None:
        raise SystemExit("no Chromium on this machine")
    served = launch(exhibit.shipped(), host="127.0.0.1", port=0)
    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=BROWSER, args=ARGUMENTS)
        take(served, opened, chosen.out)
        opened.close()
