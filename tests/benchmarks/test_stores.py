"""The stores' benchmark at its smaller size, as a user calls it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_every_bound_is_measured_and_the_last_line_says_whether_all_hold(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.stores", "--quick", "--json", "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    *table, last = done.stdout.splitlines()
    told = json.loads(last)
    measured = {row["what"]: (row["value"], row["bound"]) for row in told["rows"]}
    assert len(measured) == len(table) == 10 and all(value > 0 for value, _ in measured.values())
    assert told["passed"] is all(value <= bound for value, bound in measured.values()) is (done.returncode == 0)
    assert told["passed"], table
    assert list(tmp_path.iterdir()) == []
