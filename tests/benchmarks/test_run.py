"""A bench that is interrupted keeps what it has measured and goes on from there."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from assets.chain import STAGES
from assets.sources import ROOT
from benchmarks import run
from infra.workspace import Workspace
from pipelines.config import load_settings

PRESET = "mini"


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The seeds that were run: a chain takes minutes, so each only says that it ran, and seed 13 fails."""
    seeds: list[int] = []

    def run_seed(preset: str, seed: int) -> dict[str, Any]:
        if seed == 13:
            raise RuntimeError("failed")
        seeds.append(seed)
        return {"seed": seed, "commit": run.commit()}

    monkeypatch.setattr(run, "run_seed", run_seed)
    monkeypatch.setattr(run, "commit", lambda: "c0ffee")
    return seeds


def test_the_seed_goes_into_every_stage_that_has_one(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("extends: mini\nreward_model: {steps: 1, seed: 3}\n")
    run.write_seeded(str(own), 7, tmp_path / "seeded.yaml")
    settings, before = load_settings(str(tmp_path / "seeded.yaml")), load_settings(str(own))
    drawing = {stage.name for stage in STAGES if "seed" in stage.config.model_fields}
    assert drawing >= set(run.DRAWS)
    for stage in STAGES:
        section = before.stages.get(stage.name, {})
        assert settings.stages.get(stage.name, {}) == ({**section, "seed": 7} if stage.name in run.DRAWS else section)
    assert settings.flux == before.flux and settings.gates == before.gates


def test_figures_come_from_the_report_of_the_seeds_own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command's process is stood in for: what it is given is what `onereward run` takes, what it leaves is a report."""
    given: list[Path] = []

    def chain(command: list[str], **options: Any) -> None:
        arguments = dict(zip(command[4::2], command[5::2], strict=True))
        home = Path(arguments["--home"])
        assert command[1:4] == ["-m", "pipelines.cli", "run"] and options["check"] and options["cwd"] == ROOT
        seed = load_settings(arguments["--preset"]).stages["policy"]["seed"]
        given.append(home)
        (Workspace(home).reports / "1").mkdir()
        (Workspace(home).reports / "1" / "report.json").write_text(json.dumps({"wall_s": seed, "commit": "c0ffee", "other": 1}))

    monkeypatch.setattr(subprocess, "run", chain)
    figures = [run.run_seed(PRESET, seed) for seed in (4, 5)]
    assert [(each["seed"], each["wall_s"], each["commit"]) for each in figures] == [(4, 4, "c0ffee"), (5, 5, "c0ffee")]
    assert len(set(given)) == 2 and not any(home.exists() for home in given) and "other" not in figures[0]


def test_every_seed_is_kept_as_it_comes(ran: list[int], tmp_path: Path) -> None:
    out = tmp_path / "results" / "mini.json"
    with pytest.raises(RuntimeError):
        run.bench(PRESET, [2, 0, 13, 1], out)
    assert [each["seed"] for each in json.loads(out.read_text())["runs"]] == [0, 2]
    runs = run.bench(PRESET, [0, 1, 2], out)
    assert ran == [2, 0, 1] and [each["seed"] for each in runs] == [0, 1, 2]
    assert json.loads(out.read_text())["runs"] == runs


def test_another_commit_or_preset_is_measured_anew(ran: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "mini.json"
    run.bench(PRESET, [0, 1], out)
    monkeypatch.setattr(run, "commit", lambda: "decaf")
    assert [each["commit"] for each in run.bench(PRESET, [0], out)] == ["decaf"]
    own = tmp_path / "own.yaml"
    own.write_text("extends: mini\nreward_model: {steps: 1}\n")
    run.bench(str(own), [0], out)
    assert ran == [0, 1, 0, 0]
    monkeypatch.setattr(run, "commit", lambda: "decaf+")
    run.bench(str(own), [0], out)
    run.bench(str(own), [0], out)
    assert ran == [0, 1, 0, 0, 0, 0]
