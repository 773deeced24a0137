"""The fault matrix: its quick form holds, and it tells when something does not."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from benchmarks import fault_points, faults
from benchmarks.fault_kinds import damage
from benchmarks.fault_tracer import traced
from infra.stores.dvc import DvcStore
from models.errors import DigestMismatch

ROOT = Path(__file__).parents[2]


def test_every_point_of_the_quick_matrix_survives() -> None:
    command = [sys.executable, "-m", "benchmarks.faults", "--quick", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    *table, counts, last = done.stdout.splitlines()
    result = json.loads(last)
    assert [row for row in result["rows"] if not row["survived"]] == [] and done.returncode == 0, done.stderr
    assert result["passed"] and json.loads(counts) == {"points": len(table) - 1, "survived": len(table) - 1}
    assert f"**{len(table) - 1} of {len(table) - 1} points survived**" in faults.page(result)
    assert result["kill_points"] == sum(line.startswith("kill -9") for line in table) >= 20


def test_a_process_is_killed_exactly_before_a_change(tmp_path: Path) -> None:
    def work() -> None:
        for name in "abc":
            (tmp_path / name).write_text(name)

    end = traced(work, kill_at=4)
    assert end.killed and end.changes[-1].startswith("write ") and end.changes[-1].endswith("/b")
    assert (tmp_path / "a").read_text() == "a" and (tmp_path / "b").read_text() == "" and not (tmp_path / "c").exists()
    whole = traced(work)
    assert not whole.killed and whole.code == 0 and len(whole.changes) == 6 and (tmp_path / "c").read_text() == "c"


def test_lost_bytes_are_seen(tmp_path: Path) -> None:
    store = DvcStore(tmp_path / "home" / "registry")
    store.put("onnx", fault_points.fill(tmp_path / "new", "new"))
    state = fault_points.inspect_cache(store.root)
    damage(store.root, store.versions("onnx")[0], "altered")
    with pytest.raises(DigestMismatch):
        fault_points.inspect_cache(store.root)
    assert len(state[0]) == 1 and state[1] == frozenset()


def no_fault(template: Path, folder: Path) -> fault_points.Seen:
    return fault_points.Seen("", "before", fault_points.told(lambda: None, DigestMismatch))


def test_a_point_that_cannot_be_made_has_not_survived(tmp_path: Path) -> None:
    row = faults.run_point("nothing", partial(no_fault), tmp_path / "template")
    assert not row.survived and row.state == "no DigestMismatch was shown" and row.done == "no_fault"
