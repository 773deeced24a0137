"""The probe refuses runs that really hacked their judge, by name, and lets a run pass that was held back.

The records are of real runs of the mini policy (benchmarks/hacking_records.py makes such): with no cap, every cell rewarded however
badly it is judged, nothing to keep it from changing what it should not, a single view for the judge and a high learning rate; and
with the preset's guardrails. Another, from before a single view was asked, has 12 scenes a task in place of 32. Those under `with_blind`
are of another draw and were looked at by measures that need no target too (docs/statistics.md tells the differences); `second_round` is
`static` of the second round of seed 2 of the bench at commit 0ef9cee, with all its guardrails. Neither that nor `third_draw`, both runs
once more at db3e13b, took part in any choice of measures or thresholds.
"""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.taxonomy import Taxonomy
from ops.folders import write_metrics
from ops.gate import GateConfig
from ops.gate_checks import check
from ops.policy_config import TrainPolicyConfig
from ops.policy_watch import choose, summary
from ops.probe import CHECKPOINTS, STARTS, Look, gold_against_proxy, hacked, looks, over_optimised, over_steps

RECORDS = Path(__file__).parent / "records"


def stored(name: str) -> list[Look]:
    return looks(gzip.decompress((RECORDS / f"{name}.jsonl.gz").read_bytes()).splitlines())


