"""`onereward dev` on a free port, driven as Dagster's UI drives it: the same GraphQL requests with the same variables."""

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
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from assets.sources import ROOT

UP_S, RUN_S = 300, 600  # generous: seconds on an idle core, minutes beside other work
ENDED = ("SUCCESS", "FAILURE", "CANCELED")
ASSET_JOB = "__ASSET_JOB"  # the job that the UI launches assets in, first of every asset's `jobNames`

LOCATION = "{ repositoriesOrError { ... on RepositoryConnection { nodes { name location { name } } } } }"
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
BACKFILL = """
mutation($params: LaunchBackfillParams!) {
  launchPartitionBackfill(backfillParams: $params) {
    __typename
    ... on LaunchBackfillSuccess { backfillId }
    ... on PythonError { message }
  }
}
"""
RUN = """
query($id: ID!) { runOrError(runId: $id) { __typename ... on Run { status
  eventConnection(limit: 1000) { events { __typename ... on ErrorEvent { error { message } } } } } } }
"""
BACKFILL_RUNS = """
query($id: String!) { partitionBackfillOrError(backfillId: $id) { __typename ... on PartitionBackfill {
  status error { message } runs(limit: 10) { id } } } }
"""


@dataclass(frozen=True)
class Server:
    """A running `onereward dev`."""

    url: str
    home: Path
    log: Path
    process: subprocess.Popen[bytes]

    def ask(self, query: str, **variables: Any) -> dict[str, Any]:
        """The `data` of an answer. Raises AssertionError for a query that GraphQL refuses."""
        body = json.dumps({"query": query, "variables": variables}).encode()
        request = urllib.request.Request(f"{self.url}/graphql", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            said = json.load(answer)
        assert "errors" not in said, said["errors"]
        return said["data"]

    def until(self, what: str, done: Callable[[], Any], seconds: float) -> Any:
        """What `done` returns once it is true."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            assert self.process.poll() is None, f"the server ended:\n{self.log.read_text()[-4000:]}"
            if result := done():
                return result
            time.sleep(0.5)
        raise AssertionError(f"{what}: not in {seconds} s\n{self.log.read_text()[-4000:]}")

    def wait_for_definitions(self) -> dict[str, str]:
        """Selector of the code location, once the server answers and has loaded it."""

        def loaded() -> list[dict[str, Any]]:
            try:
                return self.ask(LOCATION)["repositoriesOrError"].get("nodes", [])
            except (urllib.error.URLError, ConnectionError):  # nothing listens yet
                return []

        node = self.until("the code location", loaded, UP_S)[0]
        return {"repositoryName": node["name"], "repositoryLocationName": node["location"]["name"]}

    def launch(self, job: str, assets: list[str], checks: list[str], tags: dict[str, str] | None = None) -> str:
        """Launch assets of a job in one run with the checks named `gate` of some of them; the run's id."""
        selector = {
            **self.wait_for_definitions(),
            "pipelineName": job,
            "assetSelection": [{"path": [name]} for name in assets],
            "assetCheckSelection": [{"assetKey": {"path": [name]}, "name": "gate"} for name in checks],
        }
        tagged = [{"key": key, "value": value} for key, value in (tags or {}).items()]
        params = {"mode": "default", "executionMetadata": {"tags": tagged}, "runConfigData": "{}", "selector": selector}
        launched = self.ask(LAUNCH, params=params)["launchPipelineExecution"]
        assert launched["__typename"] == "LaunchRunSuccess", launched
        return launched["run"]["runId"]

    def backfill(self, asset: str, partitions: list[str]) -> str:
        """Launch several partitions of an asset: the daemon starts the run. The run's id."""
        params = {"tags": [], "assetSelection": [{"path": [asset]}], "partitionNames": partitions, "fromFailure": False}
        launched = self.ask(BACKFILL, params=params)["launchPartitionBackfill"]
        assert launched["__typename"] == "LaunchBackfillSuccess", launched

        def started() -> list[dict[str, Any]]:
            backfill = self.ask(BACKFILL_RUNS, id=launched["backfillId"])["partitionBackfillOrError"]
            assert backfill["error"] is None, backfill
            return backfill["runs"]

        runs = self.until(f"the backfill of {asset}", started, UP_S)
        assert len(runs) == 1, "the policy's partitions go into one run"
        return runs[0]["id"]

    def end(self, run_id: str) -> None:
        """Wait for a run. Raises AssertionError with the errors in its log unless it succeeded."""

        def ended() -> dict[str, Any] | None:
            run = self.ask(RUN, id=run_id)["runOrError"]
            return run if run["status"] in ENDED else None

        run = self.until(f"run {run_id}", ended, RUN_S)
        errors = [event["error"]["message"] for event in run["eventConnection"]["events"] if event.get("error")]
        assert run["status"] == "SUCCESS", errors


@contextmanager
def serve(preset: Path, home: Path) -> Iterator[Server]:
    """`onereward dev` for the time of the block; its processes are gone afterwards."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    home.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "ONEREWARD_HOME": str(home), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pipelines.cli", "dev", "--preset", str(preset), "--port", str(port)]
    log = home / "dev.log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out, start_new_session=True)
    try:
        yield Server(f"http://127.0.0.1:{port}", home, log, process)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what it started and did not end
