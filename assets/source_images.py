"""Stage 1: the pool of source images."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from assets.common import Work, stage
from infra.stores.base import directory_digest
from ops import source


def _pool(work: Work) -> dict[str, str]:
    """The user's own pictures are part of the key: a changed folder is another pool."""
    if not work.config.path:
        return {}
    path = Path(work.config.path)
    listed = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
    folder = path if path.is_dir() else path.parent
    return {"manifest": listed, "folder": directory_digest(folder)[0] if folder.is_dir() else ""}


@stage(
    config=source.SourceConfig,
    parents=(),
    group="data",
    kinds={"python"},
    libraries=("pillow", "scikit-image", "matplotlib"),  # decoding and resizing, the photographs, the scenes' font
    depends=_pool,
)
def source_images(work: Work) -> dict[str, Any]:
    """The user's folder or manifest, or the seed data: every image checked, brought to size, the refused listed with reasons."""
    return source.source_images(work.config, work.out, work.progress, work.taxonomy)
