"""Gates: their thresholds, their verdicts, and the evidence that promotion asks for.

    gates = check("onnx", store.get(ref), GateConfig())      # ops/gate_checks.py measures
    record_evidence(store, keys, ref, gates, GateConfig(), code_version="5c", not_verified=[], run_id=run_id, tmp=tmp)
    evidence_for(store, keys, ref).passed

Evidence is an artifact `gates-<name>` whose parent is the version it speaks of. It keeps that version's digest and those of
everything it was made from, every gate's figure with its interval and number of cases, the thresholds in force, the version of
the code that measured, and what nobody verified. It is signed (infra/signing.py), the signature lies in its record; promotion
(ops/promote.py) reads it again by digest.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import pydantic

from infra.disk import no_space
from infra.signing import Keys
from infra.stores.base import ArtifactRef, ArtifactStore, directory_digest
from models.config import OpConfig
from models.errors import DiskFull, GateRefused, SignatureRefused, UnknownVersion
from ops.folders import read_metrics

EVIDENCE_PREFIX = "gates-"
SIGNATURE = "signature"  # metadata of a signed artifact: model-signing's bundle


class GateConfig(OpConfig):
    """The thresholds. The paper gates nothing, so all of them are ours."""

    min_per_split: int = pydantic.Field(4, ge=1, description="Conditions that each split holds at least (ours).")
    max_dropped_share: float = pydantic.Field(0.30, ge=0, le=1, description="Share of a cell's labels that may be ties (ours).")
    max_first_share_deviation: float = pydantic.Field(
        0.15, ge=0, le=0.5, description="How far the share of pairs won by the candidate shown first may be from one half (ours)."
    )
    min_judge_accuracy: float = pydantic.Field(
        0.60,
        ge=0,
        le=1,
        description="Mean accuracy of the judge: on validation pairs once fitted, on sealed ones in the evaluation (ours).",
    )
    min_order_consistency: float = pydantic.Field(
        0.70, ge=0, le=1, description="Share of pairs for which the judge names the same winner in both orders, mean over cells (ours)."
    )
    min_policy_change: float = pydantic.Field(
        1e-6, ge=0, description="Relative change of the policy's weights against those it started from (ours)."
    )
    max_psnr_drop: float = pydantic.Field(
        0.5, ge=0, description="How many dB the raw output's PSNR outside the mask may lie below the base's (ours)."
    )
    max_similarity_drop: float = pydantic.Field(
        0.02, ge=0, le=1, description="How far the raw output's likeness to its source outside the mask may lie below the base's (ours)."
    )
    require_ground_truth: bool = pydantic.Field(
        True,
        description="Must wins be counted against known targets? False, unless set here, where the preset's evaluation says "
        "`evidence: blind` (ours).",
    )
    require_second_judge: bool = pydantic.Field(
        False,
        description="Must a judge that was not fitted here have been asked? True, unless set here, where the preset names one (ours).",
    )
    min_win_rate: float = pydantic.Field(
        0.55, ge=0, le=1, description="Mean win rate of the better mode over the base, by ground truth (ours)."
    )
    min_win_rate_lo: float = pydantic.Field(0.50, ge=0, le=1, description="What the lower bound of that mean must exceed (ours).")
    min_task_lo: float = pydantic.Field(
        0.30, ge=0, le=1, description="Lower bound of every single task's win rate: no task may collapse (ours)."
    )
    min_confirming_lo: float = pydantic.Field(
        0.45,
        ge=0,
        le=1,
        description="Lower bound of the mean win rate by the family of measures that does not count wins, and by the second judge "
        "where the preset names one: no step back by them (ours).",
    )
    min_production_lo: float = pydantic.Field(
        0.45,
        ge=0,
        le=1,
        description="Lower bound of the mean win rate against production, where there is one: no step back; .50 asks for proof that it "
        "is better (ours).",
    )
    min_cell_lo: float | None = pydantic.Field(
        0.45,
        ge=0,
        le=1,
        description="Lower bound of every single cell's win rate, against the base and against production: not worse anywhere by more "
        "than a margin of .05. None: measured and printed with the sample it needs, not gated (ours).",
    )
    max_hacked_cells: int = pydantic.Field(
        0,
        ge=0,
        description="Cells that the judge counts as won, over the base or over production, while the measures prove them lost: the judge "
        "was hacked there (ours).",
    )
    family_error: float = pydantic.Field(
        0.05,
        ge=0.025,
        lt=1,
        description="Chance that any place is called hacked wrongly, over all that one gate asks (Holm's correction; ours). The bootstrap "
        "of ops/probe.py tells no smaller one.",
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
    interval: tuple[float, float] | None = None  # of the measure, where it was estimated from cases
    n: int | None = None  # the cases it was estimated from

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
    thresholds: Mapping[str, float | None]  # those of GateConfig that these gates were held against
    code_version: str  # of the checks that measured
    not_verified: tuple[str, ...]  # sentences

    @property
    def passed(self) -> bool:
        """Whether every required gate of the subject is there, and every gate passed."""
        return not self.missing and all(gate.passed for gate in self.gates)

    @property
    def missing(self) -> tuple[str, ...]:
        """Required gates that the report lacks."""
        return tuple(name for name in REQUIRED_GATES.get(self.name, ()) if name not in {gate.name for gate in self.gates})

    def laxer_than(self, config: GateConfig) -> list[str]:
        """The thresholds it was recorded under that ask for less than `config` does, each with both values."""
        lax = []
        for name, held in self.thresholds.items():
            asked = getattr(config, name)
            if asked is None:
                continue
            if held is None or (held > asked if name.startswith("max_") else held < asked):
                lax.append(f"{name} {held} ({asked} is in force)")
        return lax


# What promotion asks of each: written out and not taken from a report, so that a report cannot leave a gate out.
_HEALTH = ("policy_finite", "policy_moved", "policy_preserved", "hacking")
REQUIRED_GATES: dict[str, tuple[str, ...]] = {
    "curated_dataset": ("split_leak", "split_size"),
    "preference_pairs": ("dropped_share", "class_balance"),
    "reward_model": ("judge_finite", "judge_accuracy", "judge_order"),
    "policy-static": _HEALTH,
    "policy-ema": _HEALTH,
    "evaluation": (
        "ground_truth",
        "sealed_split",
        "win_rate",
        "win_rate_lo",
        "task_lo",
        "cell_lo",
        "evaluation_preserved",
        "evaluation_looks_kept",
        "hacked_cells",
        "lost_facts",
        "sealed_judge_accuracy",
        "confirming_lo",
        "second_judge_lo",
        "not_below_production",
        "lost_tasks",
        "production_cell_lo",
    ),
    "onnx": ("onnx_valid", "onnx_error"),
    "engine": ("engine_built", "engine_architectures", "engine_verified"),
}

# Of these, what was not asked for from the beginning: releases that were promoted before lack it.
NEWER_GATES = ("sealed_split", "second_judge_lo", "lost_tasks", "lost_facts")

# The thresholds behind each artifact's gates. They are part of its evidence: a laxer one must not pass for the one in force.
_HEALTH_THRESHOLDS = ("min_policy_change", "max_psnr_drop", "family_error")
THRESHOLDS: dict[str, tuple[str, ...]] = {
    "curated_dataset": ("min_per_split",),
    "preference_pairs": ("max_dropped_share", "max_first_share_deviation"),
    "reward_model": ("min_judge_accuracy", "min_order_consistency"),
    "policy-static": _HEALTH_THRESHOLDS,
    "policy-ema": _HEALTH_THRESHOLDS,
    "evaluation": (
        "min_win_rate",
        "min_win_rate_lo",
        "min_task_lo",
        "min_cell_lo",
        "max_psnr_drop",
        "max_similarity_drop",
        "require_ground_truth",
        "require_second_judge",
        "max_hacked_cells",
        "family_error",
        "min_judge_accuracy",
        "min_confirming_lo",
        "min_production_lo",
    ),
    "onnx": ("max_onnx_error",),
    "engine": ("require_verified_engine",),
}


def record_evidence(
    store: ArtifactStore,
    keys: Keys,
    ref: ArtifactRef,
    gates: list[Gate],
    config: GateConfig,
    *,
    code_version: str,
    not_verified: Sequence[str],
    run_id: str,
    tmp: Path,
) -> ArtifactRef:
    """Sign and store the gate report of a version as `gates-<name>`; the newest report of a version is the one that counts.

    The same verdict again is stored once. The draft lies in `tmp`, an existing folder. Raises DiskFull, StoreError or
    SignatureRefused where the home may not sign.
    """
    lineage = {f"{v.ref.name} {v.number}": v.ref.digest for v in store.lineage(ref.digest) if v.ref.digest != ref.digest}
    report = {
        "subject": {"name": ref.name, "digest": ref.digest},
        "lineage": lineage,
        "gates": [dataclasses.asdict(gate) for gate in gates],
        "thresholds": {name: getattr(config, name) for name in THRESHOLDS.get(ref.name, ())},
        "code_version": code_version,
        "not_verified": [*not_verified, *(f"{gate.name}: no figure was measured." for gate in gates if gate.measure is None)],
    }
    name = EVIDENCE_PREFIX + ref.name
    try:
        with tempfile.TemporaryDirectory(dir=tmp) as temporary:
            folder = Path(temporary)
            (folder / "report.json").write_text(json.dumps(report, indent=2, sort_keys=True, allow_nan=False) + "\n")
            earlier = _reports(store, ref)
            if earlier and earlier[-1].digest == directory_digest(folder)[0]:
                with suppress(SignatureRefused):  # its key is no longer trusted: sign it anew
                    verified(store, keys, earlier[-1])
                    return earlier[-1]
            # The count keeps a verdict that returns (passed, failed, passed) from being taken for the first one.
            key = f"{ref.digest}:{config.digest()}:{len(earlier)}"
            metadata = {"passed": all(gate.passed for gate in gates), SIGNATURE: keys.sign_folder(folder)}
            return store.put(
                name,
                folder,
                key=key,
                parents=[ref],
                run_id=run_id,
                code_version=code_version,
                config=config.model_dump(mode="json"),
                metadata=metadata,
            )
    except OSError as error:
        if no_space(error):
            raise DiskFull(f"No space left for the gate report of {ref.name}.", "Free some space and run again.") from error
        raise


def not_verified(folder: Path) -> list[str]:
    """What an artifact's own metrics say nobody measured, in sentences."""
    try:
        metrics = read_metrics(folder)
    except (UnknownVersion, ValueError):
        return ["The artifact has no readable metrics."]
    lines = []
    if missing := metrics.get("not_evaluated"):
        lines.append(f"Not evaluated, for want of a condition in the {metrics.get('split')} split: {', '.join(map(str, missing))}.")
    if metrics.get("verified") is False:
        lines.append(f"The artifact was never executed: {metrics.get('reason')}.")
    return lines


