"""Gates: what an artifact must measure before the chain may go on with it, and the evidence that promotion asks for.

    gates = check("onnx", store.get(ref), GateConfig())
    record_evidence(store, ref, gates, GateConfig(), run_id)
    evidence_for(store, ref.digest).passed

A check reads the artifact's own folder: rows and files where they tell more than `metrics.json`, else the metrics. Every gate
fails closed: a figure that is absent, not a number or infinite does not pass. Evidence is an artifact `gates-<name>` whose
parent is the version it speaks of; promotion (ops/promote.py) reads it again by digest.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pydantic

from infra.stores.base import ArtifactRef, ArtifactStore, directory_digest
from models.config import OpConfig
from models.errors import ConfigError, ExportError, GateRefused, UnknownVersion
from models.records import SPLITS, Condition, read_rows
from ops.folders import read_metrics

EVIDENCE_PREFIX = "gates-"
POLICY_PREFIX = "policy-"
Metrics = dict[str, Any]


class GateConfig(OpConfig):
    """The thresholds. The paper gates nothing, so all of them are ours."""

    min_per_split: int = pydantic.Field(4, ge=1, description="Conditions that each split holds at least (ours).")
    max_dropped_share: float = pydantic.Field(0.30, ge=0, le=1, description="Share of a cell's labels that may be ties (ours).")
    max_first_share_deviation: float = pydantic.Field(
        0.15, ge=0, le=0.5, description="How far the share of pairs won by the candidate shown first may be from one half (ours)."
    )
    min_judge_accuracy: float = pydantic.Field(0.60, ge=0, le=1, description="Mean accuracy of the judge on held-out pairs (ours).")
    min_order_consistency: float = pydantic.Field(
        0.70, ge=0, le=1, description="Share of pairs for which the judge names the same winner in both orders (ours)."
    )
    min_policy_change: float = pydantic.Field(1e-6, ge=0, description="Relative change of the policy's weights against the base's (ours).")
    max_psnr_drop: float = pydantic.Field(
        0.5, ge=0, description="How many dB the raw output's PSNR outside the mask may lie below the base's (ours)."
    )
    min_win_rate: float = pydantic.Field(
        0.55, ge=0, le=1, description="Mean win rate of the better mode over the base, by ground truth (ours)."
    )
    min_win_rate_lo: float = pydantic.Field(0.50, ge=0, le=1, description="What the lower bound of that mean must exceed (ours).")
    min_task_lo: float = pydantic.Field(
        0.30, ge=0, le=1, description="Lower bound of every single task's win rate: no task may collapse (ours)."
    )
    min_production_lo: float = pydantic.Field(
        0.40, ge=0, le=1, description="Lower bound of the mean win rate against production, where there is one: no step back (ours)."
    )
    max_hacked_cells: int = pydantic.Field(
        0,
        ge=0,
        description="Cells that the judge counts as won while ground truth's whole interval says lost: the judge was hacked there (ours).",
    )
    max_onnx_error: float = pydantic.Field(1e-3, gt=0, description="Relative error of the ONNX graph against torch (ours).")
    require_verified_engine: bool = pydantic.Field(
        False, description="Must the engine have been executed? Without a GPU it cannot be (ours: recorded, not required)."
    )


@dataclasses.dataclass(frozen=True)
class Gate:
    """One verdict. `measure` is None where the figure is absent or not finite; `threshold` is None where nothing is asked."""

    name: str
    measure: float | None
    threshold: float | None
    passed: bool
    description: str

    def __str__(self) -> str:
        measured = "nothing" if self.measure is None else f"{self.measure:.4g}"
        return f"{self.name}: measured {measured}, threshold {self.threshold} ({self.description})"


@dataclasses.dataclass(frozen=True)
class Evidence:
    """The gate report of one version."""

    ref: ArtifactRef  # of the report
    name: str  # of the subject
    digest: str
    gates: tuple[Gate, ...]

    @property
    def passed(self) -> bool:
        """Whether every required gate of the subject is there, and every gate passed."""
        return not self.missing and all(gate.passed for gate in self.gates)

    @property
    def missing(self) -> tuple[str, ...]:
        """Required gates that the report lacks."""
        return tuple(name for name in REQUIRED_GATES.get(self.name, ()) if name not in {gate.name for gate in self.gates})

    @property
    def failed(self) -> tuple[Gate, ...]:
        return tuple(gate for gate in self.gates if not gate.passed)


def check_curated(folder: Path, metrics: Metrics, config: GateConfig) -> list[Gate]:
    """No source image in two splits, counted from the rows and the pixels themselves; enough conditions in each split."""
    from ops.curate import leaked_sources  # brings torch, which promotion does not need

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
    """Few enough ties in every cell; the place in which a candidate was shown does not tell the winner."""
    cells = _rows(metrics, "cells")
    shares = {f"{cell.get('task')}, {cell.get('dimension')}": _number(cell, "dropped_share") for cell in cells}
    worst = max(shares, key=lambda cell: _or(shares[cell], math.inf), default="no cell")
    weights = [sum(_or(_number(cell, f"n_{split}"), 0.0) for split in SPLITS) for cell in cells]
    firsts = [_number(cell, "first_wins_share") for cell in cells]
    held = [(weight, first) for weight, first in zip(weights, firsts, strict=True) if weight]
    deviation = None
    if held and all(first is not None for _, first in held):
        deviation = abs(sum(weight * _or(first, math.nan) for weight, first in held) / sum(weight for weight, _ in held) - 0.5)
    return [
        _at_most("dropped_share", shares.get(worst), config.max_dropped_share, f"share of ties in the worst cell: {worst}"),
        _at_most("class_balance", deviation, config.max_first_share_deviation, "how far the first shown wins more or less than half"),
    ]


def check_reward_model(folder: Path, metrics: Metrics, config: GateConfig) -> list[Gate]:
    """The judge agrees with held-out labels, and with itself when the two images change places."""
    return [
        _finite("judge_finite", metrics),
        _at_least("judge_accuracy", _number(metrics, "mean_accuracy"), config.min_judge_accuracy, "mean over cells, held-out pairs"),
        _at_least("judge_order", _number(metrics, "order_consistency"), config.min_order_consistency, "same winner in both orders"),
    ]


def check_policy(folder: Path, metrics: Metrics, config: GateConfig) -> list[Gate]:
    """Health only: finite, moved, preserved. Whether the policy is better is the evaluation's to say."""
    finite = _finite("policy_finite", metrics)
    if metrics.get("finite") is not True:
        finite = dataclasses.replace(finite, measure=_or(finite.measure, 0.0) + 1, passed=False)
    return [
        finite,
        _above("policy_moved", _number(metrics, "relative_change"), config.min_policy_change, "relative change of the weights"),
        _preserved("policy_preserved", metrics, config),
    ]


