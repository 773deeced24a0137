"""Stage 4: best and worst of each condition's candidates, per dimension, from the label database."""

from __future__ import annotations

import hashlib
from typing import Any

from assets.common import Made, Work, stage
from infra.labels import LabelStore
from models.records import Preference
from ops.label import LabelConfig, imported, label_scripted, record_scripted


def _people(work: Work) -> list[Preference]:
    return imported(LabelStore(work.workspace.labels_url), work.refs["candidates"].digest)


def _labels(work: Work) -> dict[str, str]:
    """Imported labels are part of the key; the scripted annotator's follow from the other inputs."""
    lines = "".join(row.model_dump_json() for row in _people(work))
    return {"labels": hashlib.sha256(lines.encode()).hexdigest()}


def _record(work: Work, made: Made) -> dict[str, Any]:
    """The database gets the scripted labels once their version is stored, so that a run cut short before leaves it as it was.

    A run that reuses the version completes a database that an earlier one, cut short here, left without them.
    """
    new = record_scripted(made.folder, LabelStore(work.workspace.labels_url), work.refs["candidates"].digest)
    work.progress.say(f"{new} scripted labels new in the database")
    return {"new in the database": new}


@stage(
    config=LabelConfig,
    parents=("curated_dataset", "candidates"),
    group="preferences",
    kinds={"python", "sqlite"},
    depends=_labels,
    finish=_record,
)
def preferences(work: Work) -> dict[str, Any]:
    """The labels of these candidates: the scripted annotator's where it knows the ground truth, and imported human ones."""
    inputs = work.inputs
    return label_scripted(
        work.config, inputs["curated_dataset"], inputs["candidates"], _people(work), work.taxonomy, work.out, work.progress
    )
