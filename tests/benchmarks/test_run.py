"""A bench that is interrupted, or runs side by side with another, keeps what it has measured and goes on from there."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from assets.chain import STAGES
from assets.sources import ROOT
from benchmarks import run
from benchmarks.rows import keep, rows
from infra.workspace import Workspace
from models.errors import ConfigError
from ops.probe import Look
from pipelines.config import load_settings

PRESET = "mini"
RELEASED = {"release": {"version": 1, "stage": "production"}, "refused": None}


class Chains:
    """In the place of `onereward run`: each call is noted, seed 13 fails, seed 4 is refused."""

    def __init__(self) -> None:
        self.seeds: list[int] = []
        self.rounds: list[int] = []  # seeds whose next round was run

    def __call__(self, preset: Path, home: Path, records: Path, *options: str) -> dict[str, Any]:
        seed = load_settings(str(preset)).stages["policy"]["seed"]
        if seed == 13:
            raise RuntimeError("failed")
        (self.rounds if options == ("--next-round",) else self.seeds).append(seed)
        return {"commit": run.commit(), **({"release": None, "refused": "win_rate"} if seed == 4 else RELEASED)}


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Chains:
    chains = Chains()
    monkeypatch.setattr(run, "run_chain", chains)
    monkeypatch.setattr(run, "commit", lambda: "c0ffee")
    return chains


def test_the_seed_goes_into_every_stage_that_has_one(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("extends: mini\nreward_model: {steps: 1, seed: 3}\n")
    run.write_seeded(str(own), 7, tmp_path / "seeded.yaml", threads=1)
    settings, before = load_settings(str(tmp_path / "seeded.yaml")), load_settings(str(own))
    drawing = {stage.name for stage in STAGES if "seed" in stage.config.model_fields}
    assert drawing >= set(run.DRAWS)
    for stage in STAGES:
        section = before.stages.get(stage.name, {})
        assert settings.stages.get(stage.name, {}) == ({**section, "seed": 7} if stage.name in run.DRAWS else section)
    assert settings.flux == before.flux and settings.gates == before.gates and settings.threads == 1


def test_the_bench_preset_has_room_for_its_conditions() -> None:
    """Two conditions an image: each split's share of the chosen images covers what is asked of it, five tasks together."""
    section = load_settings(run.PRESET).stages["curated_dataset"]
    shares = {"train": section["train_share"], "validation": section["validation_share"]}
    shares["test"] = 1 - sum(shares.values())
    for split, share in shares.items():
        assert 5 * section[f"{split}_per_task"] <= 2 * share * section["subset"]


def test_figures_come_from_the_report_of_the_seeds_own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command's process is stood in for: what it is given is what `onereward run` takes, what it leaves is a report."""
    look = Look(
        step=6,
        condition_id="c",
        source_id="c",
        origin="c",
        task="remove",
        dimension="removal_quality",
        judge=0.9,
        second=None,
        measure_win=1.0,
        blind_win=None,
    )

    def chain(command: list[str], **options: Any) -> None:
        arguments = dict(zip(command[4:8:2], command[5:8:2], strict=True))
        assert command[1:4] == ["-m", "pipelines.cli", "run"] and options["check"] and options["cwd"] == ROOT
        seed = load_settings(arguments["--preset"]).stages["policy"]["seed"]
        folder = Workspace(Path(arguments["--home"])).reports / ("2" if "--next-round" in command else "1")
        folder.mkdir(exist_ok=True)
        (folder / "report.json").write_text(json.dumps({"wall_s": seed, "commit": "c0ffee", "other": 1, **RELEASED}))
        (folder / "policy-ema-checkpoints.jsonl").write_text(json.dumps(look) + "\n")

    monkeypatch.setattr(run, "commit", lambda: "c0ffee")
    run.machine()  # asks `uname` once, by the very function that is replaced here
    monkeypatch.setattr(subprocess, "run", chain)
    homes, out = tmp_path / "homes", tmp_path / "out.json"
    first, second = run.bench(PRESET, [4, 5], out, homes=homes, next_round=True)
    assert [(row["seed"], row["wall_s"], row["commit"], row["next_round"]["wall_s"]) for row in (first, second)] == [
        (4, 4, "c0ffee", 4),
        (5, 5, "c0ffee", 5),
    ]
    assert "other" not in first and first["policy"] is None
    start, end = first["curves"]["ema"]
    assert start["step"] == 0 and start["judge"] == [0.5, 0.5, 0.5] and "second" not in end
    assert end["step"] == 6 and end["judge"][0] == 0.9 and end["measure_win"][0] == 1.0
    assert {path.name for path in homes.iterdir()} == {"mini-4", "mini-5"}
    kept = {path.parent.name: path.name for path in (tmp_path / "records").glob("*/*")}
    assert kept == dict.fromkeys(["mini-4", "mini-4-next", "mini-5", "mini-5-next"], "policy-ema-checkpoints.jsonl.xz")
    assert "mini-4" not in out.read_text() and str(tmp_path) not in out.read_text()

    assert len(run.bench(PRESET, [4], tmp_path / "same.json", homes=homes)) == 1  # goes on where it stood
    monkeypatch.setattr(run, "commit", lambda: "decaf")
    with pytest.raises(ConfigError, match="c0ffee has put a release into production"):  # the new seed would be held against the old one's
        run.bench(PRESET, [4], out, homes=homes)
    assert rows(out)[0]["commit"] == "c0ffee"