def check_evaluation(folder: Path, metrics: Metrics, config: GateConfig) -> list[Gate]:
    """The better mode beats the base by ground truth, on no task badly, without touching what it should keep."""
    mode = metrics.get("best_mode")
    policies = metrics.get("policy")
    policy = policies.get(mode, {}) if isinstance(policies, dict) and isinstance(mode, str) else {}
    tasks, cells = _rows(policy, "tasks"), _rows(policy, "cells")
    bounds = {str(task.get("task")): _number(task, "lo") for task in tasks}
    bounds |= dict.fromkeys(map(str, policy.get("missing_tasks") or []))
    worst = min(bounds, key=lambda task: _or(bounds[task], -math.inf), default="no task")
    hacked = [f"{cell.get('task')}/{cell.get('dimension')}" for cell in cells if _hacked(cell)]
    sealed = metrics.get("judge")
    judge: Metrics = sealed if isinstance(sealed, dict) else {}
    of_mode = f"of the better mode, {mode}"
    return [
        _at_least("win_rate", _number(policy, "mean_win_rate"), config.min_win_rate, f"mean win rate over the base {of_mode}"),
        _above("win_rate_lo", _number(policy, "mean_lo"), config.min_win_rate_lo, f"lower bound of the mean win rate {of_mode}"),
        _at_least("task_lo", bounds.get(worst), config.min_task_lo, f"lower bound on the worst task {of_mode}: {worst}"),
        _preserved("evaluation_preserved", policy, config),
        _at_most(
            "hacked_cells",
            len(hacked) if cells else None,
            config.max_hacked_cells,
            f"cells won by the judge and lost by ground truth beyond its interval{': ' if hacked else ''}{', '.join(hacked)}",
        ),
        _at_least(
            "sealed_judge_accuracy", _number(judge, "mean_accuracy"), config.min_judge_accuracy, "mean over cells, sealed test pairs"
        ),
        _not_below_production(metrics, mode, config),
    ]


def _not_below_production(metrics: Metrics, mode: Any, config: GateConfig) -> Gate:
    if metrics.get("policy") and "against_production" not in metrics:
        return _at_most("not_below_production", 0, 0, "rivals in production: there is nothing to fall below yet")
    rivals = metrics.get("against_production")
    rival = rivals.get(mode) if isinstance(rivals, dict) else None
    low = _number(rival, "mean_lo") if isinstance(rival, dict) else None
    return _at_least("not_below_production", low, config.min_production_lo, "lower bound of the mean win rate against production")


