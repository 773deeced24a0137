"""One run of the whole chain in this process, and how it ended: promoted, unchanged, refused by a gate, or failed."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import dagster as dg
import filelock

from assets.chain import RELEASE
from assets.checks import EVIDENCE
from assets.refs import HOST, HOST_TAG, artifacts_of
from assets.settings import Settings
from assets.sources import ROOT
from infra.data import ensure_data, weights
from infra.stores.base import ArtifactRef
from infra.workspace import Workspace
from models.errors import GateRefused, RunUnderWay
from pipelines.dead_runs import end_dead_runs
from pipelines.definitions import definitions
from pipelines.jobs import ALL_MODES, whole_chain
from pipelines.terminal import quieten

ANOTHER = "Let it end, stop it, or name another home with --home."
INTERRUPTED = "stopped by Ctrl-C; finished stages are kept and the next run goes on from there"
INTERRUPTIONS = (KeyboardInterrupt.__name__, dg.DagsterExecutionInterruptedError.__name__)
Ending = Literal["promoted", "unchanged", "released", "refused", "failed", "interrupted"]


@dataclass(frozen=True)
class Outcome:
    """How a run ended. `message` names the gate that refused, or the error."""

    ending: Ending
    message: str
    run_id: str
    artifacts: dict[str, ArtifactRef]  # what the run made or reused, by name
    reused: list[str]
    seconds: dict[str, float]  # inside the op, by artifact
    gates: list[dict[str, Any]]
    gate_s: float

    @property
    def work_s(self) -> float:
        """Seconds inside ops and gates; the rest of a run is Dagster, versioning and imports."""
        return sum(self.seconds.values()) + self.gate_s


def run_chain(settings: Settings, instance: dg.DagsterInstance) -> Outcome:
    """Take images through every stage. What a stage raises ends in `failed`, Ctrl-C in `interrupted`.

    Raises RunUnderWay where another run of this home is alive: it would have to be waited for at every heavy stage. Raises what `weights`
    raises of the checkpoints that the evaluation alone takes: hours later would be late.
    """
    quieten()
    for source in filter(None, (settings.clip, settings.second_judge)):
        weights(source, ROOT)
    workspace = Workspace.from_env()
    with _home_to_itself(workspace):
        if any(source.startswith("data/") for source in (settings.flux, settings.judge)):
            ensure_data(ROOT)  # may take minutes, in which a run may begin in `onereward dev`
        if alive := end_dead_runs(instance, workspace):
            run, host = alive[0].run_id[:8], alive[0].tags.get(HOST_TAG, HOST)
            gone = "" if host == HOST else f" If {host} is gone, cancel the run in `onereward dev`."
            raise RunUnderWay(f"Run {run} is under way on {host} in this home.", f"{ANOTHER}{gone}")
        return _run(settings, instance)


@contextmanager
def _home_to_itself(workspace: Workspace) -> Iterator[None]:
    """Two `onereward run` begun at once would both find no other run. Raises RunUnderWay for the second."""
    lock = filelock.FileLock(workspace.home / "run.lock", timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise RunUnderWay("Another `onereward run` is under way in this home.", ANOTHER) from error
    try:
        yield
    finally:
        lock.release()


def _run(settings: Settings, instance: dg.DagsterInstance) -> Outcome:
    job = definitions(settings).resolve_job_def(whole_chain.name)
    run_id = str(uuid.uuid4())
    failure: tuple[Ending, str] | None = None
    try:
        result = job.execute_in_process(
            instance=instance,
            run_id=run_id,
            tags={**ALL_MODES, HOST_TAG: HOST},
            run_config={"loggers": {"console": {}}},
            raise_on_error=False,
        )
        failure = None if result.success else _failure(result.all_events)
    except (KeyboardInterrupt, dg.DagsterExecutionInterruptedError):
        failure = "interrupted", INTERRUPTED
    materializations, checks = _recorded(instance, run_id)
    made = [event for event in materializations if "reused" in event]
    ending, message = failure or _released([event for event in materializations if event["asset"] == RELEASE.name][-1])
    return Outcome(
        ending=ending,
        message=message,
        run_id=run_id,
        artifacts={name: ref for event in materializations for name, ref in event["artifacts"].items()},
        reused=[event["name"] for event in made if event["reused"]],
        seconds={event["name"]: event["seconds"] for event in made},
        gates=[row for check in checks for row in check[EVIDENCE]],
        gate_s=sum(check["seconds"] for check in checks),
    )


def _recorded(instance: dg.DagsterInstance, run_id: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Metadata of the run's materializations and checks as plain values, in order."""
    materializations, checks = [], []
    for entry in instance.all_logs(run_id):
        if event := entry.asset_materialization:
            materializations.append({"asset": event.asset_key.path[-1], **_plain(event.metadata), "artifacts": artifacts_of(event)})
        elif entry.dagster_event and entry.dagster_event.event_type == dg.DagsterEventType.ASSET_CHECK_EVALUATION:
            checks.append(_plain(entry.dagster_event.asset_check_evaluation_data.metadata))
    return materializations, checks


def _plain(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.value for name, value in metadata.items()}


def _released(release: dict[str, Any]) -> tuple[Ending, str]:
    return release["ending"], release["message"]


def _failure(events: Sequence[dg.DagsterEvent]) -> tuple[Ending, str]:
    """Why a run stopped: a gate (a blocking check, or a refusal inside a stage), Ctrl-C, or an error with its stage and message."""
    for event in events:
        if event.event_type == dg.DagsterEventType.ASSET_CHECK_EVALUATION and not event.asset_check_evaluation_data.passed:
            return "refused", f"{event.asset_check_evaluation_data.asset_key.path[-1]}: {event.asset_check_evaluation_data.description}"
    for event in events:
        if not event.is_step_failure:
            continue
        raised = list(_causes(event.step_failure_data.error))
        if any(error.cls_name in INTERRUPTIONS for error in raised):
            return "interrupted", INTERRUPTED
        for error in raised:
            name = error.cls_name or ""
            if not name.startswith("Dagster"):  # Dagster's own is the wrapping
                return ("refused" if name == GateRefused.__name__ else "failed"), f"{event.step_key}: {_one_line(name, error.message)}"
    return "failed", "the run ended without saying why; see the log in `onereward dev`"


def _one_line(name: str, message: str) -> str:
    """An error on one line: its first, which names the thing, and its last, which holds the remedy; between them a library's prose."""
    lines = [line.strip() for line in message.strip().split("\n") if line.strip()]
    if not lines:
        return name
    first = lines[0].split(f"{name}: ", 1)[-1]  # behind the class's name, with or without its module
    return first if len(lines) == 1 else f"{first} ... {lines[-1]}"


def _causes(error: Any) -> Iterator[Any]:
    while error is not None:
        yield error
        error = error.cause
