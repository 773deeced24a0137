"""Which policy the evaluation named."""

from __future__ import annotations

from assets.common import Work
from models.errors import GateRefused
from ops.folders import read_metrics
from ops.lineage import POLICY_PREFIX


def winner(work: Work) -> str:
    """Artifact name of the better policy. Raises GateRefused when the evaluation named none, or one that is not of this chain."""
    mode = read_metrics(work.store.get(work.refs["evaluation"]))["best_mode"]
    name = f"{POLICY_PREFIX}{mode}"
    if name not in work.refs:
        raise GateRefused(
            f"The evaluation names no policy that could be exported ({mode}).", "Train or evaluate again; the report says why."
        )
    return name
