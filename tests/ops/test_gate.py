"""Every gate, proven both ways: on an artifact that is sound, and on one that is not in just that respect."""

import json
import math
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

from infra.stores.dvc import DvcStore
from models.errors import ConfigError, GateRefused
from models.records import Condition, Split, write_rows
from models.shards import ShardWriter
from ops.folders import write_metrics
from ops.gate import CHECKS, REQUIRED_GATES, Gate, GateConfig, check, evidence_for, record_evidence

TASKS = [
    {"task": "fill", "n": 9, "win_rate": 0.7, "lo": 0.5, "hi": 0.8},
    {"task": "remove", "n": 9, "win_rate": 0.6, "lo": 0.35, "hi": 0.8},
]
CELLS = [
    {"task": "fill", "dimension": "structure", "win_rate": 0.7, "hi": 0.8, "judge_win_rate": 0.8},
    {"task": "text", "dimension": "legibility", "win_rate": 0.6, "hi": 0.7, "judge_win_rate": None},
]
PAIRS = {"dropped_share": 0.1, "first_wins_share": 0.52, "n_train": 8, "n_validation": 2, "n_test": 2}
GOOD: dict[str, dict[str, Any]] = {
    "curated_dataset": {"splits": {}},
    "preference_pairs": {
        "cells": [{"task": "fill", "dimension": "structure", **PAIRS}, {"task": "text", "dimension": "structure", **PAIRS}]
    },
    "reward_model": {"mean_accuracy": 0.7, "order_consistency": 0.8, "loss": 0.6},
    "policy-static": {"finite": True, "relative_change": 0.01, "preservation_psnr": 30.0, "base_preservation_psnr": 30.2},
    "evaluation": {
        "best_mode": "ema",
        "judge": {"mean_accuracy": 0.7},
        "policy": {
            "static": {},
            "ema": {
                **{"mean_win_rate": 0.6, "mean_lo": 0.52, "mean_hi": 0.7, "preservation_psnr": 30.0, "base_preservation_psnr": 30.2},
                **{"tasks": TASKS, "cells": CELLS, "missing_tasks": []},
            },
        },
    },
    "onnx": {"relative_error": 1e-5},
    "engine": {"bytes": 10, "architectures": [89, 120], "verified": False},
}
GOOD["policy-ema"] = GOOD["policy-static"]


def artifact(folder: Path, name: str, metrics: dict[str, Any]) -> Path:
    """A folder as the stage would have made it, sound apart from what `metrics` says."""
    folder.mkdir()
    write_metrics(folder, metrics)
    if name == "curated_dataset":
        conditions(folder, [("train", "a"), ("validation", "b"), ("test", "c")])
    if name == "onnx":
        shape = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1]), helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
        graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "g", [shape[0]], [shape[1]])
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), str(folder / "transformer.onnx"))
    if name == "engine":
        (folder / "transformer.engine").write_bytes(b"engine")
    return folder


def conditions(folder: Path, places: list[tuple[Split, str]], per_place: int = 4, pixels: int = 0) -> None:
    """Conditions in (split, source) places; with `pixels`, every image is the same one."""
    rows: list[Condition] = []
    with ShardWriter(folder) as shards:
        for split, source in places:
            for _ in range(per_place):
                key = f"c{len(rows)}"
                shards.add(f"{key}.image", Image.fromarray(np.full((2, 2, 3), pixels or 1 + len(rows), np.uint8)))
                rows.append(Condition(id=key, source_id=source, task="fill", prompt="p", split=split, kind="scene"))
    write_rows(folder / "conditions.jsonl", rows)


@pytest.mark.parametrize("name", CHECKS)
def test_a_sound_artifact_passes_every_gate_that_promotion_asks_for(tmp_path: Path, name: str) -> None:
    gates = check(name, artifact(tmp_path / "a", name, GOOD[name]), GateConfig())
    assert all(gate.passed for gate in gates), [str(gate) for gate in gates]
    assert tuple(gate.name for gate in gates) == REQUIRED_GATES[name]


