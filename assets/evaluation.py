"""Stage 8: are the tuned policies better, and which one is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import onnxruntime

from assets.common import Work, stage
from assets.policy import policy
from assets.sources import ROOT
from assets.winner import parent, released_policy
from infra.data import weights, weights_digest
from infra.stores.base import ArtifactRef
from ops.evaluate import EvaluateConfig, evaluate


def _rival(work: Work) -> ArtifactRef | None:
    """The production release. Where that already holds one of these policies: the one it was measured against, so that an
    unchanged evaluation stays unchanged after its promotion."""
    production = work.pin("production")
    if production is None or released_policy(work, production) not in {ref.digest for ref in work.refs.values()}:
        return production
    measured = parent(work, production, "evaluation")
    return parent(work, measured, production.name) if measured else None


def _clip(work: Work) -> Path | None:
    """The folder of the CLIP checkpoint that blind evidence takes; None where the preset names none."""
    return weights(work.settings.clip, ROOT) if work.settings.clip else None


def _measured_with(work: Work) -> dict[str, str]:
    """What the word reader runs in (either comes as one of several distributions), and the bytes of the CLIP checkpoint."""
    clip = _clip(work)
    read = {"onnxruntime": onnxruntime.__version__, "opencv": cv2.__version__}
    return {**read, **({"clip": weights_digest(clip, work.workspace.home / "weights.json")} if clip else {})}


@stage(
    config=EvaluateConfig,
    parents=("curated_dataset", "candidates", "preference_pairs", "reward_model", "policy"),
    group="proof",
    kinds={"pytorch", "huggingface"},
    models=("flux", "judge"),
    gpu=True,
    libraries=("pillow", "scikit-image", "scipy", "rapidocr", "matplotlib"),  # measures, intervals, the reader's network, the signs' font
    depends=_measured_with,
    uses=_rival,
)
def evaluation(work: Work) -> dict[str, Any]:
    """Held-out conditions, the same seeds for base, production and every healthy policy; win rates by measures and by judge."""
    inputs = work.inputs
    return evaluate(
        work.config,
        work.flux,
        inputs["curated_dataset"],
        inputs["reward_model"],
        {mode: inputs[name] for mode, name in zip(policy.modes, policy.artifacts, strict=True) if name in inputs},
        work.out,
        work.progress,
        taxonomy=work.taxonomy,
        production=inputs.get("release"),
        candidates=inputs["candidates"],
        pairs=inputs["preference_pairs"],
        base_judge=work.judge,
        clip=_clip(work),
    )
