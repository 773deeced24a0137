"""Stage 4: best and worst of each condition's candidates, per dimension, from the label database."""

from __future__ import annotations

import hashlib
from typing import Any

from assets.common import Work, stage
from infra.labels import LabelStore
from ops.label import LabelConfig, label_scripted


def _labels(work: Work) -> dict[str, str]:
    """Imported labels are part of the key; the scripted annotator's follow from the other inputs."""
    rows = LabelStore(work.workspace.labels_url).rows(work.refs["candidates"].digest)
    lines = "".join(row.model_dump_json() for row in rows if row.source == "import")
    return {"labels": hashlib.sha256(lines.encode()).hexdigest()}


@stage(config=LabelConfig, parents=("curated_dataset", "candidates"), group="preferences", kinds={"python", "sqlite"}, depends=_labels)
def preferences(work: Work) -> dict[str, Any]:
    """The labels of these candidates: the scripted annotator's where it knows the ground truth, and imported human ones."""
    labels = LabelStore(work.workspace.labels_url)
    digest = work.refs["candidates"].digest
    return label_scripted(
        work.config, work.inputs["curated_dataset"], work.inputs["candidates"], labels, digest, work.taxonomy, work.out, work.progress
    )
