"""One more round of the chain on what is in production: label its samples and the base's, refit the judge, train its policy further.

    run_and_report(next_round(load_settings("mini"), store), workspace)      # `onereward run --next-round`

It is the same chain with three settings changed, and with seed data a fourth: new scenes. A preset may say them itself.
"""

from __future__ import annotations

from assets.candidates import candidates
from assets.curated_dataset import curated_dataset
from assets.policy import policy
from assets.promotion import PRODUCTION
from assets.reward_model import reward_model
from assets.settings import Settings
from assets.source_images import source_images
from infra.stores.base import ArtifactStore
from models.errors import UnknownVersion
from ops.lineage import RELEASE, parent, trained_with

STARTS = {candidates.name: "policy", reward_model.name: "start", policy.name: "start"}  # stage -> the field that names a release


def next_round(settings: Settings, store: ArtifactStore) -> Settings:
    """The preset's settings for a round that goes on from production, on the splits that production was trained on.

    Of seed data the scenes are others than production's and those of the rounds before it, so that none of them has opened the sealed
    ones; a round that was refused and is tried again has the same. Photographs and a user's pictures stay where they were.

    Raises UnknownVersion where no release is in production.
    """
    release = store.stage(RELEASE, PRODUCTION)
    if release is None:
        raise UnknownVersion(
            "No release is in production to go on from.", "Make the first round (`onereward run`), and promote what comes of it."
        )
    seen = store.version(trained_with(store, release, curated_dataset.name).digest)
    changed = {name: {field: PRODUCTION} for name, field in STARTS.items()}
    changed[curated_dataset.name] = {"rotation": seen.config["rotation"]}  # the schedule may have turned it since the preset was written
    sources = parent(store, seen.ref, source_images.name)
    if sources and not settings.stages.get(source_images.name, {}).get("path"):
        pool = store.version(sources.digest).config
        changed[source_images.name] = {"first_scene": pool.get("first_scene", 0) + pool["n_scenes"]}
    sections = {name: {**settings.stages.get(name, {}), **values} for name, values in changed.items()}
    return settings.model_copy(update={"stages": {**settings.stages, **sections}})
