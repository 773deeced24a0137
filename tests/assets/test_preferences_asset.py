"""Scripted labels reach the database when their version is stored, and not before."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from assets import preferences as preferences_asset
from assets.common import Stage, Work
from assets.preferences import preferences
from assets.refs import materialised
from assets.settings import Settings
from infra.labels import LabelStore
from infra.stores.dvc import DvcStore
from infra.workspace import Workspace
from models.config import OpConfig
from models.errors import DiskFull
from models.records import Preference, read_rows
from ops.folders import write_metrics
from ops.label import label_scripted
from tests.ops.test_label import made  # noqa: F401 (a fixture)

Run = Callable[[], tuple[dg.ExecuteInProcessResult, dg.DagsterInstance]]


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    monkeypatch.setenv("ONEREWARD_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("ONEREWARD_LABELS_URL", raising=False)
    return Workspace.from_env()


@pytest.fixture
def run(workspace: Workspace, made: Path, tmp_path: Path) -> Iterator[Run]:  # noqa: F811
    """`run()` materialises `preferences` on stored data and candidates; the result."""

    def parent(name: str, folder: str, *parents: str) -> Stage:
        def copied(work: Work) -> dict[str, Any]:
            shutil.copytree(made / folder, work.out, dirs_exist_ok=True)
            write_metrics(work.out, {})
            return {}

        return Stage(name=name, work=copied, config=OpConfig, parents=parents, group="test", kinds=set())

    stages = (parent("curated_dataset", "curated"), parent("candidates", "candidates", "curated_dataset"), preferences)
    with dg.instance_for_test(temp_dir=str(tmp_path)) as instance:

        def execute() -> tuple[dg.ExecuteInProcessResult, dg.DagsterInstance]:
            settings = Settings(preset="test", flux="none", judge="none", threads=1)
            result = dg.materialize([stage.build(settings) for stage in stages], instance=instance, raise_on_error=False)
            return result, instance

        yield execute


def rows(workspace: Workspace, instance: dg.DagsterInstance) -> list[Preference]:
    """The database's labels of the candidates that are there."""
    return LabelStore(workspace.labels_url).rows(materialised(instance, "candidates")["candidates"].digest)


def test_a_version_that_is_not_stored_leaves_no_labels(workspace: Workspace, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    put = DvcStore.put

    def full(store: DvcStore, name: str, folder: Path, **record: Any) -> Any:
        if name == "preferences":
            assert (folder / "preferences.jsonl").stat().st_size  # its op has done its work
            raise DiskFull("No space left.", "Free some.")
        return put(store, name, folder, **record)

    with monkeypatch.context() as patched:
        patched.setattr(DvcStore, "put", full)
        result, instance = run()
        assert not result.success and rows(workspace, instance) == []

    result, instance = run()
    ref = materialised(instance, "preferences")["preferences"]
    stored = read_rows(workspace.store.get(ref) / "preferences.jsonl", Preference)
    assert result.success and stored and rows(workspace, instance) == stored


@pytest.mark.parametrize("lost", ["never written", "removed"])
def test_reusing_a_version_completes_the_database(workspace: Workspace, run: Run, monkeypatch: pytest.MonkeyPatch, lost: str) -> None:
    """An earlier run may have ended between storing the version and writing its labels."""
    if lost == "removed":
        assert run()[0].success
        (workspace.home / "labels.db").unlink()
    else:
        with monkeypatch.context() as patched:

            def full(*arguments: Any, **options: Any) -> int:
                raise DiskFull("No space left.", "Free some.")

            patched.setattr(LabelStore, "add", full)
            result, instance = run()
            assert not result.success and materialised(instance, "preferences") == {}
    before = workspace.store.versions()
    result, instance = run()
    ref = materialised(instance, "preferences")["preferences"]
    assert result.success and workspace.store.versions() == before
    assert rows(workspace, instance) == read_rows(workspace.store.get(ref) / "preferences.jsonl", Preference)


def test_labels_that_arrive_while_it_works_are_not_stored_under_the_key_of_before(
    workspace: Workspace, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run()[0].success
    (stored,) = workspace.store.versions("preferences")
    row = read_rows(workspace.store.get(stored.ref) / "preferences.jsonl", Preference)[0]
    digest = next(parent.digest for parent in stored.parents if parent.name == "candidates")

    def answer(annotator: str) -> None:
        LabelStore(workspace.labels_url).add([row.model_copy(update={"annotator": annotator, "source": "import"})], digest)

    def interrupted(*arguments: Any) -> dict[str, Any]:
        answer("kim")
        return label_scripted(*arguments)

    answer("lee")
    with monkeypatch.context() as patched:
        patched.setattr(preferences_asset, "label_scripted", interrupted)
        result, _ = run()
    assert not result.success and "changed meanwhile" in str(result.failure_data_for_node("preferences"))
    assert workspace.store.versions("preferences") == [stored]

    assert run()[0].success
    rows_now = read_rows(workspace.store.get(workspace.store.versions("preferences")[-1].ref) / "preferences.jsonl", Preference)
    assert {each.annotator for each in rows_now if each.source == "import"} == {"kim", "lee"}
