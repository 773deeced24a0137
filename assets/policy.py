"""Stage 7: the tuned policies, one partition per reference mode (Algorithms 1 and 2)."""

from __future__ import annotations

from typing import Any

from assets.common import MEASURES, Work, reader_versions, stage
from assets.rounds import starting_release
from ops.policy_config import TrainPolicyConfig
from ops.train_policy import MODES, train_policy


@stage(
    config=TrainPolicyConfig,
    parents=("curated_dataset", "reward_model"),
    group="training",
    kinds={"pytorch", "huggingface"},
    models=("flux",),
    libraries=("accelerate", *MEASURES),
    gpu=True,
    modes=MODES,
    depends=reader_versions,
    uses=starting_release,
)
def policy(work: Work) -> dict[str, Any]:
    """FLUX Fill tuned by the judge: `static` keeps its reference (Algorithm 1), `ema` moves it along (Algorithm 2).

    It starts from the base, or from a release.
    """
    assert work.mode is not None
    inputs = work.inputs
    return train_policy(
        work.config,
        work.pipeline,
        inputs["reward_model"],
        inputs["curated_dataset"],
        work.out,
        work.progress,
        work.taxonomy,
        mode=work.mode,
        scratch=work.scratch,
    )
