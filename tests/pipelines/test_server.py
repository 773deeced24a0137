"""Every asset materializes from the UI: `onereward dev` at toy size, driven through the web server's GraphQL.

Then the asset graph and an asset's picture, in a headless browser. One file, so that one process starts one server.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from assets.chain import POLICY, STAGES
from infra.workspace import Workspace
from pipelines.jobs import ALL_MODES
from tests.pipelines.browser import WAIT_MS, browser_page, missing, open_asset_graph, open_picture
from tests.pipelines.server import ASSET_JOB, Server, serve
from tests.pipelines.test_definitions import CHAIN, GATED
from tests.pipelines.toy import write_toy

pytestmark = [pytest.mark.server, pytest.mark.timeout(1800)]
PICTURED = [name for name in CHAIN if name != "engine"]
MODES = {stage.name: stage.modes for stage in STAGES}

ASSETS = """
{ assetNodes { assetKey { path } partitionKeys
  latest: assetMaterializations(limit: 1) { ...Made }
  assetChecksOrError { ... on AssetChecks { checks { name blocking executionForLatestMaterialization { status } } } } } }
fragment Made on MaterializationEvent { runId partition metadataEntries { label
  ... on TextMetadataEntry { text } ... on MarkdownMetadataEntry { mdStr } ... on JsonMetadataEntry { jsonString } } }
"""
BY_PARTITION = """
query($asset: AssetKeyInput!, $partitions: [String!]) { assetNodeOrError(assetKey: $asset) { ... on AssetNode {
  latestMaterializationByPartition(partitions: $partitions) { runId partition metadataEntries { label
    ... on TextMetadataEntry { text } ... on MarkdownMetadataEntry { mdStr } } } } } }
"""
MADE_BY = "query($id: ID!) { runOrError(runId: $id) { ... on Run { assetMaterializations { assetKey { path } } } } }"


@pytest.fixture(scope="module")
def chain_server(tiny_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`onereward dev` at toy size with every asset materialized as the UI launches them: one alone, several at once, a backfill.

    A run is a process of its own, which imports everything anew: one for each asset would take minutes.
    """
    folder, place = tmp_path_factory.mktemp("server"), CHAIN.index(POLICY.name)
    with serve(write_toy(folder, tiny_weights), folder / "home") as server:
        above = [launch(server, CHAIN[:1]), launch(server, CHAIN[1:place])]
        for run_id in above:
            server.end(run_id)  # the daemon starts a backfill's run ahead of runs that wait in the queue
        for run_id in [server.backfill(POLICY.name, list(POLICY.modes)), launch(server, CHAIN[place + 1 : -1]), launch(server, CHAIN[-1:])]:
            server.end(run_id)
        yield server


def launch(server: Server, names: list[str]) -> str:
    return server.launch(ASSET_JOB, names, [name for name in names if name in GATED])


@pytest.fixture(scope="module")
def nodes(chain_server: Server) -> dict[str, dict[str, Any]]:
    """What the server says of every asset, by name."""
    return {node["assetKey"]["path"][-1]: node for node in chain_server.ask(ASSETS)["assetNodes"]}


def materializations(server: Server, node: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """The latest of an asset, one per partition, its metadata by label."""
    made = node["latest"]
    if MODES[name]:
        asked = server.ask(BY_PARTITION, asset={"path": [name]}, partitions=list(MODES[name]))
        made = asked["assetNodeOrError"]["latestMaterializationByPartition"]
        assert [event["partition"] for event in made] == list(MODES[name])
    return [{entry["label"]: entry.get("text") or entry.get("mdStr") for entry in event["metadataEntries"]} for event in made]


def test_the_ui_shows_the_whole_chain(nodes: dict[str, dict[str, Any]]) -> None:
    assert set(nodes) == set(CHAIN)
    assert nodes["policy"]["partitionKeys"] == list(MODES["policy"])


@pytest.mark.parametrize("name", CHAIN)
def test_the_latest_materialization_is_a_stored_version(chain_server: Server, nodes: dict[str, dict[str, Any]], name: str) -> None:
    store = Workspace.from_env(chain_server.home).store
    for made, mode in zip(materializations(chain_server, nodes[name], name), MODES[name] or [None], strict=True):
        ref = store.version(made["digest"]).ref
        assert ref.name == (f"{name}-{mode}" if mode else name)
        assert any(store.get(ref).iterdir())


@pytest.mark.parametrize("name", CHAIN)
def test_gates_ran_and_passed(nodes: dict[str, dict[str, Any]], name: str) -> None:
    checks = nodes[name]["assetChecksOrError"]["checks"]
    assert [check["name"] for check in checks] == (["gate"] if name in GATED else [])
    for check in checks:
        assert check["blocking"] and check["executionForLatestMaterialization"]["status"] == "SUCCEEDED"


@pytest.mark.parametrize("name", PICTURED)
def test_pictures_and_plots_are_in_the_metadata(chain_server: Server, nodes: dict[str, dict[str, Any]], name: str) -> None:
    for made in materializations(chain_server, nodes[name], name):
        pictures = {label: text for label, text in made.items() if label.startswith("picture ")}
        assert pictures and all("](data:image/" in (text or "") and ";base64," in (text or "") for text in pictures.values())


def test_the_release_is_in_production(chain_server: Server, nodes: dict[str, dict[str, Any]]) -> None:
    production = Workspace.from_env(chain_server.home).store.stage("release", "production")
    assert production is not None
    assert materializations(chain_server, nodes["release"], "release")[0]["digest"] == production.digest


def test_the_whole_chain_is_one_run_that_reuses_everything(chain_server: Server) -> None:
    store = Workspace.from_env(chain_server.home).store
    before = [version.ref for version in store.versions()]
    run_id = chain_server.launch("whole_chain", CHAIN, GATED, ALL_MODES)
    chain_server.end(run_id)
    made = {event["assetKey"]["path"][-1] for event in chain_server.ask(MADE_BY, id=run_id)["runOrError"]["assetMaterializations"]}
    assert made == set(CHAIN)
    assert [version.ref for version in store.versions()] == before


in_browser = pytest.mark.skipif(bool(missing()), reason=missing())
NODE_PX = 2_000  # of green at least, in the node of a materialized asset


def green(picture: bytes) -> int:
    """How many pixels of a PNG are green."""
    with Image.open(io.BytesIO(picture)) as shot:
        colours = shot.convert("RGB").getcolors(2**20) or ()
    return sum(count for count, (red, green, blue) in colours if green > red + 8 and green > blue + 4)


@in_browser
def test_the_asset_graph_shows_every_asset(chain_server: Server) -> None:
    """Every node is drawn, and turns green once the page has asked what became of its asset."""
    with browser_page(1240, 500) as page:
        open_asset_graph(page, chain_server.url, CHAIN)
        deadline = time.monotonic() + WAIT_MS / 1000
        while (shown := green(page.screenshot())) < NODE_PX * len(CHAIN):
            assert time.monotonic() < deadline, f"{shown} green pixels, too few for {len(CHAIN)} materialized assets"
            page.wait_for_timeout(1000)


@in_browser
def test_an_asset_shows_its_picture(chain_server: Server) -> None:
    with browser_page() as page:
        width, height = open_picture(page, chain_server.url, "candidates")
    assert width > 32 and height > 32
