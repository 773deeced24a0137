"""Candidates: K edits per condition, each with its own steps, negative prompt, guidance and noise strength (paper, section 3.1).

    generate(GenerateConfig(), base, curated, out, Progress(print), Taxonomy.load())

With `one_step` some are predictions of x0 from a stop step, the kind of picture that RL shows the judge of the policy. Every drawn value
is stored with its candidate, so any one candidate can be made again from its row alone.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field, model_validator

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
    config: GenerateConfig, base: Path, curated: Path, out: Path, progress: Progress, taxonomy: Taxonomy, model_digest: str
) -> dict[str, Any]:
    """Sample every condition of `curated` and write candidates.jsonl with its shards.

    Args:
        base: FLUX Fill folder, the base's or a release's.
        model_digest: content digest of that folder, stored with every candidate.

    Raises NotEnoughData, MissingWeights, BrokenWeights, UnknownTask.
    """
    conditions = read_rows(curated / "conditions.jsonl", Condition)
    if not conditions:
        raise NotEnoughData(f"{curated} holds no conditions.", "Curate more source images.")
    for condition in conditions:
        taxonomy.task(condition.task)
    device = default_device()
    pipe = load_pipeline(base, getattr(torch, config.dtype)).to(device)
    rows = [row for condition in conditions for row in _draw(config, condition, type(pipe.scheduler).__name__, model_digest)]
    shards, sampler = ShardReader(curated), Sampler(pipe)
    with ShardWriter(out) as writer, progress.bar("candidates", len(rows), "image") as bar:
        for start in range(0, len(conditions), config.chunk):
            chosen = conditions[start : start + config.chunk]
            batch = rows[start * config.per_condition : (start + len(chosen)) * config.per_condition]
            encoded = sampler.encode(
                torch.stack([to_tensor(shards[f"{c.id}.image"]) for c in chosen]).to(device),
                torch.stack([to_mask(shards[f"{c.id}.mask"]) for c in chosen]).to(device),
                [c.prompt for c in chosen],
            )
            encoded = encoded.select([index // config.per_condition for index in range(len(batch))])
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
            for row, picture in zip(batch, pictures, strict=True):
                writer.add(row.id, to_pil(picture))
            bar.advance(len(batch))
    write_rows(out / "candidates.jsonl", rows)
    _picture(out, taxonomy, conditions, shards, config.per_condition)
    metrics = {"candidates": len(rows), "conditions": len(conditions), "per_condition": config.per_condition, "model_digest": model_digest}
    write_metrics(out, metrics)
    return metrics


def _draw(config: GenerateConfig, condition: Condition, scheduler: str, model_digest: str) -> list[Candidate]:
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
            scheduler=scheduler,
            model_digest=model_digest,
            stop=None,
        )
        stop = int(rng.integers(config.stop_low, config.stop_high + 1))
        if rng.random() < config.one_step:
            shown = {"steps": config.one_step_of, "true_cfg": config.true_cfg_low, "strength": 1.0, "stop": stop}
            row = row.model_copy(update=shown)
        rows.append(row)
    return rows


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
