"""A bench that is interrupted keeps what it has measured and goes on from there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import run

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
