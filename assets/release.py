"""Stage 11: the better policy as a release, and its way to production."""

from __future__ import annotations

from typing import Any

from assets.common import Made, Work, stage
from assets.winner import winner
from infra.stores.base import ArtifactRef
from ops.promote import STAGES, promote
from ops.release import ReleaseConfig
from ops.release import release as write_release

PRODUCTION = STAGES[-1]


def _in_production(work: Work) -> ArtifactRef | None:
    """The production release, where it already holds the winning policy."""
    ref = work.pin(PRODUCTION)
    if ref is None:
        return None
    held = {parent.digest for parent in work.store.version(ref.digest).parents}
    return ref if work.refs[winner(work)].digest in held else None


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
    return {"ending": "released", "message": f"release v{number} is a candidate; `onereward promote {ref.digest[:12]} production` is a person's to say"}


@stage(
    config=ReleaseConfig,
    parents=("policy", "reward_model", "evaluation", "onnx", "engine"),
    group="export",
    kinds={"huggingface"},
    models=("flux",),
    standing=_in_production,
    finish=_promote,
)
def release(work: Work) -> dict[str, Any]:
    """Diffusers folder, ONNX, engine and model card with the whole lineage; promoted only on every gate's evidence for these digests."""
    inputs = work.inputs
    return write_release(
        work.config, work.flux, inputs[winner(work)], inputs["evaluation"], inputs["onnx"], inputs["engine"], work.out, work.progress
    )
