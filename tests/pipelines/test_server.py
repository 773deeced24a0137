"""An asset materializes from the UI: `onereward dev` on a free port, driven through the web server's GraphQL."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from assets.sources import ROOT
from infra.workspace import Workspace

pytestmark = pytest.mark.server
WAIT_S = 300

LOCATION = """{ repositoriesOrError { __typename ... on RepositoryConnection { nodes { name location { name } } } } }"""
LAUNCH = """
mutation($params: ExecutionParams!) {
  launchPipelineExecution(executionParams: $params) {
    __typename
    ... on LaunchRunSuccess { run { runId } }
    ... on PythonError { message }
    ... on RunConfigValidationInvalid { errors { message } }
  }
}
"""
RUN = """query($id: ID!) { runOrError(runId: $id) { ... on Run { status } } }"""
MATERIALIZATION = """
{ assetOrError(assetKey: {path: ["source_images"]}) { ... on Asset { assetMaterializations(limit: 1) {
  runId metadataEntries { label ... on TextMetadataEntry { text } ... on IntMetadataEntry { intValue } }
} } } }
"""


def ask(url: str, query: str, **variables: Any) -> dict[str, Any]:
    request = urllib.request.Request(
        f"{url}/graphql", json.dumps({"query": query, "variables": variables}).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["data"]


def until(url: str, done: Callable[[], Any]) -> Any:
    """What `done` returns once it is true; a server that is not up yet is waited for."""
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        try:
            if result := done():
                return result
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            pass
        time.sleep(1)
    raise AssertionError(f"{url} did not get there in {WAIT_S} s")


@pytest.fixture
def url(home: Path, toy: Callable[..., Path]) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    preset = toy(source_images={"n_scenes": 4, "crops_per_photo": 0})
    environment = {**os.environ, "ONEREWARD_HOME": str(home)}
    command = [sys.executable, "-m", "pipelines.cli", "dev", "--preset", str(preset), "--port", str(port)]
    log = (home.parent / "dev.log").open("w")
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=10)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        log.close()


def test_an_asset_materializes_from_the_ui(url: str, home: Path) -> None:
    nodes = until(url, lambda: ask(url, LOCATION)["repositoriesOrError"].get("nodes"))
    selector = {
        "repositoryName": nodes[0]["name"],
        "repositoryLocationName": nodes[0]["location"]["name"],
        "pipelineName": "__ASSET_JOB",
        "assetSelection": [{"path": ["source_images"]}],
        "assetCheckSelection": [],
    }
    launched = ask(url, LAUNCH, params={"selector": selector, "runConfigData": {}})["launchPipelineExecution"]
    assert launched["__typename"] == "LaunchRunSuccess", launched
    run_id = launched["run"]["runId"]
    ended = ("SUCCESS", "FAILURE", "CANCELED")
    status = until(
        url, lambda: (ask(url, RUN, id=run_id)["runOrError"]["status"] in ended) and ask(url, RUN, id=run_id)["runOrError"]["status"]
    )
    assert status == "SUCCESS"
    made = ask(url, MATERIALIZATION)["assetOrError"]["assetMaterializations"][0]
    shown = {entry["label"]: entry.get("text") or entry.get("intValue") for entry in made["metadataEntries"]}
    assert made["runId"] == run_id
    assert shown["sources"] == 4
    assert Workspace.from_env(home).store.version(shown["digest"]).ref.name == "source_images"
