"""Stage 6: the judge, fitted to the pairs."""

from __future__ import annotations

from typing import Any

from assets.common import Work, stage
from assets.rounds import rounds, starting_release
from infra.stores.base import ArtifactRef
from ops.fit_reward import FitRewardConfig, Round, fit_reward
from ops.lineage import RELEASE, trained_with

LABELLED = ("curated_dataset", "candidates", "preference_pairs")  # what a judge is fitted to


@stage(
    config=FitRewardConfig,
    parents=LABELLED,
    group="training",
    kinds={"pytorch", "huggingface"},
    models=("judge",),
    gpu=True,
    libraries=("scipy",),  # the intervals of its accuracy
    uses=starting_release,
)
def reward_model(work: Work) -> dict[str, Any]:
    """A Qwen2.5-VL that answers whether the first image is better, on every task and dimension; stopped on held-out accuracy.

    Fitted from the base judge to the labels of this round and, where the round starts from a release, of all rounds before it: a judge that
    goes on from the one before learns them by heart.
    """
    inputs, release = work.inputs, work.refs.get(RELEASE)
    return fit_reward(
        work.config,
        work.judge,
        inputs["curated_dataset"],
        inputs["candidates"],
        inputs["preference_pairs"],
        work.out,
        work.progress,
        work.taxonomy,
        earlier=_earlier(work, release) if release else (),
    )


def _earlier(work: Work, release: ArtifactRef) -> list[Round]:
    """What the judges of a release and of those before it were fitted to, newest first."""
    found = []
    for each in rounds(work.store, release):
        made = {ref.name: ref for ref in work.store.version(trained_with(work.store, each, "reward_model").digest).parents}
        found.append(tuple(made[name] for name in LABELLED))
    present = tuple(work.refs[name] for name in LABELLED)
    before = [each for each in dict.fromkeys(found) if each != present]
    return [(work.store.get(curated), work.store.get(candidates), work.store.get(pairs)) for curated, candidates, pairs in before]
