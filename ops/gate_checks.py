"""What each artifact is measured on before the chain may go on with it.

    gates = check("onnx", store.get(ref), GateConfig())

A check reads the artifact's own folder: rows and files where they tell more than `metrics.json`, else the metrics. Every gate
fails closed: a figure that is absent, not a number or infinite does not pass.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from models.errors import ConfigError, ExportError, UnknownVersion
from models.records import SPLITS, Condition, read_rows
from ops.curate import leaked_sources
from ops.export_onnx import FILE, open_session
from ops.folders import read_metrics
from ops.gate import POLICY_PREFIX, Gate, GateConfig
from ops.gate_estimates import with_estimates
from ops.policy_health import stored_change

Metrics = dict[str, Any]


def check_curated(folder: Path, metrics: Metrics, config: GateConfig) -> list[Gate]:
    """No source image in two splits, counted from the rows and the pixels themselves; enough conditions in each split."""
    rows = read_rows(folder / "conditions.jsonl", Condition)
    splits: dict[str, set[str]] = {}
    for row in rows:
        splits.setdefault(row.source_id, set()).add(row.split)
    leaked = sorted({source for source, found in splits.items() if len(found) > 1} | set(leaked_sources(folder)))
    counts = Counter(row.split for row in rows)
    smallest = min(SPLITS, key=lambda split: counts[split])
    shown = f": {', '.join(leaked[:3])}" if leaked else ""
    return [
        _at_most("split_leak", float(len(leaked)), 0, f"source images in more than one split{shown}"),
        _at_least("split_size", float(counts[smallest]), config.min_per_split, f"conditions in the smallest split, {smallest}"),
    ]


def check_pairs(folder: Path, metrics: Metrics, config: GateConfig) -> list[Gate]:
    """Few enough ties in every cell; the place in which a candidate was shown does not tell the winner.

    A cell of which the data holds no condition is not asked for.
    """
    cells = [cell for cell in _rows(metrics, "cells") if _number(cell, "conditions") != 0]
    shares = {f"{cell.get('task')}, {cell.get('dimension')}": _number(cell, "dropped_share") for cell in cells}
    worst = max(shares, key=lambda cell: _or(shares[cell], math.inf), default="no cell")
    unlabelled = worst in shares and shares[worst] is None
    remedy = "; nobody has labelled its conditions: import labels for them, or leave the task out of the data" if unlabelled else ""
    weights = [sum(_or(_number(cell, f"n_{split}"), 0.0) for split in SPLITS) for cell in cells]
    firsts = [_number(cell, "first_wins_share") for cell in cells]
    held = [(weight, first) for weight, first in zip(weights, firsts, strict=True) if weight]
    deviation = None
    if held and all(first is not None for _, first in held):
        deviation = abs(sum(weight * _or(first, math.nan) for weight, first in held) / sum(weight for weight, _ in held) - 0.5)
    return [
        _at_most("dropped_share", shares.get(worst), config.max_dropped_share, f"share of ties in the worst cell: {worst}{remedy}"),
        _at_most("class_balance", deviation, config.max_first_share_deviation, "how far the first shown wins more or less than half"),
    ]


def check_reward_model(folder: Path, metrics: Metrics, config: GateConfig) -> list[Gate]:
    """The judge agrees with held-out labels, and with itself when the two images change places."""
    return [
        _finite("judge_finite", metrics),
        _at_least("judge_accuracy", _number(metrics, "mean_accuracy"), config.min_judge_accuracy, "mean over cells, held-out pairs"),
        _at_least("judge_order", _number(metrics, "order_consistency"), config.min_order_consistency, "both orders alike, mean over cells"),
    ]


def check_policy(folder: Path, metrics: Metrics, config: GateConfig) -> list[Gate]:
    """Health only: finite, moved, preserved. Whether the policy is better is the evaluation's to say.

    `check` has put what the stored weights say in the place of what training said of them; preservation stays as training measured it.
    """
    finite = _finite("policy_finite", metrics)
    if metrics.get("finite") is not True:
        finite = dataclasses.replace(finite, measure=_or(finite.measure, 0.0) + 1, passed=False)
    return [
        finite,
        _above("policy_moved", _number(metrics, "relative_change"), config.min_policy_change, "relative change of the weights"),
        _preserved("policy_preserved", metrics, config),
    ]


def check_evaluation(folder: Path, metrics: Metrics, config: GateConfig) -> list[Gate]:
    """The better mode beats the base by the evidence's measures, on no task badly, without touching what it should keep.

    A task of which no condition was tested is not asked for; the metrics name it under `not_evaluated`.
    """
    mode = metrics.get("best_mode")
    policies = metrics.get("policy")
    policy = policies.get(mode, {}) if isinstance(policies, dict) and isinstance(mode, str) else {}
    tested = [row for row in _rows(policy, "tasks") if (_number(row, "n"), _number(row, "n_without_truth")) != (0, 0)]
    cells = _rows(policy, "cells")
    bounds = {str(row.get("task")): _number(row, "lo") for row in tested if _number(row, "n")}
    worst = min(bounds, key=lambda task: _or(bounds[task], -math.inf), default="no task")
    hacked = [f"{cell.get('task')}/{cell.get('dimension')}" for cell in cells if _hacked(cell)]
    sealed = metrics.get("judge")
    judge: Metrics = sealed if isinstance(sealed, dict) else {}
    of_mode = f"of the better mode, {mode}"
    return [
        _known_truth(tested, metrics.get("evidence"), config),
        _at_least("win_rate", _number(policy, "mean_win_rate"), config.min_win_rate, f"mean win rate over the base {of_mode}"),
        _above("win_rate_lo", _number(policy, "mean_lo"), config.min_win_rate_lo, f"lower bound of the mean win rate {of_mode}"),
        _at_least("task_lo", bounds.get(worst), config.min_task_lo, f"lower bound on the worst task {of_mode}: {worst}"),
        _preserved("evaluation_preserved", policy, config),
        _at_most(
            "evaluation_looks_kept",
            _minus(_number(policy, "base_outside_similarity"), _number(policy, "outside_similarity")),
            config.max_similarity_drop,
            "below the base's likeness to the source outside the mask, raw output",
        ),
        _at_most(
            "hacked_cells",
            len(hacked) if cells else None,
            config.max_hacked_cells,
            f"cells won by the judge and lost by the measures beyond their interval{': ' if hacked else ''}{', '.join(hacked)}",
        ),
        _at_least(
            "sealed_judge_accuracy",
            _number(judge, "mean_accuracy"),
            config.min_judge_accuracy,
            f"mean over cells, {judge.get('n', 0)} sealed test pairs",
        ),
        _at_least(
            "acceptance_lo",
            _number(policy, "acceptance_mean_lo"),
            config.min_acceptance_lo,
            f"lower bound of the mean win rate by the acceptance measures {of_mode}",
        ),
        _not_below_production(metrics, mode, config),
    ]


def _known_truth(tested: list[Metrics], evidence: Any, config: GateConfig) -> Gate:
    """Were wins counted by what the preset asks for, on every tested task? `tested` are the rows of the tasks with test conditions."""
    uncounted = [str(row.get("task")) for row in tested if not _number(row, "n")]
    count = float(len(uncounted)) if tested else None
    if evidence == "blind" and not config.require_ground_truth:
        told = "not asked under `evidence: blind`, where measures that need no target count; tested tasks without any of them"
        return Gate("ground_truth", count, None, count == 0, f"{told}{': ' if uncounted else ''}{', '.join(uncounted)}")
    if evidence != "ground_truth":
        told = "wins counted against known targets; this evaluation counted by other measures, which the preset in force does not accept"
        return Gate("ground_truth", None, 0, False, told)
    told = "tested tasks without a condition whose perfect edit is known"
    if uncounted:
        told += (
            f": {', '.join(uncounted)}. Only procedural scenes have one: run with scenes in the data (section source_images, `path` empty"
            " and `n_scenes` above 0), or let measures count that need no target (section evaluation, `evidence: blind`)"
        )
    return _at_most("ground_truth", count, 0, told)


def _not_below_production(metrics: Metrics, mode: Any, config: GateConfig) -> Gate:
    if metrics.get("policy") and "against_production" not in metrics:
        return _at_most("not_below_production", 0, 0, "rivals in production: there is nothing to fall below yet")
    rivals = metrics.get("against_production")
    rival = rivals.get(mode) if isinstance(rivals, dict) else None
    low = _number(rival, "mean_lo") if isinstance(rival, dict) else None
    return _at_least("not_below_production", low, config.min_production_lo, "lower bound of the mean win rate against production")


def _hacked(cell: Metrics) -> bool:
    """The judge says better and the measures say worse, beyond their interval. A figure that is absent or not finite counts as hacked.

    A cell whose `judge_win_rate` is null has a dimension the judge does not know, and cannot be hacked.
    """
    if cell.get("judge_win_rate", math.nan) is None:
        return False
    judged, high = _number(cell, "judge_win_rate"), _number(cell, "hi")
    return judged is None or high is None or (judged > 0.5 and high < 0.5)


def check_onnx(folder: Path, metrics: Metrics, config: GateConfig) -> list[Gate]:
    """The file itself passes ONNX's checker and loads in ONNX Runtime; its error was measured and is small."""
    told = "the file passes ONNX's checker and loads in ONNX Runtime"
    try:
        open_session(folder / FILE)
        valid = 1.0
    except ExportError as refused:
        valid, told = 0.0, f"{told}: {refused.what}"
    error = _number(metrics, "relative_error")
    return [
        _at_least("onnx_valid", valid, 1, told),
        _at_most("onnx_error", error, config.max_onnx_error, "relative error against torch, worst of the shapes"),
    ]