def test_every_seed_is_kept_as_it_comes(ran: Chains, tmp_path: Path) -> None:
    out = tmp_path / "results" / "mini.json"
    with pytest.raises(RuntimeError):
        run.bench(PRESET, [2, 0, 13, 1], out)
    assert [row["seed"] for row in rows(out)] == [0, 2]
    found = run.bench(PRESET, [0, 1, 2], out)
    assert ran.seeds == [2, 0, 1] and [row["seed"] for row in found] == [0, 1, 2]
    assert rows(out) == found


def test_another_commit_preset_or_machine_is_measured_anew(ran: Chains, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "mini.json"
    run.bench(PRESET, [0, 1], out)
    monkeypatch.setattr(run, "commit", lambda: "decaf")
    assert [row["commit"] for row in run.bench(PRESET, [0], out)] == ["decaf", "c0ffee"]  # nothing is lost that was not measured again
    own = tmp_path / "own.yaml"
    own.write_text("extends: mini\nreward_model: {steps: 1}\n")
    run.bench(str(own), [0], out)
    run.bench(str(own), [0], out, threads=7)
    assert ran.seeds == [0, 1, 0, 0, 0]
    monkeypatch.setattr(run, "commit", lambda: "decaf+")
    run.bench(str(own), [0], out)
    run.bench(str(own), [0], out)
    assert ran.seeds == [0, 1, 0, 0, 0, 0, 0]


def test_a_next_round_follows_a_release_and_can_follow_later(ran: Chains, tmp_path: Path) -> None:
    out, homes = tmp_path / "mini.json", tmp_path / "homes"
    run.bench(PRESET, [0, 4], out, homes=homes)
    first, refused = run.bench(PRESET, [0, 4], out, homes=homes, next_round=True)
    assert ran.seeds == [0, 4] and ran.rounds == [0]  # the first round is not run again
    assert first["command"] == "python -m benchmarks.run --preset mini --seeds 0 --threads 2 --next-round"
    assert first["next_round"]["refused"] is None and "win_rate" in refused["next_round"]["skipped"]
    waiting = {"release": {"version": 1, "stage": "staging"}, "refused": None}
    assert run.second_round(waiting, tmp_path, homes, tmp_path) == {"skipped": "the first round was not promoted"}
    run.bench(PRESET, [0, 4], out, homes=homes, next_round=True)
    assert ran.seeds == [0, 4] and ran.rounds == [0]


def _writer(arguments: tuple[Path, int]) -> None:
    path, writer = arguments
    for number in range(20):
        keep(path, {"seed": writer, "number": number}, "seed", "number")


@pytest.fixture
def processes() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(3, mp_context=get_context("fork")) as pool:
        yield pool


def test_no_row_is_lost_between_processes(processes: ProcessPoolExecutor, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    list(processes.map(_writer, [(path, writer) for writer in range(3)]))
    assert [(row["seed"], row["number"]) for row in rows(path)] == [(writer, number) for writer in range(3) for number in range(20)]
    keep(path, {"seed": 1, "number": 3, "again": True}, "seed", "number")
    assert len(rows(path)) == 60 and [row["number"] for row in rows(path) if "again" in row] == [3]
