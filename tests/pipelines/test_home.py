"""What Dagster's processes find in the environment, whatever folder they work in."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.home import enter


@pytest.mark.parametrize("named_by", ["argument", "environment"])
def test_preset_and_home_are_absolute(
    home: Path, toy: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named_by: str
) -> None:
    preset = toy()
    monkeypatch.chdir(tmp_path)
    if named_by == "argument":
        enter(preset.name, Path("own"))
    else:
        monkeypatch.setenv("ONEREWARD_PRESET", preset.name)
        monkeypatch.setenv("ONEREWARD_HOME", "own")
        enter(None, None)
    assert os.environ["ONEREWARD_HOME"] == str(tmp_path / "own")
    assert os.environ["DAGSTER_HOME"] == str(tmp_path / "own" / "dagster")
    assert os.environ["ONEREWARD_PRESET"] == str(preset)
    assert (tmp_path / "own" / "dagster" / "dagster.yaml").exists()


def test_without_names_the_home_lies_in_the_folder_and_the_preset_is_the_default(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ONEREWARD_HOME")
    monkeypatch.chdir(tmp_path)
    settings, workspace = enter(None, None)
    assert settings.preset == "mini" and workspace.home == tmp_path / ".onereward"
    assert os.environ["ONEREWARD_HOME"] == str(workspace.home) and "ONEREWARD_PRESET" not in os.environ


def test_the_store_is_what_the_environment_says_then_the_preset(
    home: Path, toy: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preset = str(toy(store=f"dvc+{tmp_path}/shared"))
    assert enter(preset, home)[1].where == f"dvc+{tmp_path}/shared"
    monkeypatch.setenv("ONEREWARD_STORE", "dvc")
    assert enter(preset, home)[1].where == "dvc"