def check_engine(folder: Path, metrics: Metrics, config: GateConfig) -> list[Gate]:
    """The engine was built, and for named architectures; whether it ever ran is recorded."""
    size = sum(path.stat().st_size for path in folder.glob("*.engine"))
    architectures = metrics.get("architectures")
    named = float(len(architectures)) if isinstance(architectures, list) else None
    verified = metrics.get("verified")
    measure = float(verified) if isinstance(verified, bool) else None
    asked = 1.0 if config.require_verified_engine else None
    ran = measure is not None and (asked is None or measure >= asked)
    return [
        _at_least("engine_built", float(size), 1, "bytes of the engine"),
        _at_least("engine_architectures", named, 1, "architectures it was built for"),
        Gate("engine_verified", measure, asked, ran, "1 when the engine was executed on a GPU, 0 when it is unverified"),
    ]


# Artifact -> its check, in the chain's order.
CHECKS: dict[str, Callable[[Path, Metrics, GateConfig], list[Gate]]] = {
    "curated_dataset": check_curated,
    "preference_pairs": check_pairs,
    "reward_model": check_reward_model,
    "policy-static": check_policy,
    "policy-ema": check_policy,
    "evaluation": check_evaluation,
    "onnx": check_onnx,
    "engine": check_engine,
}


