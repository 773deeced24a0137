"""Stage 8: are the tuned policies better, and which one is."""

from __future__ import annotations

from typing import Any

from assets.common import Work, stage
from assets.policy import policy
from ops.evaluate import EvaluateConfig, evaluate


@stage(
    config=EvaluateConfig,
    parents=("curated_dataset", "candidates", "preference_pairs", "reward_model", "policy"),
    group="proof",
    kinds={"pytorch", "huggingface"},
    models=("flux", "judge"),
    gpu=True,
    uses=lambda work: work.pin("production"),
)
def evaluation(work: Work) -> dict[str, Any]:
    """Held-out conditions, the same seeds for base, production and every healthy policy; win rates with intervals by ground truth and judge."""
    inputs = work.inputs
    return evaluate(
        work.config,
        work.flux,
        inputs["curated_dataset"],
        inputs["reward_model"],
        {name.removeprefix("policy-"): inputs[name] for name in policy.artifacts if name in inputs},
        work.out,
        work.progress,
        taxonomy=work.taxonomy,
        production=inputs.get("release"),
        candidates=inputs["candidates"],
        pairs=inputs["preference_pairs"],
        base_judge=work.judge,
    )
