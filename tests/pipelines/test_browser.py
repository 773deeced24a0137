"""The asset graph and an asset's picture, in a headless browser on the server whose chain was materialized through GraphQL."""

from __future__ import annotations

import io
import time

import pytest
from PIL import Image

from tests.pipelines.browser import WAIT_MS, browser_page, missing, open_asset_graph, open_picture
from tests.pipelines.server import Server
from tests.pipelines.test_definitions import CHAIN

pytestmark = [pytest.mark.server, pytest.mark.timeout(1800), pytest.mark.skipif(bool(missing()), reason=missing())]


NODE_PX = 2_000  # of green at least, in the node of a materialized asset


def green(picture: bytes) -> int:
    """How many pixels of a PNG are green."""
    with Image.open(io.BytesIO(picture)) as shot:
        colours = shot.convert("RGB").getcolors(2**20) or ()
    return sum(count for count, (red, green, blue) in colours if green > red + 8 and green > blue + 4)


def test_the_asset_graph_shows_every_asset(chain_server: Server) -> None:
    """Every node is drawn, and turns green once the page has asked what became of its asset."""
    with browser_page(1240, 500) as page:
        open_asset_graph(page, chain_server.url, CHAIN)
        deadline = time.monotonic() + WAIT_MS / 1000
        while (shown := green(page.screenshot())) < NODE_PX * len(CHAIN):
            assert time.monotonic() < deadline, f"{shown} green pixels, too few for {len(CHAIN)} materialized assets"
            page.wait_for_timeout(1000)


def test_an_asset_shows_its_picture(chain_server: Server) -> None:
    with browser_page() as page:
        width, height = open_picture(page, chain_server.url, "candidates")
    assert width > 32 and height > 32
