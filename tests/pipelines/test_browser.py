"""The asset graph and an asset's picture, in a headless browser on the server whose chain was materialized through GraphQL."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from tests.pipelines.browser import browser_page, missing, open_asset_graph, open_picture
from tests.pipelines.server import Server
from tests.pipelines.test_definitions import CHAIN

pytestmark = [pytest.mark.server, pytest.mark.timeout(1800), pytest.mark.skipif(bool(missing()), reason=missing())]


def test_the_asset_graph_shows_every_asset(chain_server: Server, tmp_path: Path) -> None:
    with browser_page(1240, 500) as page:
        open_asset_graph(page, chain_server.url, CHAIN)
        page.screenshot(path=tmp_path / "graph.png")
    with Image.open(tmp_path / "graph.png") as shot:
        colours = shot.convert("RGB").getcolors(2**20)
    green = sum(count for count, (red, green, blue) in colours or () if green > red + 8 and green > blue + 4)
    assert green > 10_000, "the nodes of materialized assets are green"


def test_an_asset_shows_its_picture(chain_server: Server) -> None:
    with browser_page() as page:
        width, height = open_picture(page, chain_server.url, "candidates")
    assert width > 32 and height > 32
