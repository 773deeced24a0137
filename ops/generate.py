"""Candidates: K edits per condition, each with its own steps, negative prompt, guidance and noise strength (paper, section 3.1).

    generate(GenerateConfig(), {digest: base}, curated, out, Progress(print), Taxonomy.load())

With `one_step` some are predictions of x0 from a stop step, the kind of picture that RL shows the judge of the policy. Every drawn value
is stored with its candidate, so any one candidate can be made again from its row alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor

from infra.progress import Progress
from models.config import OpConfig
from models.device import default_device
from models.errors import NotEnoughData
from models.flux_fill.loading import load_pipeline
from models.flux_fill.sampler import Sampler
from models.images import to_mask, to_pil, to_tensor
from models.records import Candidate, Condition, read_rows, write_rows
from models.shards import ShardReader, ShardWriter
from models.taxonomy import Taxonomy
from ops.folders import save_picture, write_metrics
from ops.pictures import grid, overlay


class GenerateConfig(OpConfig):
    """How candidates are drawn."""

    per_condition: int = Field(4, ge=2, description="candidates per condition (paper: 4)")
    steps_low: int = Field(4, ge=1, description="fewest inference steps drawn (ours)")
    steps_high: int = Field(8, ge=1, description="most inference steps drawn (ours)")
    true_cfg_low: float = Field(1.0, ge=1, description="smallest classifier-free guidance drawn (ours)")
    true_cfg_high: float = Field(4.0, ge=1, description="largest classifier-free guidance drawn (ours)")
    guidance_scale: float = Field(1.0, description="FLUX's distilled guidance (the authors' demos: 1.0)")
    strengths: list[float] = Field([0.9, 1.0], min_length=1, description="initial noise strengths drawn from, each in (0, 1] (ours)")
    negative_prompts: list[str] = Field(
        ["", "nsfw", "blurry", "low quality"], min_length=1, description="negative prompts drawn from (paper: none and these three)"
    )
    one_step: float = Field(
        0.0, ge=0, le=1, description="share of candidates predicted in one step from a stop step, as RL will show the judge (ours)"
    )
    one_step_of: int = Field(28, ge=2, description="inference steps of those, the policy's (ours)")
    stop_low: int = Field(14, ge=1, description="earliest stop step of those, the policy's (ours)")
    stop_high: int = Field(27, ge=1, description="latest stop step of those, the policy's (ours)")
    policy: str = Field("base", description="whose samples: `base`, a stage such as `production`, or the digest of a release (ours)")
    base_share: float = Field(
        0.5, ge=0, le=1, description="where that is a release, share of the candidates that the base samples all the same (ours)"
    )
    chunk: int = Field(64, ge=1, description="conditions encoded at once; their candidates of equal settings run as one batch (ours)")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="precision of the networks (ours)")
    seed: int = Field(0, description="seed of every draw (ours)")

    @model_validator(mode="after")
    def _ranges(self) -> GenerateConfig:
        for name in ("steps", "true_cfg"):
            if getattr(self, f"{name}_low") > getattr(self, f"{name}_high"):
                raise ValueError(f"{name}_low is above {name}_high")
        if not self.stop_low <= self.stop_high < self.one_step_of:
            raise ValueError(f"stop steps {self.stop_low}..{self.stop_high} must lie inside 1..{self.one_step_of - 1}")
        if wrong := [value for value in self.strengths if not 0 < value <= 1]:
            raise ValueError(f"noise strengths {wrong} are outside (0, 1]")
        return self


def generate(
    config: GenerateConfig, models: Mapping[str, Path], curated: Path, out: Path, progress: Progress, taxonomy: Taxonomy
) -> dict[str, Any]:
    """Sample every condition of `curated` and write candidates.jsonl with its shards.

    Args:
        models: content digest, stored with every candidate, -> FLUX Fill folder. The base's; or a release's, then the base's, which
            samples `base_share` of the candidates.

    Raises NotEnoughData, MissingWeights, BrokenWeights, UnknownTask.
    """
    conditions = read_rows(curated / "conditions.jsonl", Condition)
    if not conditions:
        raise NotEnoughData(f"{curated} holds no conditions.", "Curate more source images.")
    for condition in conditions:
        taxonomy.task(condition.task)
    drawn = [row for condition in conditions for row in _draw(config, condition, list(models))]
    made: dict[str, Candidate] = {}
    shards = ShardReader(curated)
    with ShardWriter(out) as writer, progress.bar("candidates", len(drawn), "image") as bar:
        for digest, folder in models.items():  # one after the other: at full size two would not fit
            for batch, pictures in _sampled(config, folder, conditions, [row for row in drawn if row.model_digest == digest], shards):
                for row, picture in zip(batch, pictures, strict=True):
                    writer.add(row.id, to_pil(picture))
                    made[row.id] = row
                bar.advance(len(batch))
    rows = [made[row.id] for row in drawn]
    write_rows(out / "candidates.jsonl", rows)
    _picture(out, taxonomy, conditions, shards, config.per_condition)
    shares = {digest: sum(row.model_digest == digest for row in rows) for digest in models}
    metrics = {"candidates": len(rows), "conditions": len(conditions), "per_condition": config.per_condition, "models": shares}
    write_metrics(out, metrics)
    return metrics


def _sampled(
    config: GenerateConfig, folder: Path, conditions: list[Condition], rows: list[Candidate], shards: ShardReader
) -> Iterator[tuple[list[Candidate], Tensor]]:
    """One model's candidates with their pictures [B, 3, H, W], chunk by chunk; a model without any is not loaded."""
    if not rows:
        return
    device = default_device()
    pipe = load_pipeline(folder, getattr(torch, config.dtype)).to(device)
    sampler = Sampler(pipe)
    for start in range(0, len(conditions), config.chunk):
        chosen = conditions[start : start + config.chunk]
        at = {condition.id: index for index, condition in enumerate(chosen)}
        batch = [row for row in rows if row.condition_id in at]
        if not batch:
            continue
        encoded = sampler.encode(
            torch.stack([to_tensor(shards[f"{c.id}.image"]) for c in chosen]).to(device),
            torch.stack([to_mask(shards[f"{c.id}.mask"]) for c in chosen]).to(device),
            [c.prompt for c in chosen],
        )
        encoded = encoded.select([at[row.condition_id] for row in batch])
        pictures = sampler.sample(
            pipe.transformer,
            sampler.with_negatives(encoded, [row.negative_prompt for row in batch]),
            [row.seed for row in batch],
            steps=[row.steps for row in batch],
            true_cfg=[row.true_cfg for row in batch],
            guidance_scale=config.guidance_scale,
            strength=[row.strength for row in batch],
            stop=[row.stop for row in batch],
        )
        scheduler = type(pipe.scheduler).__name__
        yield [row.model_copy(update={"scheduler": scheduler}) for row in batch], pictures


