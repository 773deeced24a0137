"""Stage 2: conditions (image, mask, prompt) from a diverse, copy-free subset, split by source image."""

from __future__ import annotations

from typing import Any

from assets.common import Work, stage
from ops.curate import CurateConfig, curate
from ops.embed import load_embedder


@stage(config=CurateConfig, parents=("source_images",), group="data", kinds={"python", "scikitlearn"}, models=("flux",))
def curated_dataset(work: Work) -> dict[str, Any]:
    """Editing conditions: copies dropped, a K-means subset, masks where absent, train / validation / sealed test by source image."""
    embed = load_embedder(work.config.embedder, work.flux)
    return curate(work.config, work.inputs["source_images"], work.out, work.progress, embed, work.taxonomy)
