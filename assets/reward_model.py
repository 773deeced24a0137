"""Stage 6: the judge, fitted to the pairs."""

from __future__ import annotations

from typing import Any

from assets.common import Work, stage
from assets.rounds import labelled_before, starting_release
from ops.fit_reward import FitRewardConfig, fit_reward
from ops.lineage import RELEASE


@stage(
    config=FitRewardConfig,
    parents=("curated_dataset", "candidates", "preference_pairs"),
    group="training",
    kinds={"pytorch", "huggingface"},
    models=("judge",),
    gpu=True,
    libraries=("scipy",),  # the intervals of its accuracy
    uses=starting_release,
)
def reward_model(work: Work) -> dict[str, Any]:
    """A Qwen2.5-VL that answers whether the first image is better, on every task and dimension; stopped on held-out accuracy.

    Fitted from the base judge to the labels of this round and, where it goes on from a release, of the rounds that this came from: on both
    seeds of the bench a fit that went on from the release's judge found no better one.
    """
    inputs, release = work.inputs, work.refs.get(RELEASE)
    earlier = labelled_before(work, release) if release else []
    return fit_reward(
        work.config,
        work.judge,
        inputs["curated_dataset"],
        inputs["candidates"],
        inputs["preference_pairs"],
        work.out,
        work.progress,
        work.taxonomy,
        earlier=[(work.store.get(curated), work.store.get(candidates), work.store.get(pairs)) for curated, candidates, pairs in earlier],
    )
