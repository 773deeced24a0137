"""What a stored artifact was made from, read from its record: parents, the policy a release holds, what that was trained with."""

from __future__ import annotations

from infra.stores.base import ArtifactRef, ArtifactStore
from models.errors import UnknownVersion

RELEASE = "release"
POLICY_PREFIX = "policy-"  # the policy of each mode is an artifact of its own


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
