"""Which policy the evaluation named, and which one a release holds."""

from __future__ import annotations

from assets.common import Work
from infra.stores.base import ArtifactRef
from models.errors import GateRefused
from ops.folders import read_metrics
from ops.gate import POLICY_PREFIX


def winner(work: Work) -> str:
    """Artifact name of the better policy. Raises GateRefused when the evaluation named none, or one that is not of this chain."""
    mode = read_metrics(work.store.get(work.refs["evaluation"]))["best_mode"]
    name = f"{POLICY_PREFIX}{mode}"
    if name not in work.refs:
        raise GateRefused(
            f"The evaluation names no policy that could be exported ({mode}).", "Train or evaluate again; the report says why."
        )
    return name


def parent(work: Work, ref: ArtifactRef, name: str) -> ArtifactRef | None:
    """What an artifact was made from under that name."""
    return next((each for each in work.store.version(ref.digest).parents if each.name == name), None)


def released_policy(work: Work, release: ArtifactRef) -> str | None:
    """Digest of the policy that a release holds."""
    held = parent(work, release, f"{POLICY_PREFIX}{work.store.version(release.digest).metadata.get('mode')}")
    return held.digest if held else None
