"""The end of a run on one page: report.json for machines, report.html for people, the records beside them.

    write_report(Path("report"), folders={"evaluation": folder, ...}, versions={...}, run=RunFacts(...), taxonomy=Taxonomy.load())

Both files are written wherever the chain stopped: what was not reached is null in report.json and left out of the page, which
is one self-contained file (pictures and plots inside). `items.jsonl` and its neighbours are copied from the artifacts, so
that every figure can be recomputed without the store.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infra.disk import writing
from infra.stores.base import Version
from models.taxonomy import Taxonomy
from ops.folders import read_metrics
from ops.lineage import POLICY_PREFIX
from ops.probe import CHECKPOINTS
from ops.report_page import render_page
from ops.second_opinion import SECOND_OPINIONS
from ops.win_rates import ITEMS, PAIRS

RECORDS = {
    **{name: ("evaluation", name) for name in (ITEMS, PAIRS, SECOND_OPINIONS)},
    "judge-validation.jsonl": ("reward_model", "accuracy.jsonl"),
    "judge-curve.jsonl": ("reward_model", "curve.jsonl"),
}
_TRAINED = ("steps", "best_step", "over_optimised", "rewarded", "looks")  # of a policy's metrics


@dataclass(frozen=True)
class RunFacts:
    """What only the run itself knows."""

    wall_s: float
    peak_rss_gb: float
    overhead_share: float  # orchestration and versioning, share of wall time
    commit: str
    gates: Sequence[Mapping[str, Any]] = ()  # {name, measure, threshold, passed, description, ...} in the order they were asked
    release: Mapping[str, Any] | None = None  # {version, stage, digest, approval if any}; None where nothing was released
    starts: Sequence[Mapping[str, Any]] = ()  # {version, digest, made}: the release that the artifacts in `made` went on from
    refused: str | None = None  # why the chain refused, in words
    reused: Sequence[str] = ()  # artifacts that were already made
    stage_seconds: Mapping[str, float] = field(default_factory=dict)


def write_report(
    out: Path, *, folders: Mapping[str, Path], versions: Mapping[str, Version], run: RunFacts, taxonomy: Taxonomy
) -> tuple[Path, Path]:
    """Write report.json, report.html and the records into the folder `out`, which is there whole or not at all: an earlier one is replaced.

    Args:
        folders, versions: by artifact name, everything this run made or reused; fewer where the chain stopped.

    Raises DiskFull, ConfigError where `out` cannot be written.
    """
    metrics = {name: read_metrics(folder) for name, folder in folders.items()}
    facts = _without_infinities(_facts(metrics, versions, run))
    page = render_page(facts, metrics, folders, taxonomy)
    draft = out.with_name(f"{out.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)  # of a run that was killed here
    try:
        with writing(out):
            draft.mkdir(parents=True)
            (draft / "report.json").write_text(json.dumps(facts, indent=2) + "\n")
            _copy_records(draft, folders)
            (draft / "report.html").write_text(page, encoding="utf-8")
            shutil.rmtree(out, ignore_errors=True)
            draft.replace(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return out / "report.json", out / "report.html"


def _facts(metrics: Mapping[str, dict[str, Any]], versions: Mapping[str, Version], run: RunFacts) -> dict[str, Any]:
    """report.json: null for what the chain did not reach."""
    evaluation = metrics.get("evaluation", {})
    fitted = metrics.get("reward_model")  # on the validation split: all there is when the chain stops before evaluation
    engine = metrics.get("engine")
    return {
        "wall_s": run.wall_s,
        "peak_rss_gb": run.peak_rss_gb,
        "overhead_share": run.overhead_share,
        "commit": run.commit,
        "judge": evaluation.get("judge", fitted),
        "evidence": evaluation.get("evidence"),
        "second_judge": evaluation.get("second_judge"),
        "policy": evaluation.get("policy"),
        "best_mode": evaluation.get("best_mode"),
        "chosen_on": evaluation.get("chosen_on"),
        "split": evaluation.get("split"),
        "sampling": evaluation.get("sampling"),
        "not_evaluated": evaluation.get("not_evaluated"),
        "photos": evaluation.get("photos"),
        "withheld": evaluation.get("withheld"),
        "absolute": evaluation.get("absolute"),
        "seen": evaluation.get("seen"),
        "against_production": evaluation.get("against_production"),
        "pairs": metrics.get("preference_pairs", {}).get("cells"),
        "training": {
            name.removeprefix(POLICY_PREFIX): {key: found.get(key) for key in _TRAINED}
            for name, found in metrics.items()
            if name.startswith(POLICY_PREFIX)
        }
        or None,
        "onnx": {"relative_error": metrics["onnx"]["relative_error"]} if "onnx" in metrics else None,
        "engine": {name: engine[name] for name in ("bytes", "architectures", "verified")} if engine else None,
        "gates": [dict(gate) for gate in run.gates],
        "release": dict(run.release) if run.release else None,
        "starts": [dict(start) for start in run.starts],
        "refused": run.refused,
        "reused": list(run.reused),
        "stages": dict(run.stage_seconds),
        "artifacts": {
            name: {
                "version": version.number,
                "digest": version.ref.digest,
                "bytes": version.ref.size,
                "parents": [{"name": parent.name, "digest": parent.digest} for parent in version.parents],
                "created": version.created,
            }
            for name, version in versions.items()
        },
    }


def _without_infinities(value: Any) -> Any:
    """JSON has no nan and no infinity: a ruined policy's figures become null."""
    if isinstance(value, dict):
        return {name: _without_infinities(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_infinities(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _copy_records(out: Path, folders: Mapping[str, Path]) -> None:
    wanted = dict(RECORDS)
    for policy in (name for name in folders if name.startswith(POLICY_PREFIX)):
        wanted |= {f"{policy}-{record}": (policy, record) for record in ("curve.jsonl", CHECKPOINTS)}
    for target, (name, source) in wanted.items():
        if name in folders and (folders[name] / source).exists():
            shutil.copyfile(folders[name] / source, out / target)
