"""The committed figures are those of the committed records, and one that is not is named."""

from __future__ import annotations

import json
import lzma
import shutil
from pathlib import Path

import pytest

from benchmarks.records import RESULTS, committed, differences, keep_records, recomputed
from ops.win_rates import ITEMS

RUNS = dict(committed())


def test_every_committed_run_has_its_records() -> None:
    assert {path.name for path in (RESULTS / "records").iterdir()} == RUNS.keys()
    assert len(RUNS) == 7


@pytest.mark.parametrize("name", ["bench-2-next", "default_run"])  # `python -m benchmarks.records` does them all
def test_figures_are_those_of_the_records(name: str) -> None:
    run = RUNS[name]
    found = recomputed(run, RESULTS / "records" / name)
    assert list(differences(run, found)) == []
    assert found["policy"].keys() == run["policy"].keys() and found["best_mode"] == run["best_mode"]
    assert len(found["policy"]["static"]["cells"]) == len(found["judge"]["cells"]) == 17
    assert all(len(found["training"][mode]["looks"]) == len(run["training"][mode]["looks"]) == 3 for mode in ("static", "ema"))
    assert (name == "default_run") != ("against_production" in found)


def test_a_figure_that_the_records_do_not_give_is_named(tmp_path: Path) -> None:
    run, folder = RUNS["default_run"], tmp_path / "records"
    shutil.copytree(RESULTS / "records" / "default_run", folder)
    packed = folder / f"{ITEMS}.xz"
    items = [json.loads(line) for line in lzma.decompress(packed.read_bytes()).splitlines()]
    changed = next(item for item in items if item["policy"] == "static" and item["split"] == "test" and item["task"] == "remove")
    changed["measures"]["removal_quality"] -= 1
    report = tmp_path / "report"
    report.mkdir()
    (report / ITEMS).write_text("".join(json.dumps(item) + "\n" for item in items))
    keep_records(report, folder)
    named = {line.split(":")[0] for line in differences(run, recomputed(run, folder))}
    assert "policy.static.mean_win_rate" in named and not any(name.startswith(("policy.ema", "judge", "training")) for name in named)
