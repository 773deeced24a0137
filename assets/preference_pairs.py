"""Stage 5: (winner, loser) pairs."""

from __future__ import annotations

from typing import Any

from assets.common import Work, stage
from ops.pair import PairConfig, make_pairs


@stage(config=PairConfig, parents=("curated_dataset", "candidates", "preferences"), group="preferences", kinds={"python"})
def preference_pairs(work: Work) -> dict[str, Any]:
    """Best and worst become winner and loser; ties are dropped; splits follow the conditions'."""
    inputs = work.inputs
    return make_pairs(
        work.config,
        inputs["curated_dataset"],
        inputs["candidates"],
        inputs["preferences"],
        work.out,
        work.progress,
        work.taxonomy,
    )