def check(name: str, folder: Path, config: GateConfig, base: Path | None = None) -> list[Gate]:
    """The gates of an artifact by name. A folder without readable metrics fails those that need them.

    `base` is the base pipeline's folder, from which a policy's stored weights must have moved; without it they have not.
    Raises ConfigError for an artifact that has no gates.
    """
    if name not in CHECKS:
        raise ConfigError(f"{name} has no gates.", f"Those with gates are {', '.join(CHECKS)}.")
    try:
        metrics = read_metrics(folder)
    except (UnknownVersion, ValueError):
        metrics = {}
    if name.startswith(POLICY_PREFIX):
        change = stored_change(base, folder) if base else math.nan
        metrics = {**metrics, "relative_change": change, "finite": metrics.get("finite") is True and math.isfinite(change)}
    return with_estimates(CHECKS[name](folder, metrics, config), metrics)


# Verdicts


def _at_least(name: str, measure: float | None, threshold: float, description: str) -> Gate:
    return Gate(name, measure, threshold, measure is not None and measure >= threshold, f"at least: {description}")


def _above(name: str, measure: float | None, threshold: float, description: str) -> Gate:
    return Gate(name, measure, threshold, measure is not None and measure > threshold, f"above: {description}")


def _at_most(name: str, measure: float | None, threshold: float, description: str) -> Gate:
    measure = measure if measure is not None and math.isfinite(measure) else None
    return Gate(name, measure, threshold, measure is not None and measure <= threshold, f"at most: {description}")


def _finite(name: str, metrics: Metrics) -> Gate:
    return _at_most(name, float(_broken(metrics)) if metrics else None, 0, "figures that are not finite")


def _preserved(name: str, figures: Metrics, config: GateConfig) -> Gate:
    drop = _minus(_number(figures, "base_preservation_psnr"), _number(figures, "preservation_psnr"))
    return _at_most(name, drop, config.max_psnr_drop, "dB below the base outside the mask, raw output")


# Figures


def _number(figures: Metrics, name: str) -> float | None:
    """A finite number, or None."""
    value = figures.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def _rows(figures: Metrics, name: str) -> list[Metrics]:
    value = figures.get(name)
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []


def _minus(value: float | None, other: float | None) -> float | None:
    return None if value is None or other is None else value - other


def _or(value: float | None, otherwise: float) -> float:
    return otherwise if value is None else value


def _broken(value: Any) -> int:
    """How many numbers in a JSON value are not finite."""
    if isinstance(value, dict):
        return sum(map(_broken, value.values()))
    if isinstance(value, list):
        return sum(map(_broken, value))
    return int(isinstance(value, float) and not math.isfinite(value))
