"""A stage name means what it meant when the run began, whatever is promoted meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from assets.common import Stage, Work
from assets.settings import Settings
from infra.stores.base import ArtifactRef, ArtifactStore
from infra.workspace import Workspace
from models.config import OpConfig
from ops.folders import write_metrics

BY = {"approver": "kim", "reason": "test"}
PLAIN: dict[str, Any] = {"config": OpConfig, "group": "test", "kinds": {"python"}}


def _released(store: ArtifactStore, folder: Path, number: int) -> ArtifactRef:
    folder.mkdir()
    write_metrics(folder, {"number": number})
    return store.put("release", folder)


def _slow(work: Work) -> dict[str, Any]:
    """A stage that asks for no release, and during which somebody promotes the newest one."""
    work.store.assign(work.store.versions("release")[-1].ref, "production", **BY)
    write_metrics(work.out, {})
    return {}


def _asks(work: Work) -> dict[str, Any]:
    """What production is to this run."""
    ref = work.pin("production")
    metrics = {"production": ref.digest if ref else "none"}
    write_metrics(work.out, metrics)
    return metrics


SLOW = Stage(name="slow", work=_slow, parents=(), **PLAIN)
ASKS = Stage(name="asks", work=_asks, parents=("slow",), depends=lambda work: {"run": work.run_id}, **PLAIN)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ArtifactStore:
    monkeypatch.setenv("ONEREWARD_HOME", str(tmp_path / "home"))
    return Workspace.from_env().store


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    with dg.instance_for_test(temp_dir=str(tmp_path)) as made:
        yield made


def production_in(instance: dg.DagsterInstance, selection: dg.AssetSelection) -> str:
    """What the stage `asks` took for production in a run of those assets."""
    settings = Settings(preset="test", flux="none", judge="none", threads=1)
    result = dg.materialize([stage.build(settings) for stage in (SLOW, ASKS)], instance=instance, selection=selection)
    return result.asset_materializations_for_node("asks")[0].metadata["production"].value


@pytest.mark.parametrize("first", [True, False])
def test_production_that_moves_during_a_run_moves_for_the_next(
    store: ArtifactStore, instance: dg.DagsterInstance, tmp_path: Path, first: bool
) -> None:
    old = _released(store, tmp_path / "old", 1)
    if not first:
        store.assign(old, "production", **BY)
    new = _released(store, tmp_path / "new", 2)
    assert production_in(instance, dg.AssetSelection.all()) == ("none" if first else old.digest)
    assert store.stage("release", "production") == new
    assert production_in(instance, dg.AssetSelection.assets(dg.AssetKey("asks"))) == new.digest  # one asset alone, as from the UI
