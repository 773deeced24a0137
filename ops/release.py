"""Assemble a release: the whole pipeline with the tuned transformer, its ONNX and engine, and a model card.

    assemble_release(ReleaseConfig(), base=Path("data/base"), policy=Path("policy-ema"), onnx=Path("onnx"), engine=Path("engine"),
                     evaluation=Path("evaluation"), out=Path("release"), progress=Progress(print), lineage=[...], gates=[...])

A release names what was measured on exactly this policy; a policy that the evaluation did not see is refused. Whether it
may be promoted is not decided here (ops/promote.py reads the gates' evidence itself).
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pydantic
import torch
import yaml
from diffusers import FluxFillPipeline
from huggingface_hub.repocard import metadata_load

from infra.progress import Progress
from infra.stores.base import directory_digest
from models.config import OpConfig
from models.errors import ExportError
from models.flux_fill.loading import forget_origin, load_pipeline, load_transformer
from models.model_card import Card, render_card
from ops.folders import read_metrics, write_metrics
from ops.win_rates import COUNTED, ITEMS, read_items

BEFORE_AFTER = "before_after.png"  # the policy's own picture of the base's edits and its own (ops/policy_health.py)


class ReleaseConfig(OpConfig):
    """How the release is saved and what its card says about the base."""

    title: str = pydantic.Field("FLUX Fill tuned with OneReward", min_length=1, description="Title of the model card (ours).")
    dtype: Literal["float32", "bfloat16", "float16"] = pydantic.Field("float32", description="Precision of the saved weights (ours).")
    base_model: str = pydantic.Field("", description="Hub id of the base, for the card; empty where it has none (ours).")
    licence: str = pydantic.Field("", description="Licence of the base; read from its README.md where empty (ours).")


def assemble_release(
    config: ReleaseConfig,
    base: Path,
    policy: Path,
    onnx: Path,
    engine: Path,
    evaluation: Path,
    out: Path,
    progress: Progress,
    *,
    lineage: Sequence[Mapping[str, Any]],
    gates: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Write `model/`, `onnx/`, `engine/`, `README.md`, `pictures/` and `metrics.json`.

    Args:
        policy: the artifact that is released. evaluation: the one that measured it.
        lineage: everything it was made from, at least {name, digest} each.
        gates: what was checked on the way, at least {name, measure, threshold, passed} each.

    Raises ExportError when the evaluation did not measure this policy; MissingWeights or BrokenWeights.
    """
    mode = _mode(policy, evaluation)
    measured, graph, built = read_metrics(evaluation), read_metrics(onnx), read_metrics(engine)
    summary = measured["policy"][mode]
    progress.say(f"release: the base with the transformer of mode {mode}")
    _save_pipeline(config, base, policy, out / "model")
    shutil.copytree(onnx, out / "onnx")
    shutil.copytree(engine, out / "engine")
    (out / "pictures").mkdir()
    shutil.copyfile(policy / "pictures" / BEFORE_AFTER, out / "pictures" / BEFORE_AFTER)
    unverified = _not_verified(measured, mode, built)
    card = Card(
        title=config.title,
        mode=mode,
        dtype=config.dtype,
        base_model=config.base_model,
        licence=config.licence or _licence(base),
        split=measured["split"],
        counted=COUNTED[measured["evidence"]],
        sampling=measured["sampling"],
        summary=summary,
        gates=gates,
        lineage=lineage,
        onnx=graph,
        engine=built,
        not_verified=unverified,
    )
    (out / "README.md").write_text(render_card(card) + "\n", encoding="utf-8")
    metrics = {
        "mode": mode,
        "mean_win_rate": summary["mean_win_rate"],
        "preservation_psnr": summary["preservation_psnr"],
        "sampling": measured["sampling"],
        "onnx": {"relative_error": graph["relative_error"]},
        "engine": {name: built[name] for name in ("bytes", "architectures", "verified")},
        "not_verified": unverified,
        "gates": [dict(gate) for gate in gates],
        "lineage": [dict(row) for row in lineage],
    }
    write_metrics(out, metrics)
    return metrics


def _mode(policy: Path, evaluation: Path) -> str:
    """The reference mode under which the evaluation measured exactly these bytes."""
    digest, _ = directory_digest(policy)
    modes = {item["policy"] for item in read_items(evaluation / ITEMS) if item["policy_digest"] == digest}
    modes &= read_metrics(evaluation)["policy"].keys()  # the base and production are measured too, and are no news
    if len(modes) != 1:
        raise ExportError(f"The evaluation did not measure the policy {digest[:12]}.", "Evaluate the policy that is to be released.")
    return modes.pop()


def _save_pipeline(config: ReleaseConfig, base: Path, policy: Path, folder: Path) -> None:
    dtype = getattr(torch, config.dtype)
    pipe = load_pipeline(base, dtype)
    pipe.transformer = load_transformer(base, policy, dtype)
    FluxFillPipeline(**pipe.components).save_pretrained(folder)  # upstream's class, so that plain diffusers opens it too
    forget_origin(folder)


def _licence(base: Path) -> str:
    """What the base's own card names, or "" where it has no card or the card names none."""
    if not (base / "README.md").is_file():
        return ""
    try:
        stated = metadata_load(base / "README.md") or {}
    except (ValueError, yaml.YAMLError):  # a README without front matter that can be read names no licence
        return ""
    return str(stated.get("license_name") or stated.get("license") or "")


def _not_verified(measured: Mapping[str, Any], mode: str, engine: Mapping[str, Any]) -> list[str]:
    """What nobody measured, in sentences."""
    summary, photos = measured["policy"][mode], measured["photos"][mode]
    counted = COUNTED[measured["evidence"]]
    lines = [f"No person rated these edits; win rates are {counted} and by the judge."]
    if not engine["verified"]:
        lines.append(f"The engine is unverified: {engine['reason']}.")
    if measured["not_evaluated"]:
        lines.append(f"Not evaluated, for want of a condition in the {measured['split']} split: {', '.join(measured['not_evaluated'])}.")
    if blind := [row["task"] for row in summary["tasks"] if row["n_without_truth"] and not row["n"]]:
        lines.append(f"No ground truth for {', '.join(blind)}.")
    if measured["evidence"] == "blind":
        lines.append("The perfect edit of none of these pictures is known; the measures may be wrong on any single one.")
    elif photos is None:
        lines.append("No photograph was evaluated.")
    else:
        others = ", and by nearness to withheld pixels" if measured["withheld"][mode] else " alone"
        lines.append(f"Photographs have no ground truth: {photos['n']} were compared by the judge{others}.")
    return lines
