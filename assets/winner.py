"""Which policy the evaluation named."""

from __future__ import annotations

from assets.common import Work
from models.errors import GateRefused
from ops.folders import read_metrics


def winner(work: Work) -> str:
    """Artifact name of the better policy. Raises GateRefused when the evaluation named none, or one that is not of this chain."""
    mode = read_metrics(work.inputs["evaluation"])["best_mode"]
    name = f"policy-{mode}"
    if name not in work.inputs:
        raise GateRefused(f"The evaluation names no policy that could be exported ({mode}).", "Train or evaluate again; the report says why.")
    return name
