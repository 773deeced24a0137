"""Stage 2: conditions (image, mask, prompt) from a diverse, copy-free subset, split by source image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from assets.common import Work, stage
from assets.sources import ROOT
from infra.data import weights, weights_digest
from ops.curate import OWN, CurateConfig, curate
from ops.embed import clip_embedder, vae_embedder


def _checkpoint(work: Work) -> Path | None:
    """The folder of the CLIP checkpoint; None where the base's own VAE embeds."""
    return None if work.config.embedder == OWN else weights(work.config.embedder, ROOT)


def _embedder(work: Work) -> dict[str, str]:
    """A CLIP checkpoint is part of the key by its bytes; the base's VAE is so already."""
    folder = _checkpoint(work)
    return {"embedder": weights_digest(folder, work.workspace.home / "weights.json")} if folder else {}


@stage(
    config=CurateConfig,
    parents=("source_images",),
    group="data",
    kinds={"python", "scikitlearn"},
    models=("flux",),
    libraries=("pillow", "scipy", "scikit-learn", "imagehash"),
    depends=_embedder,
)
def curated_dataset(work: Work) -> dict[str, Any]:
    """Editing conditions: copies dropped, a K-means subset, masks where absent, train / validation / sealed test by source image."""
    folder = _checkpoint(work)
    embed = clip_embedder(folder) if folder else vae_embedder(work.flux)
    return curate(work.config, work.inputs["source_images"], work.out, work.progress, embed, work.taxonomy)
