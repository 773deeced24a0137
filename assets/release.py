"""Stage 11: the better policy as a release, and its way to production."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from assets.common import Made, Work, stage
from assets.winner import released_policy, winner
from infra.stores.base import ArtifactRef
from ops.gate import evidence_for
from ops.promote import STAGES, promote
from ops.release import ReleaseConfig, assemble_release

PRODUCTION = STAGES[-1]


def _in_production(work: Work) -> ArtifactRef | None:
    """The production release, where it already holds the winning policy."""
    ref = work.pin(PRODUCTION)
    return ref if ref is not None and released_policy(work, ref) == work.refs[winner(work)].digest else None


def _promote(work: Work, made: Made) -> dict[str, Any]:
    """Every preset makes a candidate; one with `auto_promote` goes on to production. Each move re-reads all evidence."""
    ref, number = made.version.ref, made.version.number
    standing = work.store.stage(ref.name, PRODUCTION)
    if standing is not None and standing.digest == ref.digest:
        return {"ending": "unchanged", "message": f"release v{number} ({ref.digest[:8]}) is production already"}
    for name in STAGES if work.settings.auto_promote else STAGES[:1]:
        promote(work.store, ref, name, approver=f"preset {work.settings.preset}", reason=f"every gate passed in run {work.run_id}")
        work.progress.say(f"release v{number} ({ref.digest[:8]}) is {name}")
    if work.settings.auto_promote:
        return {"ending": "promoted", "message": f"release v{number} ({ref.digest[:8]}) is production"}
    return {
        "ending": "released",
        "message": f"release v{number} is a candidate; `onereward promote {ref.digest[:12]} production` is a person's to say",
    }


def _lineage(work: Work, refs: Iterable[ArtifactRef]) -> list[ArtifactRef]:
    """Everything the release is made from, children before parents, each once."""
    found: dict[str, ArtifactRef] = {}
    for ref in refs:
        for version in work.store.lineage(ref.digest):
            found.setdefault(version.ref.digest, version.ref)
    return list(found.values())


def _gates(work: Work, lineage: Iterable[ArtifactRef]) -> list[dict[str, Any]]:
    """What was checked on the way, from the stored evidence."""
    reports = [evidence_for(work.store, ref.digest) for ref in lineage]
    return [{"artifact": report.name, **asdict(gate)} for report in reports if report for gate in report.gates]


@stage(
    config=ReleaseConfig,
    parents=("policy", "evaluation", "onnx", "engine"),
    group="export",
    kinds={"huggingface"},
    models=("flux",),
    standing=_in_production,
    finish=_promote,
)
def release(work: Work) -> dict[str, Any]:
    """Diffusers folder, ONNX, engine and model card with the whole lineage; promoted only on every gate's evidence for these digests."""
    inputs, chosen = work.inputs, winner(work)
    lineage = _lineage(work, (work.refs[name] for name in (chosen, "evaluation", "onnx", "engine")))
    return assemble_release(
        work.config,
        work.flux,
        inputs[chosen],
        inputs["onnx"],
        inputs["engine"],
        inputs["evaluation"],
        work.out,
        work.progress,
        lineage=[{"name": ref.name, "digest": ref.digest} for ref in lineage],
        gates=_gates(work, lineage),
    )
