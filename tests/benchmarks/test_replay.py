"""A replayed policy is the recorded one or not, and what would be delivered now is what docs/evidence.md says."""

from __future__ import annotations

import json
import lzma
from typing import Any

import pytest

from benchmarks.records import RESULTS
from benchmarks.replay import alike
from ops.policy_watch import choose
from ops.probe import hacked
from ops.train_policy import MODES


def looks(name: str, mode: str) -> list[Any]:
    path = RESULTS / "records" / name / f"policy-{mode}-checkpoints.jsonl.xz"
    return [json.loads(line) for line in lzma.decompress(path.read_bytes()).splitlines()]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "step"), [("bench-2", 36), ("bench-2-next", 24)])
def test_the_checkpoint_that_would_be_delivered_now(name: str, mode: str, step: int) -> None:
    rows = looks(name, mode)
    assert choose(rows, 0.6) == step and hacked(rows, delivered=step) == []
    assert bool(hacked(rows, delivered=36)) == (step != 36)


def test_more_may_be_recorded_but_nothing_else() -> None:
    told = [{"step": 1, "judge": 0.5}, {"step": 2, "judge": 0.6}]
    again: list[Any] = [{**row, "blind_win": 1.0} for row in told]
    assert alike(told, again) and not alike(told, again[:1]) and not alike(told, [again[0], {**again[1], "judge": 0.7}])
