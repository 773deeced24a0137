"""Stage 6: the judge, fitted to the pairs."""

from __future__ import annotations

from typing import Any

from assets.common import Work, stage
from assets.rounds import starting_release
from ops.fit_reward import SECOND, FitRewardConfig, fit_reward
from ops.lineage import RELEASE, trained_with


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

    It starts from the base judge, or from the one that a release's policy was trained with.
    """
    inputs, start, second = work.inputs, work.judge, work.judge
    if release := work.refs.get(RELEASE):
        start = work.store.get(trained_with(work.store, release, "reward_model"))
        if (start / SECOND).is_dir():  # else from the base judge: the one that watches has not seen the labels of the one that rewards
            second = start / SECOND
    return fit_reward(
        work.config,
        start,
        inputs["curated_dataset"],
        inputs["candidates"],
        inputs["preference_pairs"],
        work.out,
        work.progress,
        work.taxonomy,
        second_start=second,
    )
