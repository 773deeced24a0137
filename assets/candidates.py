"""Stage 3: four sampled answers to every condition."""

from __future__ import annotations

from typing import Any

from assets.common import Work, stage
from infra.data import weights_digest
from ops.generate import GenerateConfig, generate


@stage(
    config=GenerateConfig,
    parents=("curated_dataset",),
    group="preferences",
    kinds={"pytorch", "huggingface"},
    models=("flux",),
    gpu=True,
    uses=lambda work: work.release(work.config.policy),
)
def candidates(work: Work) -> dict[str, Any]:
    """Four edits per condition with steps, negative prompt, CFG and noise strength drawn at random; every drawn value is kept."""
    known = work.workspace.home / "weights.json"
    models = {weights_digest(folder, known): folder for folder in (work.pipeline, work.flux)}  # one, where the policy is the base
    return generate(work.config, models, work.inputs["curated_dataset"], work.out, work.progress, work.taxonomy)
