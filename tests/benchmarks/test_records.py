"""The committed figures are those of the committed records, and one that is not is named."""

from __future__ import annotations

import lzma
from pathlib import Path
from typing import cast

import pytest

from benchmarks.records import RESULTS, committed, differences, keep_records, recomputed, unpacked
from ops.policy_config import TrainPolicyConfig
from ops.policy_watch import choose
from ops.probe import CHECKPOINTS, Look, over_optimised
from ops.win_rates import ITEMS, read_items, write_items

RUNS = dict(committed())


def test_every_committed_run_has_its_records() -> None:
    assert {path.name for path in (RESULTS / "records").iterdir()} == RUNS.keys()
    assert len(RUNS) == 7  # the default run, three first rounds of the bench and three second ones


@pytest.mark.parametrize("name", ["bench-0-next", "default_run"])  # `python -m benchmarks.records` does them all
def test_figures_are_those_of_the_records(name: str) -> None:
    run = RUNS[name]
    found = recomputed(run, RESULTS / "records" / name)
    assert list(differences(run, found)) == []
    assert found["policy"].keys() == run["policy"].keys() and found["best_mode"] == run["best_mode"]
    assert len(found["policy"]["static"]["cells"]) == len(found["judge"]["cells"]) == 17
    assert all(len(found["training"][mode]["looks"]) == len(run["training"][mode]["looks"]) == 4 for mode in ("static", "ema"))
    assert (name == "default_run") != ("against_production" in found)


@pytest.mark.parametrize("name", RUNS)
def test_the_checkpoint_that_was_delivered_is_the_one_its_records_choose(name: str) -> None:
    for mode, told in RUNS[name]["training"].items():
        rows = cast(list[Look], unpacked(RESULTS / "records" / name, f"policy-{mode}-{CHECKPOINTS}"))
        left_out = [step for step in {row["step"] for row in rows} if over_optimised(rows, step)]
        assert choose(rows, TrainPolicyConfig.model_fields["enough"].default, left_out) == told["best_step"]


def test_a_figure_that_the_records_do_not_give_is_named(tmp_path: Path) -> None:
    run, stored, folder = RUNS["default_run"], RESULTS / "records" / "default_run", tmp_path / "records"
    report = tmp_path / "report"
    report.mkdir()
    for packed in stored.iterdir():
        (report / packed.stem).write_bytes(lzma.decompress(packed.read_bytes()))
    items = read_items(report / ITEMS)
    changed = next(item for item in items if item["policy"] == "static" and item["split"] == "test" and item["task"] == "remove")
    changed["measures"]["removal_quality"] -= 1
    write_items(report / ITEMS, items)
    folder.mkdir()
    (folder / "policy-other-checkpoints.jsonl.xz").touch()  # of an earlier run
    keep_records(report, folder)
    assert {path.name for path in folder.iterdir()} == {path.name for path in stored.iterdir()}
    named = {line.split(":")[0] for line in differences(run, recomputed(run, folder))}
    assert "policy.static.mean_win_rate" in named and not any(name.startswith(("policy.ema", "judge", "training")) for name in named)
