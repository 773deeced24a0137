"""Dagster's UI in a headless Chromium.

    python -m tests.pipelines.browser http://127.0.0.1:3000 docs/asset_graph.png    # beside a running `onereward dev`

takes the picture of the asset graph in the README.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Page

WAIT_MS = 120_000
SETTLE_MS = 3_000  # while the graph glides to its new size
# The UI keeps its settings in the browser: no welcome dialog, the chain from left to right.
SETTINGS = "localStorage.setItem('communityNux', 'true'); localStorage.setItem('asset-graph-direction', '\"horizontal\"');"


def missing() -> str:
    """What a headless browser needs and this machine lacks, with its remedy; empty when nothing."""
    try:
        import playwright  # noqa: F401
    except ImportError:
        return 'playwright is not installed: pip install -e ".[browser]" "torch==2.13.*"'
    return "" if shutil.which("chromium") else "there is no chromium: apt-get install chromium"


@contextmanager
def browser_page(width: int = 1600, height: int = 1000, scale: float = 1) -> Iterator[Page]:
    """A page of a headless Chromium, `width` by `height` CSS pixels of `scale` screen pixels each."""
    from playwright.sync_api import sync_playwright

    # Containers have no user namespaces and little shared memory; nothing leaves this machine.
    arguments = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-background-networking"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=arguments)
        page = browser.new_page(viewport={"width": width, "height": height}, device_scale_factor=scale)
        page.set_default_timeout(WAIT_MS)
        page.add_init_script(SETTINGS)
        yield page
        browser.close()


def open_asset_graph(page: Page, url: str, assets: list[str]) -> None:
    """The global asset graph with every group expanded and the menus put away, once all assets are drawn."""
    page.goto(f"{url}/asset-groups")
    page.get_by_text("Hide navigation").click()
    page.get_by_role("img", name="panel_show_right").click()  # puts the list of groups away
    page.keyboard.press("Alt+KeyE")  # expands all groups
    for name in assets:
        page.locator("svg").get_by_text(name, exact=True).first.wait_for()
    page.add_style_tag(content="[class*=zoomSliderContainer] { visibility: hidden }")  # it covers the end of the chain
    page.wait_for_timeout(SETTLE_MS)


def open_picture(page: Page, url: str, asset: str) -> tuple[int, int]:
    """Open the first picture in the metadata of an asset's latest materialization; its width and height once it is drawn."""
    page.goto(f"{url}/assets/{asset}")
    page.locator("tr", has_text="picture ").get_by_text("[Show Markdown]").first.click()
    picture = page.locator("img[src^='data:image/']")
    picture.wait_for()
    width, height = picture.evaluate("async image => { await image.decode(); return [image.naturalWidth, image.naturalHeight] }")
    return width, height


def main() -> None:
    from assets.chain import STAGES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    with browser_page(1240, 500, scale=2) as page:
        open_asset_graph(page, arguments.url, [stage.name for stage in STAGES])
        page.screenshot(path=arguments.out)


if __name__ == "__main__":
    main()
