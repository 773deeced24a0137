"""A killed run holds nothing up, and a living one is not run beside."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import dagster as dg
import pytest

from infra.workspace import Workspace
from models.errors import RunUnderWay
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
    dg.materialize([heavy], instance=instance)
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
        alive.extend(end_dead_runs(context.instance, workspace))
        with pytest.raises(RunUnderWay, match=context.run_id[:8]):
            run_chain(settings, context.instance)

    result = dg.materialize([busy], instance=homes_instance)
    assert result.success and alive == [result.run_id] and draft.exists()