def _draw(config: GenerateConfig, condition: Condition, models: list[str]) -> list[Candidate]:
    """One condition's candidates; a condition draws the same values whatever else is in the batch."""
    rng = np.random.default_rng([config.seed, int.from_bytes(hashlib.sha256(condition.id.encode()).digest()[:8], "big")])
    rows = []
    for index in range(config.per_condition):
        row = Candidate(
            id=f"{condition.id}.{index}",
            condition_id=condition.id,
            index=index,
            seed=int(rng.integers(2**31)),
            steps=int(rng.integers(config.steps_low, config.steps_high + 1)),
            negative_prompt=str(rng.choice(config.negative_prompts)),
            true_cfg=round(float(rng.uniform(config.true_cfg_low, config.true_cfg_high)), 3),
            guidance_scale=config.guidance_scale,
            strength=float(rng.choice(config.strengths)),
            scheduler="",  # known once the model is loaded
            model_digest=models[0],
            stop=None,
        )
        stop = int(rng.integers(config.stop_low, config.stop_high + 1))
        if rng.random() < config.one_step:
            shown = {"steps": config.one_step_of, "true_cfg": config.true_cfg_low, "strength": 1.0, "stop": stop}
            row = row.model_copy(update=shown)
        rows.append(row)
    others = rng.random(config.per_condition) < config.base_share  # drawn last: the rest does not depend on how many models there are
    return [row.model_copy(update={"model_digest": models[-1]}) if other else row for row, other in zip(rows, others, strict=True)]


def _picture(out: Path, taxonomy: Taxonomy, conditions: list[Condition], shards: ShardReader, per_condition: int) -> None:
    """One row per active task: its source and its candidates."""
    made, captions = ShardReader(out), []
    rows: list[list[Image.Image | None]] = []
    for task in taxonomy.active:
        condition = next((c for c in conditions if c.task == task.name), None)
        if condition is None:
            continue
        asked: list[Image.Image | None] = [overlay(shards[f"{condition.id}.image"], shards[f"{condition.id}.mask"])]
        rows.append(asked + [made[f"{condition.id}.{index}"] for index in range(per_condition)])
        captions.append(f"{task.title}: {condition.prompt}")
    columns = ["asked", *(f"candidate {index + 1}" for index in range(per_condition))]
    save_picture(out, "candidates", grid(rows, columns=columns, captions=captions))
