"""A replayed policy is the recorded one or not, and what would be delivered now is what docs/evidence.md says."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from benchmarks.records import RESULTS, unpacked
from benchmarks.replay import alike, main
from ops.policy_watch import choose
from ops.probe import Look, hacked, over_optimised
from ops.train_policy import MODES

STEPS = (12, 24, 36)


def kept(name: str, mode: str) -> list[Look]:
    return cast(list[Look], unpacked(RESULTS / "records" / name, f"policy-{mode}-checkpoints.jsonl"))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [f"bench-{seed}{following}" for seed in range(3) for following in ("", "-next")])
def test_the_checkpoint_that_would_be_delivered_now(name: str, mode: str) -> None:
    rows, too_long = kept(name, mode), name == "bench-2-next"
    left_out = [step for step in STEPS if over_optimised(rows, step)]
    assert left_out == ([36] if too_long else []) and choose(rows, 0.6, left_out) == (24 if too_long else 36)
    found = hacked(rows)  # by the truth
    assert [(each.place, each.start, each.end) for each in found] == ([("consistency in all tasks", 24, 36)] if too_long else [])
    for each in found:
        assert [round(value, 2) for value in each.judge] == [0.61, 0.62] and round(each.independent[0], 2) == 0.63
        assert each.independent[1] == pytest.approx(0.495, abs=0.01)


def test_a_home_that_is_not_there_is_named_and_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["replay", "--home", str(tmp_path / "nowhere"), "--records", "bench-0"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and "nowhere" in capsys.readouterr().err and not (tmp_path / "nowhere").exists()


def test_more_may_be_recorded_but_nothing_else() -> None:
    told = [{"step": 1, "judge": 0.5}, {"step": 2, "judge": 0.6}]
    again: list[Any] = [{**row, "blind_win": 1.0} for row in told]
    assert alike(told, again) and not alike(told, again[:1]) and not alike(told, [again[0], {**again[1], "judge": 0.7}])
