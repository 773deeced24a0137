"""Stage 8: are the tuned policies better, and which one is."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from assets.common import MEASURES, Work, reader_versions, stage
from assets.policy import policy
from assets.sources import ROOT
from infra.data import weights, weights_digest
from infra.stores.base import ArtifactRef
from models.errors import ConfigError
from ops.evaluate import EvaluateConfig, evaluate
from ops.lineage import parent, released_policy


def _rival(work: Work) -> ArtifactRef | None:
    """The production release. Where that already holds one of these policies: the one it was measured against, so that an
    unchanged evaluation stays unchanged after its promotion."""
    production = work.pin("production")
    if production is None or released_policy(work.store, production) not in {ref.digest for ref in work.refs.values()}:
        return production
    measured = parent(work.store, production, "evaluation")
    return parent(work.store, measured, production.name) if measured else None


def _others(work: Work) -> dict[str, Path]:
    """The folders of the checkpoints that the preset may name: a CLIP for blind evidence, a second judge."""
    named = {"clip": work.settings.clip, "second_judge": work.settings.second_judge}
    return {name: weights(source, ROOT) for name, source in named.items() if source}


def _measured_with(work: Work) -> dict[str, str]:
    """What the word reader runs in, and the bytes of what `_others` names."""
    others = _others(work)
    found = {name: weights_digest(folder, work.workspace.home / "weights.json") for name, folder in others.items()}
    if "second_judge" in others:
        found["second_judge_template"] = hashlib.sha256(_template(work).read_bytes()).hexdigest()
    return {**reader_versions(work), **found}


def _template(work: Work) -> Path:
    """Raises ConfigError where the file of the second judge's template is not there."""
    path = ROOT / work.settings.second_judge_template
    if not path.is_file():
        raise ConfigError(f"There is no template {path}.", "Correct `models: {second_judge_template: ...}` in the preset.")
    return path


@stage(
    config=EvaluateConfig,
    parents=("curated_dataset", "candidates", "preference_pairs", "reward_model", "policy"),
    group="proof",
    kinds={"pytorch", "huggingface"},
    models=("flux", "judge"),
    gpu=True,
    libraries=MEASURES,
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
        **_others(work),
        second_template=_template(work),
    )
