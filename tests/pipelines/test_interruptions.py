"""Ctrl-C and a full disk in every stage, through the chain: store, stages, labels and work folders are as they were before."""

from __future__ import annotations

import errno
import shutil
import signal
import sqlite3
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from assets.chain import POLICY, STAGES
from assets.common import Stage, Work
from assets.refs import materialised
from assets.settings import Settings
from infra.progress import Bar, Progress
from infra.stores.dvc import DvcStore
from infra.workspace import HOME_VARIABLE, Workspace
from ops.policy_config import TrainPolicyConfig
from pipelines.chain_run import INTERRUPTED, _failure
from pipelines.config import load_settings
from tests.pipelines.conftest import Finished

pytestmark = pytest.mark.chain
ANOTHER_TITLE = {"title": "Another title"}  # else production stands and the release stage has nothing to do


@dataclass(frozen=True)
class Chain:
    """A finished toy chain whose stages can be run one by one."""

    home: Path
    settings: Settings
    instance: dg.DagsterInstance

    @property
    def store(self) -> DvcStore:
        store = Workspace(self.home).store
        assert isinstance(store, DvcStore)
        return store

    def state(self) -> dict[str, Any]:
        """Everything a run that comes to nothing must leave alone. Work folders outlive it: a policy resumes from them."""
        store = self.store
        with sqlite3.connect(self.home / "labels.db") as labels:
            rows = labels.execute("SELECT * FROM preferences ORDER BY id").fetchall()
        status = subprocess.run(["git", "status", "--porcelain"], cwd=store.root, capture_output=True, text=True, check=True)
        return {
            "versions": store.versions(),
            "moves": store.moves("release"),
            "labels": rows,
            "artifacts": {path.name: sorted(each.name for each in path.iterdir()) for path in (store.root / "artifacts").glob("*/")},
            "cache": sorted(path for path in (store.root / ".dvc" / "cache").rglob("*") if path.is_file()),
            "registry": status.stdout,
            "pending": (store.root / ".pending").exists(),
            "drafts": list((self.home / "tmp").iterdir()),
            "materialised": {stage.name: materialised(self.instance, stage.name) for stage in STAGES},
        }

    def run(self, stage: Stage, work: Any = None, **options: Any) -> tuple[str, list[str]]:
        """Make one stage, by its own op or by `work`: "made", "interrupted" or its error's message, and what it said."""
        stages = {each.name: replace(each, work=work) if work and each is stage else each for each in STAGES}
        settings = self.settings.model_copy(update={"stages": {**self.settings.stages, "release": ANOTHER_TITLE}})
        assets = [each.build(settings) for each in stages.values()]
        job = dg.Definitions(assets=assets).resolve_implicit_global_asset_job_def()
        run_id = str(uuid.uuid4())
        try:
            result = job.execute_in_process(
                instance=self.instance, run_id=run_id, asset_selection=[dg.AssetKey(stage.name)], raise_on_error=False, **options
            )
            ending = "made" if result.success else _failure(result.all_events)[1]
        except (KeyboardInterrupt, dg.DagsterExecutionInterruptedError):
            ending = INTERRUPTED
        return ending, [entry.user_message for entry in self.instance.all_logs(run_id)]


@pytest.fixture(scope="module")
def chain(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
    with opened(finished, tmp_path_factory.mktemp("chain")) as chain:
        yield chain


@contextmanager
def opened(finished: Finished, folder: Path) -> Iterator[Chain]:
    """A copy of the finished home, in use."""
    home = finished.copy(folder / "home")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv(HOME_VARIABLE, str(home))
        patched.setenv("DAGSTER_HOME", str(Workspace(home).dagster_home))
        with dg.DagsterInstance.get() as instance:
            yield Chain(home, load_settings(str(finished.preset)), instance)


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stage is made anew at unchanged settings: other libraries would have made the versions that are there."""
    monkeypatch.setattr("assets.common.LIBRARIES", ())


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_ctrl_c_in_the_middle_of_any_stage(chain: Chain, anew: None, monkeypatch: pytest.MonkeyPatch, stage: Stage) -> None:
    before = chain.state()
    at: list[str] = []

    def interrupt(self: Any, *arguments: Any, **figures: Any) -> None:
        at.append(getattr(self, "label", "") or str(arguments[0]))
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Bar, "advance", interrupt)
    monkeypatch.setattr(Progress, "say", interrupt)
    ending, _ = chain.run(stage)
    assert ending == INTERRUPTED and len(set(at)) == 1, at  # threads that hash files side by side may each get as far as one step more
    assert not at[0].startswith(("made", "reused", "nothing to do")), at  # the op was at work
    assert chain.state() == before


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_a_full_disk_when_any_stage_is_stored(chain: Chain, monkeypatch: pytest.MonkeyPatch, stage: Stage) -> None:
    """The op's result is the one that is there, so that only storing it takes time."""
    before = chain.state()

    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    def again(work: Work) -> dict[str, Any]:
        name = f"{stage.name}-{work.mode}" if work.mode else stage.name
        shutil.copytree(work.store.get(work.store.versions(name)[-1].ref), work.out, copy_function=shutil.copyfile, dirs_exist_ok=True)
        (work.out / "another").write_text("version")
        return {}

    monkeypatch.setattr(DvcStore, "_commit", full)  # the cache has taken the bytes, the record is not written yet
    ending, _ = chain.run(stage, again)
    assert ending.startswith(f"{stage.name}: No space left in "), ending
    assert chain.state() == before


def test_a_policy_interrupted_after_a_checkpoint_goes_on_from_there(
    finished: Finished, anew: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it ends with equals, bit by bit, what the uninterrupted run at the same settings made."""
    static = {"partition_key": "static"}
    with opened(finished, tmp_path) as chain:
        uninterrupted = materialised(chain.instance, POLICY.name)["policy-static"]
        every = TrainPolicyConfig(**chain.settings.stages[POLICY.name]).checkpoint_every
        advance = Bar.advance

        def interrupt(bar: Bar, count: int = 1, **figures: float) -> None:
            advance(bar, count, **figures)
            if bar.label == "policy static" and bar.count == every + 1:
                signal.raise_signal(signal.SIGINT)

        with monkeypatch.context() as patched:
            patched.setattr(Bar, "advance", interrupt)
            assert chain.run(POLICY, **static)[0] == INTERRUPTED
        assert [path.name for path in (chain.home / "work").rglob("step-*")] == [f"step-{every:06d}"]

        ending, said = chain.run(POLICY, **static)
        assert ending == "made" and f"policy static: resumed after iteration {every}" in said
        resumed = chain.store.versions("policy-static")[-1]
        assert resumed.number == 2 and resumed.ref.digest == uninterrupted.digest
        assert list((chain.home / "work").rglob("step-*")) == []
