"""How the policy is trained (ops/train_policy.py): what the paper gives, and what is ours."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from models.config import OpConfig


class TrainPolicyConfig(OpConfig):
    """How the policy is trained."""

    iterations: int = Field(8000, ge=1, description="policy steps (paper: about 8,000 shown)")
    batch_size: int = Field(8, ge=1, description="conditions per iteration, all of one task (paper: 8)")
    learning_rate: float = Field(1e-5, gt=0, description="AdamW learning rate, constant after warm-up (paper: 1e-5)")
    warmup: int = Field(10, ge=0, description="iterations of linear warm-up (ours)")
    max_grad_norm: float = Field(1.0, gt=0, description="gradient norm is clipped to this (ours)")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay (ours)")
    cap: float = Field(0.9, gt=0, le=1, description="lambda: a dimension judged better than this gives no gradient (ours)")
    temperature: float = Field(
        1.0,
        gt=0,
        description="the judge's log-odds are divided by this: where it is sure of itself, P(Yes) is flat and gives no gradient (ours)",
    )
    same_noise: bool = Field(
        False,
        description="reference and policy start from one noise, so that no luck tells their edits apart; the paper draws two (ours)",
    )
    by_shortfall: bool = Field(
        False, description="a dimension weighs in proportion to its batch's mean J_e, so that none is given up; else all alike (ours)"
    )
    jitter: int = Field(
        0,
        ge=0,
        description="the judge is shown pictures moved at random by up to so many pixels: its gradient hangs on its grid of patches (ours)",
    )
    views: int = Field(1, ge=1, description="shifts of each pair of pictures over which the judge's log-odds are averaged (ours)")
    decay: float = Field(0.99, ge=0, lt=1, description="tau of the average (static) or the following reference (ema) (ours)")
    deliver: Literal["policy", "average"] = Field("policy", description="which of the two returned weights becomes the version (ours)")
    steps: int = Field(28, ge=2, description="inference steps of reference and policy (ours)")
    stop_low: int = Field(14, ge=1, description="earliest stop step t1 (ours)")
    stop_high: int = Field(27, ge=1, description="latest stop step t2, at most steps - 1 (ours)")
    guidance_scale: float = Field(1.0, description="FLUX's distilled guidance (the authors' demos: 1.0)")
    true_cfg: float = Field(1.0, ge=1, description="classifier-free guidance while training (ours)")
    watch_true_cfg: float = Field(
        4.0, ge=1, description="guidance where checkpoints and health are looked at, as in the evaluation (the authors' demos: 4.0)"
    )
    negative_prompt: str = Field("nsfw", description="negative prompt where true_cfg or watch_true_cfg is above 1 (the authors' demos)")
    lora_rank: int = Field(0, ge=0, description="rank of LoRA layers; 0 trains every weight (ours)")
    lora_alpha: int = Field(32, ge=1, description="LoRA scale (ours)")
    start: str = Field(
        "base", description="start and first reference: `base`, or a release, named by a stage such as `production` or by its digest (ours)"
    )
    keep_weight: float = Field(0.0, ge=0, description="weight of the squared drift outside the mask; the paper has no such term (ours)")
    least_judged: float = Field(0.6, ge=0, le=1, description="cells whose judge accuracy's lower bound is under this give no reward (ours)")
    difficulty_window: int = Field(
        0,
        ge=0,
        description="tasks take turns by p_k times the share of their comparisons still under the cap in so many of their last iterations; "
        "0 by p_k alone (ours)",
    )
    least_difficulty: float = Field(0.1, gt=0, le=1, description="a task that is won keeps this share of its p_k (ours)")
    checkpoint_every: int = Field(50, ge=1, description="iterations between checkpoints, each compared with the base (ours)")
    enough: float = Field(
        0.6,
        gt=0,
        le=1,
        description="mean P(Yes) of a task's dimension by the second judge, above which it adds no more to a checkpoint's score (ours)",
    )
    patience: int = Field(0, ge=0, description="checkpoints in a row no better than the best before stopping; 0 never stops (ours)")
    watch_per_task: int = Field(
        16, ge=1, description="validation conditions per task on which checkpoints are compared and health is measured (ours)"
    )
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="precision of frozen weights and activations (ours)")
    gradient_checkpointing: bool = Field(False, description="trade time for memory (ours)")
    seed: int = Field(0, description="seed of every draw (ours)")

    @model_validator(mode="after")
    def _stops(self) -> TrainPolicyConfig:
        if not self.stop_low <= self.stop_high < self.steps:
            raise ValueError(f"stop steps {self.stop_low}..{self.stop_high} must lie inside 1..{self.steps - 1}")
        if self.dtype != "float32" and not self.lora_rank:
            raise ValueError(f"dtype {self.dtype} needs lora_rank above 0: full training keeps float32 weights")
        if self.views > 1 and not self.jitter:
            raise ValueError(f"{self.views} views are all the same without jitter")
        return self