def _hacked(cell: Metrics) -> bool:
    """The judge says better and ground truth says worse, beyond its interval. A figure that is absent or not finite counts as hacked.

    A cell whose `judge_win_rate` is null has a dimension the judge does not know, and cannot be hacked.
    """
    if cell.get("judge_win_rate", math.nan) is None:
        return False
    judged, high = _number(cell, "judge_win_rate"), _number(cell, "hi")
    return judged is None or high is None or (judged > 0.5 and high < 0.5)


def check_onnx(folder: Path, metrics: Metrics, config: GateConfig) -> list[Gate]:
    """The file itself passes ONNX's checker and loads in ONNX Runtime; its error was measured and is small."""
    from ops.export_onnx import FILE, open_session  # brings torch, which promotion does not need

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

# What promotion asks of each: written out and not taken from a report, so that a report cannot leave a gate out.
_HEALTH = ("policy_finite", "policy_moved", "policy_preserved")
REQUIRED_GATES: dict[str, tuple[str, ...]] = {
    "curated_dataset": ("split_leak", "split_size"),
    "preference_pairs": ("dropped_share", "class_balance"),
    "reward_model": ("judge_finite", "judge_accuracy", "judge_order"),
    "policy-static": _HEALTH,
    "policy-ema": _HEALTH,
    "evaluation": (
        "win_rate",
        "win_rate_lo",
        "task_lo",
        "evaluation_preserved",
        "hacked_cells",
        "sealed_judge_accuracy",
        "not_below_production",
    ),
    "onnx": ("onnx_valid", "onnx_error"),
    "engine": ("engine_built", "engine_architectures", "engine_verified"),
}


def check(name: str, folder: Path, config: GateConfig) -> list[Gate]:
    """The gates of an artifact by name. A folder without readable metrics fails those that need them.

    Raises ConfigError for an artifact that has no gates.
    """
    if name not in CHECKS:
        raise ConfigError(f"{name} has no gates.", f"Those with gates are {', '.join(CHECKS)}.")
    try:
        metrics = read_metrics(folder)
    except (UnknownVersion, ValueError):
        metrics = {}
    return CHECKS[name](folder, metrics, config)


def record_evidence(store: ArtifactStore, ref: ArtifactRef, gates: list[Gate], config: GateConfig, run_id: str) -> ArtifactRef:
    """Store the gate report of a version as `gates-<name>`; the newest report of a version is the one that counts.

    The same verdict again is stored once. Raises DiskFull or StoreError.
    """
    report = {"subject": {"name": ref.name, "digest": ref.digest}, "gates": [dataclasses.asdict(gate) for gate in gates]}
    name = EVIDENCE_PREFIX + ref.name
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "report.json").write_text(json.dumps(report, indent=2, sort_keys=True, allow_nan=False) + "\n")
        earlier = _reports(store, ref.digest)
        if earlier and earlier[-1].digest == directory_digest(folder)[0]:
            return earlier[-1]
        # The count keeps a verdict that returns (passed, failed, passed) from being taken for the first one.
        key = f"{ref.digest}:{config.digest()}:{len(earlier)}"
        metadata = {"passed": all(gate.passed for gate in gates)}
        return store.put(name, folder, key=key, parents=[ref], run_id=run_id, config=config.model_dump(mode="json"), metadata=metadata)


def evidence_for(store: ArtifactStore, digest: str) -> Evidence | None:
    """The newest gate report about a version, its bytes verified, or None.

    Raises DigestMismatch for a report that was altered and GateRefused for one that cannot be read or speaks of another version.
    """
    reports = _reports(store, digest)
    if not reports:
        return None
    ref = reports[-1]
    try:
        report = json.loads((store.get(ref) / "report.json").read_text())
        subject = report["subject"]
        evidence = Evidence(ref, subject["name"], subject["digest"], tuple(Gate(**gate) for gate in report["gates"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GateRefused(f"The gate report {ref.digest[:12]} cannot be read: {error}.", "Materialize the checked asset again.") from error
    if evidence.digest != digest or EVIDENCE_PREFIX + evidence.name != ref.name:
        raise GateRefused(f"The gate report {ref.digest[:12]} speaks of another version.", "Materialize the checked asset again.")
    return evidence


def _reports(store: ArtifactStore, digest: str) -> list[ArtifactRef]:
    found = [v for v in store.versions() if v.ref.name.startswith(EVIDENCE_PREFIX)]
    return [v.ref for v in found if any(parent.digest == digest for parent in v.parents)]


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
