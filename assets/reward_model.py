"""Stage 6: the judge, fitted to the pairs."""

from __future__ import annotations

from typing import Any

from assets.common import Work, stage
from ops.fit_reward import FitRewardConfig, fit_reward


@stage(
    config=FitRewardConfig,
    parents=("curated_dataset", "candidates", "preference_pairs"),
    group="training",
    kinds={"pytorch", "huggingface"},
    models=("judge",),
    gpu=True,
    libraries=("scipy",),  # the intervals of its accuracy
)
def reward_model(work: Work) -> dict[str, Any]:
    """A Qwen2.5-VL that answers whether the first image is better, on every task and dimension; stopped on held-out accuracy."""
    inputs = work.inputs
    return fit_reward(
        work.config,
        work.judge,
        inputs["curated_dataset"],
        inputs["candidates"],
        inputs["preference_pairs"],
        work.out,
        work.progress,
        work.taxonomy,
    )