def evidence_for(store: ArtifactStore, keys: Keys, ref: ArtifactRef) -> Evidence | None:
    """The newest gate report about a version, its bytes and its signature verified, or None.

    Raises DigestMismatch for a report that was altered, SignatureRefused for one that no trusted key signed, and GateRefused for one
    that cannot be read or speaks of another version.
    """
    reports = _reports(store, ref)
    if not reports:
        return None
    of = reports[-1]
    try:
        report = json.loads((verified(store, keys, of) / "report.json").read_text())
        subject = report["subject"]
        gates = tuple(Gate(**{**gate, "interval": gate["interval"] and tuple(gate["interval"])}) for gate in report["gates"])
        thresholds = {name: report["thresholds"][name] for name in THRESHOLDS.get(subject["name"], ())}
        told = report["code_version"], tuple(report["not_verified"])
        evidence = Evidence(of, subject["name"], subject["digest"], gates, thresholds, *told)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GateRefused(f"The gate report {of.digest[:12]} cannot be read: {error}.", "Materialize the checked asset again.") from error
    if (evidence.name, evidence.digest) != (ref.name, ref.digest):
        raise GateRefused(f"The gate report {of.digest[:12]} speaks of another version.", "Materialize the checked asset again.")
    return evidence


def verified(store: ArtifactStore, keys: Keys, ref: ArtifactRef) -> Path:
    """The folder of a signed artifact, its bytes and its signature verified. Raises UnknownVersion, DigestMismatch, SignatureRefused."""
    records = [v for v in store.versions(ref.name) if v.ref.digest == ref.digest]
    if not records:
        raise UnknownVersion(f"The store holds no {ref.name} {ref.digest[:12]}.", "`onereward versions` lists what it holds.")
    folder = store.get(ref)
    keys.verify_folder(folder, records[-1].metadata.get(SIGNATURE, ""), f"{ref.name} {ref.digest[:12]}")
    return folder


def _reports(store: ArtifactStore, ref: ArtifactRef) -> list[ArtifactRef]:
    found = store.versions(EVIDENCE_PREFIX + ref.name)
    return [v.ref for v in found if any(parent.digest == ref.digest for parent in v.parents)]
