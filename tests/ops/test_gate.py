"""Every gate, proven both ways: on an artifact that is sound, and on one that is not in just that respect."""

import math
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.errors import ConfigError
from ops.gate import REQUIRED_GATES, THRESHOLDS, Gate, GateConfig
from ops.gate_checks import CHECKS
from ops.gate_checks import check as measured
from ops.win_rates import ITEMS, PAIRS
from tests.ops.sound import CELLS, FACTS, GOOD, WEIGHTS, artifact, conditions


def check(name: str, folder: Path, config: GateConfig, base: Path | None = None) -> list[Gate]:
    return measured(name, folder, config, base, folder.parent / f"{folder.name}-curated")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base whose transformer lies in two files, as large ones do."""
    folder = tmp_path / "base" / "transformer"
    folder.mkdir(parents=True)
    for name, weight in WEIGHTS.items():
        save_file({name: weight}, folder / f"{name}.safetensors")
    return folder.parent


@pytest.mark.parametrize("name", CHECKS)
def test_a_sound_artifact_passes_every_gate_that_promotion_asks_for(tmp_path: Path, base: Path, name: str) -> None:
    gates = check(name, artifact(tmp_path / "a", name, GOOD[name]), GateConfig(), base)
    assert all(gate.passed for gate in gates), [str(gate) for gate in gates]
    assert tuple(gate.name for gate in gates) == REQUIRED_GATES[name]


def changed(name: str, change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    metrics = deepcopy(GOOD[name])
    change(metrics)
    return metrics


def rival(**cell: Any) -> dict[str, Any]:
    """The comparison with production, its first cell changed."""
    return {"ema": {"mean_lo": 0.5, "tasks": FOUGHT, "facts": FACTS, "cells": [{**CELLS[0], **cell}, CELLS[1]]}}


FOUGHT = [{"task": "fill", "n": 9, "p_worse": 0.03}, {"task": "text", "n": 9, "p_worse": 1.0}, {"task": "remove", "n": 0, "p_worse": None}]


def worse(**task: Any) -> dict[str, Any]:
    """The comparison with production, its first task changed: .03 is no proof over two tasks."""
    return {"ema": {"mean_lo": 0.5, "tasks": [{**FOUGHT[0], **task}, *FOUGHT[1:]], "cells": CELLS, "facts": FACTS}}


UNSOUND = [
    ("preference_pairs", lambda m: m["cells"][1].update(dropped_share=0.31), "dropped_share", 0.31),
    ("preference_pairs", lambda m: m["cells"][1].pop("dropped_share"), "dropped_share", None),
    ("preference_pairs", lambda m: m["cells"][2].update(conditions=3), "dropped_share", None),
    ("preference_pairs", lambda m: m["cells"][2].pop("conditions"), "dropped_share", None),
    ("preference_pairs", lambda m: [cell.update(first_wins_share=0.1) for cell in m["cells"]], "class_balance", 0.4),
    ("reward_model", lambda m: m.update(mean_accuracy=0.59), "judge_accuracy", 0.59),
    ("reward_model", lambda m: m.update(order_consistency=0.69), "judge_order", 0.69),
    ("reward_model", lambda m: m.update(curve=[{"loss": math.nan}]), "judge_finite", 1),
    ("policy-static", lambda m: m.update(finite=False), "policy_finite", 1),
    ("policy-ema", lambda m: m.update(loss=math.inf), "policy_finite", 1),
    ("policy-ema", lambda m: m.update(preservation_psnr=29.6), "policy_preserved", 0.6),
    ("evaluation", lambda m: m["policy"]["ema"].update(mean_win_rate=0.54), "win_rate", 0.54),
    ("evaluation", lambda m: m["policy"]["ema"].update(mean_lo=0.5), "win_rate_lo", 0.5),
    ("evaluation", lambda m: m["policy"]["ema"].update(confirming_mean_lo=0.44), "confirming_lo", 0.44),
    ("evaluation", lambda m: m["policy"]["ema"].pop("confirming_mean_lo"), "confirming_lo", None),
    ("evaluation", lambda m: m["policy"]["ema"]["tasks"][1].update(lo=0.29), "task_lo", 0.29),
    ("evaluation", lambda m: m["policy"]["ema"]["tasks"][1].update(lo=None), "task_lo", None),
    ("evaluation", lambda m: m["policy"]["ema"]["tasks"][2].update(n_without_truth=3), "ground_truth", 1),
    ("evaluation", lambda m: m["policy"]["ema"]["tasks"][2].pop("n_without_truth"), "ground_truth", 1),
    ("evaluation", lambda m: m["policy"]["ema"].update(preservation_psnr=29.6), "evaluation_preserved", 0.6),
    ("evaluation", lambda m: m["policy"]["ema"].update(outside_similarity=0.95), "evaluation_looks_kept", 0.03),
    ("evaluation", lambda m: m["policy"]["ema"].pop("outside_similarity"), "evaluation_looks_kept", None),
    ("evaluation", lambda m: m.update(evidence="blind"), "ground_truth", None),
    ("evaluation", lambda m: m.update(split="validation"), "sealed_split", 1),
    ("evaluation", lambda m: m.pop("split"), "sealed_split", None),
    ("evaluation", lambda m: m.update(chosen_on="test"), "sealed_split", 1),
    ("evaluation", lambda m: m["judge"].pop("split"), "sealed_split", 1),
    ("evaluation", lambda m: m["judge"].update(split="validation"), "sealed_split", 1),
    ("evaluation", lambda m: m.pop("evidence"), "ground_truth", None),
    ("evaluation", lambda m: m["policy"]["ema"]["cells"][0].update(judge_win_rate=0.9, p_worse=0.001), "hacked_cells", 1),
    ("evaluation", lambda m: m["policy"]["ema"]["cells"][0].pop("p_worse"), "hacked_cells", 1),
    ("evaluation", lambda m: m["policy"]["ema"]["cells"][1].update(lo=0.44), "cell_lo", 0.44),
    ("evaluation", lambda m: m["policy"]["ema"]["cells"][1].pop("lo"), "cell_lo", None),
    ("evaluation", lambda m: m["policy"]["ema"]["cells"][0].pop("judge_win_rate"), "hacked_cells", 1),
    ("evaluation", lambda m: m["policy"]["ema"].update(facts=[{**FACTS[0], "p_worse": 0.02}, FACTS[1]]), "lost_facts", 1),
    ("evaluation", lambda m: m["policy"]["ema"].update(facts=[{"task": "fill"}, FACTS[1]]), "lost_facts", 1),
    ("evaluation", lambda m: m["policy"]["ema"].pop("facts"), "lost_facts", None),
    ("evaluation", lambda m: m.update(against_production={"ema": {**rival()["ema"], "facts": None}}), "lost_facts", None),
    (
        "evaluation",  # over four facts each p has to be smaller
        lambda m: m.update(against_production={"ema": {**rival()["ema"], "facts": [{**FACTS[0], "p_worse": 0.012}, FACTS[1]]}}),
        "lost_facts",
        1,
    ),
    ("evaluation", lambda m: m["judge"].update(mean_accuracy=0.59), "sealed_judge_accuracy", 0.59),
    ("evaluation", lambda m: m.pop("judge"), "sealed_judge_accuracy", None),
    (
        "evaluation",
        lambda m: m.update(against_production={"ema": {"mean_lo": 0.44, "tasks": FOUGHT, "facts": FACTS, "cells": CELLS}}),
        "not_below_production",
        0.44,
    ),
    (
        "evaluation",
        lambda m: m.update(against_production={"ema": {"tasks": FOUGHT, "facts": FACTS, "cells": CELLS}}),
        "not_below_production",
        None,
    ),
    (
        "evaluation",
        lambda m: m.update(against_production={"ema": {"mean_lo": 0.6, "tasks": FOUGHT, "facts": FACTS}}),
        "production_cell_lo",
        None,
    ),
    ("evaluation", lambda m: m.update(against_production=worse(p_worse=0.024)), "lost_tasks", 1),
    ("evaluation", lambda m: m.update(against_production=worse(p_worse=None)), "lost_tasks", 1),
    ("evaluation", lambda m: m.update(against_production={"ema": {"mean_lo": 0.6, "cells": CELLS, "facts": FACTS}}), "lost_tasks", None),
    ("evaluation", lambda m: m.update(against_production=rival(judge_win_rate=0.52, p_worse=0.001)), "hacked_cells", 1),
    ("evaluation", lambda m: m.update(against_production=rival(judge_win_rate=None, lo=0.44)), "production_cell_lo", 0.44),
    ("evaluation", lambda m: m.update(second_judge={"base": {"ema": {"lo": 0.44}}}), "second_judge_lo", 0.44),
    ("evaluation", lambda m: m.update(second_judge=None), "second_judge_lo", None),
    ("onnx", lambda m: m.update(relative_error=2e-3), "onnx_error", 2e-3),
    ("engine", lambda m: m.update(architectures=[]), "engine_architectures", 0),
    ("engine", lambda m: m.pop("verified"), "engine_verified", None),
]


@pytest.mark.parametrize(
    ("name", "change", "gate", "measure"), UNSOUND, ids=[f"{name}-{gate}-{i}" for i, (name, _, gate, _) in enumerate(UNSOUND)]
)
def test_an_unsound_artifact_fails_that_gate_alone(
    tmp_path: Path, base: Path, name: str, change: Callable[[dict[str, Any]], object], gate: str, measure: float | None
) -> None:
    gates = check(name, artifact(tmp_path / "a", name, changed(name, change)), GateConfig(), base)
    (failed,) = [each for each in gates if not each.passed]
    assert failed.name == gate and failed.measure == (pytest.approx(measure) if measure is not None else None)


def test_facts_are_not_asked_where_no_request_names_any(tmp_path: Path, base: Path) -> None:
    metrics = changed("evaluation", lambda m: m["policy"]["ema"].update(facts=[]))
    (gate,) = [
        each
        for each in check("evaluation", artifact(tmp_path / "a", "evaluation", metrics), GateConfig(), base)
        if each.name == "lost_facts"
    ]
    assert gate.passed and gate.measure == 0 and "over 0 facts" in gate.description


@pytest.mark.parametrize("name", sorted(set(CHECKS) - {"curated_dataset"}))
@pytest.mark.parametrize("metrics", ["{}", "cut short {", '{"policy": [], "cells": 3, "best_mode": "ema", "finite": true}', None])
def test_absent_figures_fail(tmp_path: Path, base: Path, name: str, metrics: str | None) -> None:
    folder = artifact(tmp_path / "a", name, {})
    if metrics is None:
        (folder / "metrics.json").unlink()
    else:
        (folder / "metrics.json").write_text(metrics)
    can_pass = {"onnx_valid", "engine_built", "policy_moved", "hacking"}  # the file itself is there
    if metrics and "finite" in metrics:
        can_pass |= {"judge_finite", "policy_finite"}
    assert {gate.name for gate in check(name, folder, GateConfig(), base) if gate.passed} <= can_pass


@pytest.mark.parametrize(("name", "keys"), [("reward_model", ["mean_accuracy"]), ("evaluation", ["policy", "ema", "mean_win_rate"])])
@pytest.mark.parametrize("value", [math.nan, None, True, "0.9"])
def test_what_is_no_number_fails(tmp_path: Path, name: str, keys: list[str], value: object) -> None:
    metrics = deepcopy(GOOD[name])
    place = metrics
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    failed = [gate for gate in check(name, artifact(tmp_path / "a", name, metrics), GateConfig()) if not gate.passed]
    assert failed and all(gate.measure is None or gate.name == "judge_finite" for gate in failed)


def test_a_leaky_split_is_found_in_the_rows_whatever_the_metrics_say(tmp_path: Path) -> None:
    by_source, by_pixels, small = (artifact(tmp_path / name, "curated_dataset", {"leaked_sources": []}) for name in "abc")
    conditions(by_source, [("train", "one"), ("validation", "two"), ("test", "one")])
    conditions(by_pixels, [("train", "one"), ("validation", "two"), ("test", "three")], pixels=7)
    conditions(small, [("train", "one"), ("validation", "two"), ("test", "three")], per_place=3)
    leak, size = check("curated_dataset", by_source, GateConfig())
    assert not leak.passed and leak.measure == 1 and "one" in leak.description and size.passed
    leak, size = check("curated_dataset", by_pixels, GateConfig())
    assert not leak.passed and size.passed
    leak, size = check("curated_dataset", small, GateConfig())
    assert leak.passed and not size.passed and size.measure == 3


def test_what_is_sealed_is_read_from_the_rows_whatever_the_metrics_say(tmp_path: Path) -> None:
    def sealed(folder: Path) -> Gate:
        return next(gate for gate in check("evaluation", folder, GateConfig()) if gate.name == "sealed_split")

    folder = artifact(tmp_path / "a", "evaluation", GOOD["evaluation"])
    assert sealed(folder).passed
    for record in (ITEMS, PAIRS):
        sound = (folder / record).read_text()
        for line in ('{"condition_id": "c0", "split": "test"}\n', '{"condition_id": "of other data", "split": "test"}\n'):
            (folder / record).write_text(sound + line)
            gate = sealed(folder)
            assert not gate.passed and gate.measure == 1 and "1 records of conditions" in gate.description
        (folder / record).write_text(sound + '{"condition_id": "c0", "split": "validation"}\n')
        assert sealed(folder).passed == (record == ITEMS)  # on these the mode was chosen; pairs are asked on the sealed split alone
        for nothing in (lambda path: path.write_text(""), lambda path: path.unlink()):
            nothing(folder / record)
            assert not sealed(folder).passed and sealed(folder).measure is None
        (folder / record).write_text(sound)
    nowhere = next(gate for gate in measured("evaluation", folder, GateConfig()) if gate.name == "sealed_split")
    assert not nowhere.passed and nowhere.measure is None


def test_a_broken_onnx_file_fails_whatever_the_metrics_say(tmp_path: Path) -> None:
    folder = artifact(tmp_path / "a", "onnx", GOOD["onnx"])
    whole = (folder / "transformer.onnx").read_bytes()
    (folder / "transformer.onnx").write_bytes(whole[: len(whole) // 2])
    valid, error = check("onnx", folder, GateConfig())
    assert not valid.passed and "transformer.onnx" in valid.description and error.passed


def failing(name: str, folder: Path, base: Path | None) -> dict[str, float | None]:
    return {gate.name: gate.measure for gate in check(name, folder, GateConfig(), base) if not gate.passed}


def test_a_policy_is_judged_by_its_stored_weights_whatever_training_says(tmp_path: Path, base: Path) -> None:
    said = {**GOOD["policy-ema"], "relative_change": 0.5}
    folder = artifact(tmp_path / "a", "policy-ema", said)
    file = folder / "transformer" / "one.safetensors"
    moved = {gate.name: gate.measure for gate in check("policy-ema", folder, GateConfig(), base)}["policy_moved"]
    assert moved == pytest.approx(0.01 / 2, rel=1e-4)
    assert failing("policy-ema", folder, None) == {"policy_finite": 2, "policy_moved": None}
    whole, trained = file.read_bytes(), load_file(file)
    for name, spoilt in {
        "nan": {**trained, "a.weight": torch.full((4, 4), math.nan)},
        "of another shape": {**trained, "a.weight": torch.ones(3, 2)},
        "one too many": {**trained, "c.weight": torch.ones(4)},
        "one too few": {"a.weight": trained["a.weight"]},
    }.items():
        save_file(spoilt, file)
        assert failing("policy-ema", folder, base) == {"policy_finite": 2, "policy_moved": None}, name
    file.write_bytes(whole[:-8])
    assert failing("policy-ema", folder, base) == {"policy_finite": 2, "policy_moved": None}
    save_file(WEIGHTS, file)
    assert failing("policy-ema", folder, base) == {"policy_moved": 0}


def test_a_task_without_ground_truth_is_named_with_what_to_do(tmp_path: Path) -> None:
    def blind(metrics: dict[str, Any]) -> None:
        ema = metrics["policy"]["ema"]
        nothing = {"n": 0, "n_without_truth": 4, "win_rate": None, "lo": None, "hi": None}
        ema.update(
            mean_win_rate=None, mean_lo=None, confirming_mean_lo=None, cells=[], tasks=[{**row, **nothing} for row in ema["tasks"][:2]]
        )

    gates = check("evaluation", artifact(tmp_path / "a", "evaluation", changed("evaluation", blind)), GateConfig())
    failed = [gate for gate in gates if not gate.passed]
    assert {gate.name for gate in failed if gate.measure is None} == {
        "win_rate",
        "win_rate_lo",
        "task_lo",
        "cell_lo",
        "hacked_cells",
        "confirming_lo",
    }
    (named,) = [gate for gate in failed if gate.measure is not None]
    assert named is gates[0] and named.measure == 2
    assert "fill, remove. Only procedural scenes have one" in named.description and "`n_scenes` above 0" in named.description
    assert "`evidence: blind`" in named.description


def test_blind_evidence_is_gated_alike_and_a_task_without_any_still_fails(tmp_path: Path) -> None:
    config = GateConfig(require_ground_truth=False)
    sound = changed("evaluation", lambda m: m.update(evidence="blind"))
    gates = check("evaluation", artifact(tmp_path / "a", "evaluation", sound), config)
    assert all(gate.passed for gate in gates) and gates[0].threshold is None and "not asked" in gates[0].description
    unmeasured = changed("evaluation", lambda m: (m.update(evidence="blind"), m["policy"]["ema"]["tasks"][2].update(n_without_truth=3)))
    (failed,) = [gate for gate in check("evaluation", artifact(tmp_path / "b", "evaluation", unmeasured), config) if not gate.passed]
    assert failed.name == "ground_truth" and failed.measure == 1 and "extend" in failed.description
    held = check("evaluation", artifact(tmp_path / "c", "evaluation", GOOD["evaluation"]), config)
    assert all(gate.passed for gate in held) and held[0].threshold == 0  # truth is asked of an evaluation that has it


def test_a_second_judge_that_the_preset_names_must_have_been_asked(tmp_path: Path) -> None:
    def seconded(metrics: dict[str, Any], place: str) -> Gate:
        gates = check("evaluation", artifact(tmp_path / place, "evaluation", metrics), GateConfig(require_second_judge=True))
        return next(gate for gate in gates if gate.name == "second_judge_lo")

    assert not seconded(GOOD["evaluation"], "a").passed and seconded(GOOD["evaluation"], "b").measure is None
    opinion = {"mean_win_rate": 0.55, "lo": 0.46, "hi": 0.6, "se": 0.03, "n": 90}
    asked = seconded(changed("evaluation", lambda m: m.update(second_judge={"base": {"ema": opinion}})), "c")
    assert asked.passed and asked.interval == (0.46, 0.6) and asked.n == 90 and "n 90, needed" in asked.description


def test_labels_that_are_missing_are_asked_for(tmp_path: Path) -> None:
    metrics = changed("preference_pairs", lambda m: m["cells"][2].update(conditions=3))
    (failed,) = [gate for gate in check("preference_pairs", artifact(tmp_path / "a", "x", metrics), GateConfig()) if not gate.passed]
    assert "extend, structure; nobody has labelled its conditions" in failed.description


def test_an_engine_that_is_not_there_or_never_ran(tmp_path: Path) -> None:
    folder = artifact(tmp_path / "a", "engine", GOOD["engine"])
    assert [gate.passed for gate in check("engine", folder, GateConfig(require_verified_engine=True))] == [True, True, False]
    (folder / "transformer.engine").write_bytes(b"")
    assert [gate.passed for gate in check("engine", folder, GateConfig())] == [False, True, True]


def test_thresholds_come_from_the_config(tmp_path: Path) -> None:
    folder = artifact(tmp_path / "a", "reward_model", GOOD["reward_model"])
    gates = {gate.name: gate for gate in check("reward_model", folder, GateConfig(min_judge_accuracy=0.71))}
    assert gates["judge_accuracy"].threshold == 0.71 and not gates["judge_accuracy"].passed
    assert all("ours" in str(field.description) for field in GateConfig.model_fields.values())
    with pytest.raises(ConfigError, match="source_images"):
        check("source_images", folder, GateConfig())


def test_evidence_keeps_the_thresholds_behind_its_gates(tmp_path: Path, base: Path) -> None:
    """Those, and only those, whose change changes a gate."""
    metrics = {**GOOD, "evaluation": {**GOOD["evaluation"], "evidence": "blind", "against_production": {"ema": {"mean_lo": 0.5}}}}
    for number, name in enumerate(CHECKS):
        folder = artifact(tmp_path / f"a{number}", name, metrics[name])
        shipped = check(name, folder, GateConfig(), base)
        other = {
            field: not value if isinstance(value, bool) else value + (1 if isinstance(value, int) else 0.01)
            for field, value in GateConfig().model_dump().items()
        }
        behind = [field for field, value in other.items() if check(name, folder, GateConfig(**{field: value}), base) != shipped]
        assert sorted(THRESHOLDS[name]) == sorted(behind), name


def test_a_figure_that_was_estimated_has_its_interval_and_cases(tmp_path: Path) -> None:
    metrics = deepcopy(GOOD["evaluation"])
    metrics["policy"]["ema"]["n"] = 27
    gates = {gate.name: gate for gate in check("evaluation", artifact(tmp_path / "a", "evaluation", metrics), GateConfig())}
    assert (gates["win_rate_lo"].interval, gates["win_rate_lo"].n) == ((0.52, 0.7), 27)
    assert (gates["task_lo"].interval, gates["task_lo"].n) == ((0.35, 0.8), 9)  # of the worst task
    assert (gates["sealed_judge_accuracy"].interval, gates["sealed_judge_accuracy"].n) == (None, 40)
    assert gates["hacked_cells"].interval is None and gates["hacked_cells"].n is None