def changed(name: str, change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    metrics = deepcopy(GOOD[name])
    change(metrics)
    return metrics


ema = GOOD["evaluation"]["policy"]["ema"]
UNSOUND = [
    ("preference_pairs", lambda m: m["cells"][1].update(dropped_share=0.31), "dropped_share", 0.31),
    ("preference_pairs", lambda m: m["cells"][1].pop("dropped_share"), "dropped_share", None),
    ("preference_pairs", lambda m: [cell.update(first_wins_share=0.1) for cell in m["cells"]], "class_balance", 0.4),
    ("reward_model", lambda m: m.update(mean_accuracy=0.59), "judge_accuracy", 0.59),
    ("reward_model", lambda m: m.update(order_consistency=0.69), "judge_order", 0.69),
    ("reward_model", lambda m: m.update(curve=[{"loss": math.nan}]), "judge_finite", 1),
    ("policy-static", lambda m: m.update(finite=False), "policy_finite", 1),
    ("policy-ema", lambda m: m.update(loss=math.inf), "policy_finite", 1),
    ("policy-ema", lambda m: m.update(relative_change=0.0), "policy_moved", 0),
    ("policy-ema", lambda m: m.update(preservation_psnr=29.6), "policy_preserved", 0.6),
    ("evaluation", lambda m: m["policy"]["ema"].update(mean_win_rate=0.54), "win_rate", 0.54),
    ("evaluation", lambda m: m["policy"]["ema"].update(mean_lo=0.5), "win_rate_lo", 0.5),
    ("evaluation", lambda m: m["policy"]["ema"]["tasks"][1].update(lo=0.29), "task_lo", 0.29),
    ("evaluation", lambda m: m["policy"]["ema"].update(missing_tasks=["extend"]), "task_lo", None),
    ("evaluation", lambda m: m["policy"]["ema"].update(preservation_psnr=29.6), "evaluation_preserved", 0.6),
    ("evaluation", lambda m: m["policy"]["ema"]["cells"][0].update(judge_win_rate=0.9, win_rate=0.3, hi=0.45), "hacked_cells", 1),
    ("evaluation", lambda m: m["policy"]["ema"]["cells"][0].pop("judge_win_rate"), "hacked_cells", 1),
    ("evaluation", lambda m: m["judge"].update(mean_accuracy=0.59), "sealed_judge_accuracy", 0.59),
    ("evaluation", lambda m: m.pop("judge"), "sealed_judge_accuracy", None),
    ("evaluation", lambda m: m.update(against_production={"ema": {"mean_lo": 0.39}}), "not_below_production", 0.39),
    ("evaluation", lambda m: m.update(against_production={"static": {"mean_lo": 0.6}}), "not_below_production", None),
    ("onnx", lambda m: m.update(relative_error=2e-3), "onnx_error", 2e-3),
    ("engine", lambda m: m.update(architectures=[]), "engine_architectures", 0),
    ("engine", lambda m: m.pop("verified"), "engine_verified", None),
]


@pytest.mark.parametrize(
    ("name", "change", "gate", "measure"), UNSOUND, ids=[f"{name}-{gate}-{i}" for i, (name, _, gate, _) in enumerate(UNSOUND)]
)
def test_an_unsound_artifact_fails_that_gate_alone(
    tmp_path: Path, name: str, change: Callable[[dict[str, Any]], object], gate: str, measure: float | None
) -> None:
    gates = check(name, artifact(tmp_path / "a", name, changed(name, change)), GateConfig())
    (failed,) = [each for each in gates if not each.passed]
    assert failed.name == gate and failed.measure == (pytest.approx(measure) if measure is not None else None)


@pytest.mark.parametrize("name", set(CHECKS) - {"curated_dataset"})
@pytest.mark.parametrize("metrics", ["{}", "cut short {", '{"policy": [], "cells": 3, "best_mode": "ema", "finite": true}', None])
def test_absent_figures_fail(tmp_path: Path, name: str, metrics: str | None) -> None:
    folder = artifact(tmp_path / "a", name, {})
    if metrics is None:
        (folder / "metrics.json").unlink()
    else:
        (folder / "metrics.json").write_text(metrics)
    can_pass = {"onnx_valid", "engine_built"}  # the file itself is there
    if metrics and "finite" in metrics:
        can_pass |= {"judge_finite", "policy_finite"}
    assert {gate.name for gate in check(name, folder, GateConfig()) if gate.passed} <= can_pass


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


def test_a_broken_onnx_file_fails_whatever_the_metrics_say(tmp_path: Path) -> None:
    folder = artifact(tmp_path / "a", "onnx", GOOD["onnx"])
    whole = (folder / "transformer.onnx").read_bytes()
    (folder / "transformer.onnx").write_bytes(whole[: len(whole) // 2])
    valid, error = check("onnx", folder, GateConfig())
    assert not valid.passed and "transformer.onnx" in valid.description and error.passed


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


GATES = [Gate("onnx_valid", 1, 1, True, "d"), Gate("onnx_error", 1e-4, 1e-3, True, "d")]
FAILED = [GATES[0], Gate("onnx_error", None, 1e-3, False, "d")]


@pytest.fixture
def store(tmp_path: Path) -> DvcStore:
    return DvcStore(tmp_path / "registry")


def test_the_newest_evidence_counts(store: DvcStore, tmp_path: Path) -> None:
    config = GateConfig()
    ref = store.put("onnx", artifact(tmp_path / "a", "onnx", GOOD["onnx"]))
    assert evidence_for(store, ref.digest) is None
    first = record_evidence(store, ref, GATES, config, "run-1")
    evidence = evidence_for(store, ref.digest)
    assert evidence is not None and evidence.passed and evidence.gates == tuple(GATES) and evidence.ref == first
    assert store.version(first.digest).parents == (ref,) and first.name == "gates-onnx"
    assert record_evidence(store, ref, GATES, config, "run-2") == first and len(store.versions("gates-onnx")) == 1
    record_evidence(store, ref, FAILED, config, "run-3")
    evidence = evidence_for(store, ref.digest)
    assert evidence is not None and not evidence.passed and [gate.name for gate in evidence.failed] == ["onnx_error"]
    record_evidence(store, ref, GATES, config, "run-4")  # the bytes of run-1's report again, yet the newest
    evidence = evidence_for(store, ref.digest)
    assert evidence is not None and evidence.passed
    record_evidence(store, ref, GATES[:1], config, "run-5")
    evidence = evidence_for(store, ref.digest)
    assert evidence is not None and not evidence.passed and evidence.missing == ("onnx_error",)


def test_a_report_about_another_version_is_refused(store: DvcStore, tmp_path: Path) -> None:
    ref = store.put("onnx", artifact(tmp_path / "a", "onnx", GOOD["onnx"]))
    for number, report in enumerate([{"subject": {"name": "onnx", "digest": "0" * 64}, "gates": []}, {"gates": []}, []]):
        folder = tmp_path / f"forged-{number}"
        folder.mkdir()
        (folder / "report.json").write_text(json.dumps(report))
        store.put("gates-onnx", folder, parents=[ref])
        with pytest.raises(GateRefused):
            evidence_for(store, ref.digest)