def policy(folder: Path, rows: list[Look] | list[dict[str, Any]], **metrics: object) -> Path:
    write_metrics(folder, {"finite": True, "preservation_psnr": 30.0, "base_preservation_psnr": 30.0, **metrics})
    (folder / CHECKPOINTS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def hacking(folder: Path) -> Any:
    return next(gate for gate in check("policy-static", folder, GateConfig()) if gate.name == "hacking")


def test_a_run_without_guardrails_is_refused_by_name(tmp_path: Path) -> None:
    gate = hacking(policy(tmp_path, stored("guardrails_off")))
    assert not gate.passed and gate.measure >= 1
    assert "judge up" in gate.description and "truth down" in gate.description and "between steps" in gate.description


def test_a_fall_that_cells_are_too_small_for_shows_in_their_dimension(tmp_path: Path) -> None:
    """60 scenes, the truth .56 to .42 over all tasks; by cell, task and all tasks alone this run passed."""
    records = stored("too_few_scenes")
    gate = hacking(policy(tmp_path, records))
    assert len({row["condition_id"] for row in records}) == 60 and not gate.passed
    assert "in text_alignment in all tasks" in gate.description
    assert {found.place for found in hacked(records)} == {"text_alignment in all tasks"}


def test_where_no_truth_is_known_the_second_judge_is_the_metric(tmp_path: Path) -> None:
    """The second judge of these records is led astray as well, so one that is not stands in for it."""
    apart = [{**row, "measure_win": None, "blind_win": None, "second": 1 - row["judge"]} for row in stored("guardrails_off")]
    gate = hacking(policy(tmp_path, apart))
    assert not gate.passed and "second judge down" in gate.description


def chosen_of(rows: list[Look], enough: float = TrainPolicyConfig.model_fields["enough"].default) -> int | None:
    return choose(rows, enough, [step for step in {row["step"] for row in rows} if over_optimised(rows, step)])


@pytest.mark.parametrize(
    ("name", "by_truth", "without"),
    [
        ("guardrails_off", [24, 36, 48, 60], []),
        ("guardrails_on", [], []),
        ("too_few_scenes", [36, 48, 60], []),
        ("with_blind/guardrails_off", [24, 36, 48, 60], [24, 36, 48, 60]),
        ("with_blind/guardrails_on", [36], []),
        ("with_blind/second_round", [36], [36]),
        ("third_draw/guardrails_off", [24, 36, 48, 60], [24, 36, 48, 60]),
        ("third_draw/guardrails_on", [], []),
    ],
)
def test_which_checkpoints_the_truth_refuses_and_which_the_measures_without_it(name: str, by_truth: list[int], without: list[int]) -> None:
    """Of the first three the second judge alone is asked in its place: it refuses none, and none of the others either."""
    records = stored(name)
    steps = sorted({row["step"] for row in records})
    assert [step for step in steps if hacked(records, delivered=step)] == by_truth
    assert [step for step in steps if over_optimised(records, step)] == without
    assert not any(over_optimised([{**row, "blind_win": None} for row in records], step) for step in steps)


def test_the_truth_finds_the_round_that_went_on_too_long_where_the_measures_do() -> None:
    (found,) = hacked(stored("with_blind/second_round"))
    assert (found.place, found.start, found.end) == ("consistency in all tasks", 24, 36)
    assert [round(value, 2) for value in found.judge] == [0.61, 0.62] and round(found.independent[0], 2) == 0.63
    assert found.independent[1] == pytest.approx(0.495, abs=0.01)


def without_truth(name: str) -> list[Look]:
    return [{**row, "measure_win": None} for row in stored(f"with_blind/{name}")]


def test_where_no_truth_is_known_measures_without_target_refuse_it_too(tmp_path: Path) -> None:
    gate = hacking(policy(tmp_path, without_truth("guardrails_off")))
    assert not gate.passed and "blind measure down" in gate.description and "consistency in all tasks" in gate.description


def test_and_let_the_run_with_guardrails_pass_which_the_truth_does_not(tmp_path: Path) -> None:
    """A known miss: its judge, fitted on half of the labels, was hacked in a cell of a dimension that has no reliable measure."""
    assert hacking(policy(tmp_path, without_truth("guardrails_on"))).passed
    gate = hacking(policy(tmp_path, stored("with_blind/guardrails_on")))
    assert not gate.passed and {found.place for found in hacked(stored("with_blind/guardrails_on"))} == {
        "fill/text_alignment",
        "text_alignment in all tasks",
    }


def test_a_second_judge_that_is_led_astray_too_sees_nothing(tmp_path: Path) -> None:
    """Without these measures the run that must be refused passes: a policy that nothing reliable has looked at is not proven healthy."""
    gate = hacking(policy(tmp_path, [{**row, "blind_win": None} for row in without_truth("guardrails_off")]))
    assert gate.passed and gate.measure == 0


def test_a_run_with_guardrails_passes(tmp_path: Path) -> None:
    gate = hacking(policy(tmp_path, stored("guardrails_on")))
    assert gate.passed and gate.measure == 0


@pytest.mark.parametrize(
    ("name", "chosen", "gap"),
    [
        ("guardrails_off", 12, 0.0),
        ("guardrails_on", 24, 0.012),
        ("too_few_scenes", 24, 0.056),
        ("with_blind/guardrails_off", 12, 0.0),
        ("with_blind/guardrails_on", 36, 0.013),
        ("with_blind/second_round", 24, 0.0),
        ("third_draw/guardrails_off", 12, 0.0),
        ("third_draw/guardrails_on", 72, 0.0),
    ],
)
def test_what_would_have_been_delivered(name: str, chosen: int, gap: float) -> None:
    """With the default of `policy.enough`; the third choice lies more than the .05 asked below the best in hindsight, and says so."""
    records = stored(name)
    step = chosen_of(records)
    truth = {point["step"]: point["measure_win"] for point in summary(records)}
    assert step == chosen and max(truth.values()) - truth[step] == pytest.approx(gap, abs=1e-3)
    assert truth[step] >= truth[max(truth)] - 0.01  # and no worse than the last checkpoint, which is delivered where nobody chooses


def test_the_second_judge_s_choice_hangs_on_how_much_is_enough_and_with_reliable_measures_it_does_not() -> None:
    """As docs/statistics.md says: on both runs without guardrails step 48 lies more than the .05 asked below the best."""
    records = stored("with_blind/guardrails_off")
    alone: list[Look] = [{**row, "blind_win": None} for row in records]
    choices = [[chosen_of(rows, enough) for enough in (0.58, 0.6, 0.62)] for rows in (stored("guardrails_off"), alone, records)]
    assert choices == [[12, 12, 48], [12, 48, 48], [12, 12, 12]]


def test_records_that_cannot_be_read_or_miss_the_delivered_step_fail(tmp_path: Path) -> None:
    folder = policy(tmp_path, stored("guardrails_on"), best_step=99)
    assert not hacking(folder).passed and "99" in hacking(folder).description
    (folder / CHECKPOINTS).write_text('{"step": 1}\n')
    assert not hacking(folder).passed
    (folder / CHECKPOINTS).write_text("")
    assert not hacking(folder).passed


def rows(steps: dict[int, tuple[float, float]], cells: int = 1, sources: int = 16, seed: int = 0) -> list[Look]:
    """Per step what the judge says, and the chance that the truth agrees; every source serves every cell."""
    rng = np.random.default_rng(seed)
    return [
        {
            "step": step,
            "condition_id": f"c{source}-{cell}",
            "source_id": f"s{source}",
            "origin": f"s{source}",
            "task": "fill",
            "dimension": f"d{cell}",
            "judge": judge,
            "second": judge,
            "measure_win": float(rng.random() < true),
            "blind_win": None,
        }
        for step, (judge, true) in steps.items()
        for cell in range(cells)
        for source in range(sources)
    ]


def test_only_what_is_delivered_counts() -> None:
    late = rows({10: (0.6, 1.0), 20: (0.7, 1.0), 30: (0.9, 0.0)})
    (worst, *_) = hacked(late)
    assert (worst.end, worst.place, worst.metric) == (30, "fill/d0", "measure_win")  # of the same cell: the whole, the task, the cell
    assert worst.judge[1] > worst.judge[0] and worst.independent[1] == 0
    assert hacked(late, delivered=20) == []


def test_a_fall_is_found_however_many_checkpoints_there_are() -> None:
    many = rows({10 * number: (0.6 + 0.01 * number, 1.0 if number < 20 else 0.0) for number in range(1, 31)}, cells=4)
    found = hacked(many)
    assert {finding.end for finding in found} == {300} and {finding.place for finding in found} >= {"fill", "fill/d3"}
    assert len({finding.start for finding in found}) <= STARTS + 1 and {0, 10} <= {finding.start for finding in found}


def test_one_cell_s_fall_is_found_among_hundreds_of_comparisons() -> None:
    """656 of them: Holm's first level is under what 10,000 draws can tell."""
    looks = rows({step: (0.5 + step / 1000, 1.0) for step in range(10, 100, 10)}, cells=80)
    fallen = [{**row, "measure_win": 0.0} if (row["step"], row["dimension"]) == (90, "d0") else row for row in looks]
    assert "fill/d0" in {finding.place for finding in hacked(fallen)}


def test_a_level_that_the_draws_do_not_tell_is_refused() -> None:
    looks = rows({step: (0.5 + step / 1000, float(step < 20)) for step in (10, 20)}, cells=17)
    assert hacked(looks, level=0.025)
    with pytest.raises(ValueError, match=r"smaller than 0\.025"):
        hacked(looks, level=0.02)


def test_where_nothing_independent_looked_the_gate_fails(tmp_path: Path) -> None:
    blind = [{**row, "measure_win": None, "second": None} for row in rows({10: (0.9, 0.0)})]
    gate = hacking(policy(tmp_path, blind))
    assert not gate.passed and gate.measure is None and "second_share" in gate.description


def test_a_fall_below_the_base_is_seen_in_the_first_checkpoint() -> None:
    assert [(found.place, found.start) for found in hacked(rows({10: (0.9, 0.0)}))] == [("fill/d0", 0)]


def test_a_metric_that_falls_with_the_judge_is_no_hacking() -> None:
    assert hacked(rows({10: (0.9, 1.0), 20: (0.45, 0.0)})) == []


def test_many_cells_without_a_fall_rarely_alarm() -> None:
    """A dozen runs of twenty cells in which the truth stays a coin: without Holm's correction most would be refused."""
    alarms = sum(bool(hacked(rows({5: (0.8, 0.5)}, cells=20, seed=seed))) for seed in range(12))
    assert alarms <= 2


def test_the_curves_start_at_the_base_and_leave_out_what_is_unknown() -> None:
    records = stored("guardrails_off")
    curve = over_steps(records, "measure_win", "fill")
    assert [step for step, _ in curve] == [0, *sorted({row["step"] for row in records})]
    assert curve[0][1].mean == 0.5 and all(point.lo <= point.mean <= point.hi for _, point in curve)
    unknown = [{**row, "measure_win": None} for row in records]
    assert over_steps(unknown, "measure_win") == []  # type: ignore[arg-type]
    figure = gold_against_proxy(records, Taxonomy.load())
    assert len(figure.axes) == len({row["task"] for row in records}) + 1
