"""A killed run holds nothing up, and a living one is not run beside."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import dagster as dg
import pytest

from assets.refs import HOST_TAG
from infra.workspace import Workspace
from models.errors import MissingWeights, RunUnderWay
from pipelines import chain_run, dead_runs
from pipelines.chain_run import run_chain
from pipelines.config import load_settings
from pipelines.dead_runs import end_dead_runs

KILLED = """
import os, signal, sys
import dagster as dg

@dg.asset(pool="gpu")
def heavy():
    os.kill(os.getpid(), signal.SIGKILL)

with dg.DagsterInstance.from_config(sys.argv[1]) as instance:
    dg.materialize([heavy], instance=instance, tags=dict(zip(sys.argv[2::2], sys.argv[3::2])))
"""


@pytest.fixture
def homes_instance(home: Path) -> Iterator[dg.DagsterInstance]:
    """Dagster as a home configures it, with the pool and its one slot."""
    with dg.DagsterInstance.from_config(str(Workspace.from_env(home).dagster_home)) as made:
        yield made


def test_a_killed_run_lets_go_of_the_pool_and_its_draft_goes(homes_instance: dg.DagsterInstance, home: Path) -> None:
    workspace = Workspace.from_env(home)
    killed = subprocess.run([sys.executable, "-c", KILLED, homes_instance.root_directory], capture_output=True)
    assert killed.returncode == -9
    (run,) = homes_instance.get_runs()
    slots = homes_instance.event_log_storage
    assert run.status == dg.DagsterRunStatus.STARTED and slots.get_concurrency_info("gpu").claimed_slots

    (workspace.tmp / "draft").mkdir()

    assert end_dead_runs(homes_instance, workspace) == []
    (run,) = homes_instance.get_runs()
    assert run.status == dg.DagsterRunStatus.FAILURE and not slots.get_concurrency_info("gpu").claimed_slots
    assert not list(workspace.tmp.iterdir())
    assert dg.materialize([dg.asset(lambda: None, name="heavy", pool="gpu")], instance=homes_instance).success


def test_no_run_is_started_beside_a_living_one(homes_instance: dg.DagsterInstance, home: Path, toy: Callable[..., Path]) -> None:
    settings, workspace = load_settings(str(toy())), Workspace.from_env(home)
    draft = workspace.tmp / "draft"
    draft.mkdir()
    alive: list[str] = []

    @dg.asset
    def busy(context: dg.AssetExecutionContext) -> None:
        alive.extend(run.run_id for run in end_dead_runs(context.instance, workspace))
        with pytest.raises(RunUnderWay, match=context.run_id[:8]):
            run_chain(settings, context.instance)

    result = dg.materialize([busy], instance=homes_instance)
    assert result.success and alive == [result.run_id] and draft.exists()


def test_a_run_of_another_machine_is_left_alone(homes_instance: dg.DagsterInstance, home: Path, toy: Callable[..., Path]) -> None:
    """Its process has no number here, or that of some other process."""
    workspace = Workspace.from_env(home)
    subprocess.run([sys.executable, "-c", KILLED, homes_instance.root_directory, HOST_TAG, "elsewhere"], capture_output=True)
    draft = workspace.tmp / "draft"
    draft.mkdir()
    (alive,) = end_dead_runs(homes_instance, workspace)
    assert alive.status == dg.DagsterRunStatus.STARTED and draft.exists()
    with pytest.raises(RunUnderWay, match=f"{alive.run_id[:8]} is under way on elsewhere"):
        run_chain(load_settings(str(toy())), homes_instance)


def test_a_launched_run_has_time_to_announce_its_process(
    homes_instance: dg.DagsterInstance, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = Workspace.from_env(home)
    job = dg.materialize([dg.asset(lambda: None, name="light")], instance=homes_instance).job_def
    launched = homes_instance.create_run_for_job(job, status=dg.DagsterRunStatus.STARTING)
    assert [run.run_id for run in end_dead_runs(homes_instance, workspace)] == [launched.run_id]
    monkeypatch.setattr(dead_runs, "START_TIMEOUT_S", 0)
    assert end_dead_runs(homes_instance, workspace) == []
    assert homes_instance.get_run_by_id(launched.run_id).status == dg.DagsterRunStatus.FAILURE


def test_of_two_runs_begun_at_once_the_second_is_refused(
    homes_instance: dg.DagsterInstance, home: Path, toy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first is still fetching the data, and Dagster knows of no run yet."""
    settings = load_settings(str(toy(models={"flux": "data/flux", "judge": "data/judge"})))
    refused: list[RunUnderWay] = []

    def fetch(root: Path) -> None:
        with pytest.raises(RunUnderWay, match="Another `onereward run`") as raised:
            run_chain(settings, homes_instance)
        refused.append(raised.value)
        raise MissingWeights("There is no network.", "Connect.")

    monkeypatch.setattr(chain_run, "ensure_data", fetch)
    for _ in range(2):  # the first has let go of the home, although it failed
        with pytest.raises(MissingWeights):
            run_chain(settings, homes_instance)
    assert len(refused) == 2 and not homes_instance.get_runs()
