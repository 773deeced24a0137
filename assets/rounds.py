"""A further round: its policy goes on from that of an earlier release, its judge from the labels, on the splits that both were made on.

uses=starting_release                             # of a stage whose config has a field `start`
labelled_before(work, release)                    # what the judge is fitted to besides this round's labels
"""

from __future__ import annotations

from assets.common import Work
from infra.stores.base import ArtifactRef, ArtifactStore
from models.errors import ConfigError
from models.records import Condition, read_rows
from ops.lineage import RELEASE, parent, released_policy, trained_with


def starting_release(work: Work) -> ArtifactRef | None:
    """The release that the stage's config names as its `start`; none for `base`.

    Raises UnknownVersion where there is none, and ConfigError where the present test holds what the release's weights were trained or
    chosen on: no figure measured there would mean anything.
    """
    release = work.release(work.config.start)
    if release is None:
        return None
    sealed, number = _origins(work, work.refs["curated_dataset"], test=True), work.store.version(release.digest).number
    for each in rounds(work.store, release):
        seen = trained_with(work.store, each, "curated_dataset")
        if seen.digest == work.refs["curated_dataset"].digest:
            continue  # its gate `split_leak` has passed
        if both := sorted(sealed & _origins(work, seen, test=False)):
            raise ConfigError(
                f"Release v{number}, from which {work.artifact} is to start, was trained on {len(both)} source images of the test,"
                f" such as {both[0]}.",
                "Leave the data and `curated_dataset.rotation` as they were, or start from `base`.",
            )
    return release


def rounds(store: ArtifactStore, release: ArtifactRef) -> list[ArtifactRef]:
    """A release and those that its rounds went on from, newest first."""
    found = [release]
    for each in found:  # grows meanwhile
        policy = released_policy(store, each)
        trained = [store.version(policy).ref, trained_with(store, each, "reward_model")] if policy else []
        starts = (parent(store, one, RELEASE) for one in trained)
        found += [start for start in dict.fromkeys(starts) if start and start not in found]
    return found


def labelled_before(work: Work, release: ArtifactRef) -> list[tuple[ArtifactRef, ArtifactRef, ArtifactRef]]:
    """Curated dataset, candidates and preference pairs that the judges of a release and of those before it were fitted to, newest first.

    Of candidates that were labelled again only the labels that the latest of these rounds used, and none where the present round has them.
    """
    found: dict[str, tuple[ArtifactRef, ArtifactRef, ArtifactRef]] = {}  # by digest of the candidates
    for each in rounds(work.store, release):
        judge = work.store.version(trained_with(work.store, each, "reward_model").digest)
        made = {ref.name: ref for ref in judge.parents}
        found.setdefault(made["candidates"].digest, (made["curated_dataset"], made["candidates"], made["preference_pairs"]))
    found.pop(work.refs["candidates"].digest, None)
    return list(found.values())


def _origins(work: Work, curated: ArtifactRef, *, test: bool) -> set[str]:
    rows = read_rows(work.store.get(curated) / "conditions.jsonl", Condition)
    return {row.origin for row in rows if (row.split == "test") == test}
