"""Where a run's things lie, and that Dagster accepts the configuration it is given."""

import os
from pathlib import Path

import dagster as dg
import pytest
from sqlalchemy import create_engine, text

from infra.workspace import HOME_VARIABLE, STORE_VARIABLE, Workspace
from models.errors import ConfigError


def test_the_home_is_named_by_argument_then_variable_then_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(HOME_VARIABLE, raising=False)
    assert Workspace.from_env().home == tmp_path / ".onereward"
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path / "elsewhere"))
    assert Workspace.from_env().home == tmp_path / "elsewhere"
    assert Workspace.from_env(tmp_path / "named").home == tmp_path / "named"
    assert list(tmp_path.iterdir()) == []  # nothing is made before it is used


def test_a_file_in_place_of_the_home_is_told(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("")
    with pytest.raises(ConfigError, match="not a folder"):
        Workspace.from_env(tmp_path / "home")


def test_an_unknown_store_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STORE_VARIABLE, "floppy")
    with pytest.raises(ConfigError, match="floppy"):
        Workspace.from_env(tmp_path).store.versions()


def test_everything_lies_under_the_home(tmp_path: Path) -> None:
    workspace = Workspace.from_env(tmp_path / "home")
    folder = workspace.scratch("abc")
    (folder / "state").write_text("half done")
    assert (Workspace.from_env(tmp_path / "home").scratch("abc") / "state").read_text() == "half done"
    ref = workspace.store.put("onnx", folder)
    assert Workspace.from_env(tmp_path / "home").store.version(ref.digest).ref == ref
    with create_engine(workspace.labels_url).connect() as database:
        database.execute(text("create table t (x)"))
    assert workspace.reports.is_dir()
    assert {p.name for p in workspace.home.iterdir()} == {"work", "registry", "labels.db", "reports"}


def test_a_moved_home_keeps_its_runs_and_versions(tmp_path: Path) -> None:
    """Nothing under a home names the place it was made at."""
    workspace = Workspace.from_env(tmp_path / "home")
    (workspace.scratch("abc") / "state").write_text("done")
    ref = workspace.store.put("onnx", workspace.scratch("abc"))
    with dg.DagsterInstance.from_config(str(workspace.dagster_home)) as instance:
        run_id = dg.materialize([dg.asset(lambda: None, name="thing")], instance=instance).run_id
    moved = Workspace.from_env(workspace.home.rename(tmp_path / "moved"))
    assert (moved.store.get(ref) / "state").read_text() == "done"
    with dg.DagsterInstance.from_config(str(moved.dagster_home)) as instance:
        assert [run.run_id for run in instance.get_runs()] == [run_id]
        assert dg.materialize([dg.asset(lambda: None, name="thing")], instance=instance).success
    assert not workspace.home.exists()


@pytest.mark.parametrize("key", ["", "..", "a/b", "/abs"])
def test_a_work_folder_stays_inside(tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError):
        Workspace.from_env(tmp_path).scratch(key)


def test_dagster_runs_from_the_home(tmp_path: Path) -> None:
    home = Workspace.from_env(tmp_path).dagster_home
    with dg.DagsterInstance.from_config(str(home)) as instance:
        assert not instance.telemetry_enabled and not instance.run_retries_enabled and instance.run_monitoring_enabled
        limits = instance.get_concurrency_config()
        assert limits.pool_config.default_pool_limit == 1
        assert limits.run_queue_config is not None and limits.run_queue_config.max_concurrent_runs == 1
        assert dg.materialize([dg.asset(lambda: None, name="thing")], instance=instance).success
    assert any((tmp_path / "dagster").rglob("*.db"))
    (home / "dagster.yaml").write_text("telemetry:\n  enabled: true\n")
    assert "true" in (Workspace.from_env(tmp_path).dagster_home / "dagster.yaml").read_text()  # the user's changes stay
    assert os.environ.get("DAGSTER_HOME") != str(home)
