"""Which policy the evaluation named, which one a release holds, and what that one was made from."""

from __future__ import annotations

from assets.common import Work
from infra.stores.base import ArtifactRef, ArtifactStore
from models.errors import GateRefused, UnknownVersion
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


def parent(store: ArtifactStore, ref: ArtifactRef, name: str) -> ArtifactRef | None:
    """What an artifact was made from under that name."""
    return next((each for each in store.version(ref.digest).parents if each.name == name), None)


def released_policy(store: ArtifactStore, release: ArtifactRef) -> str | None:
    """Digest of the policy that a release holds."""
    held = parent(store, release, f"{POLICY_PREFIX}{store.version(release.digest).metadata.get('mode')}")
    return held.digest if held else None


def trained_with(store: ArtifactStore, release: ArtifactRef, name: str) -> ArtifactRef:
    """What the policy of a release was trained with under that name. Raises UnknownVersion where its record does not say."""
    policy = released_policy(store, release)
    found = parent(store, store.version(policy).ref, name) if policy else None
    if found is None:
        raise UnknownVersion(
            f"Release {release.digest[:12]} does not say with which {name} its policy was trained.", "Name a release of this chain."
        )
    return found
