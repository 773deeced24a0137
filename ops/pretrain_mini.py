"""Train the mini base weights from nothing: autoencoder, FLUX Fill, judge (`onereward pretrain-mini`).

    pretrain_mini(PretrainConfig(), out, Progress(print), Taxonomy.load())

Writes `out/flux-fill/` and `out/judge/` in the layouts of FLUX.1-Fill-dev and Qwen2.5-VL-7B-Instruct, in float16, and
`out/recipe.json` with configuration, figures and durations. Parts already in `out` are kept, so an interrupted run goes on.
The shipped weights are an output of this recipe; they are not rebuilt elsewhere, because floats differ between processors.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxFillPipeline
from pydantic import Field

from infra.progress import Progress
from models.config import OpConfig
from models.flux_fill.loading import load_pipeline
from models.mini.build import build_flux_fill
from models.mini.scenes import WORDS
from models.taxonomy import Taxonomy
from ops.pretrain_judge import make_bank, pretrain_judge
from ops.pretrain_policy import encode_pool, pretrain_policy, requests
from ops.pretrain_vae import pretrain_vae

NEGATIVES = ("nsfw", "blurry", "low quality", "")


class PretrainConfig(OpConfig):
    """How long each part of the mini base is trained."""

    vae_steps: int = Field(2200, ge=1, description="autoencoder steps (ours)")
    vae_batch: int = Field(32, ge=1, description="autoencoder batch (ours)")
    vae_learning_rate: float = Field(2.5e-3, gt=0, description="autoencoder peak learning rate (ours)")
    requests: int = Field(8000, ge=64, description="editing requests the policy is trained on (ours)")
    policy_steps: int = Field(3000, ge=1, description="flow-matching steps (ours)")
    policy_batch: int = Field(64, ge=1, description="flow-matching batch (ours)")
    policy_learning_rate: float = Field(1.2e-3, gt=0, description="flow-matching peak learning rate (ours)")
    judge_requests: int = Field(1000, ge=64, description="requests whose edits the judge is trained on (ours)")
    judge_dense_steps: int = Field(350, ge=1, description="steps of dense supervision of the vision tower (ours)")
    judge_compare_steps: int = Field(420, ge=1, description="steps of comparison on scores (ours)")
    judge_learning_rate: float = Field(1.5e-3, gt=0, description="judge peak learning rate (ours)")
    seed: int = Field(0, description="seed of every draw (ours)")


def pretrain_mini(config: PretrainConfig, out: Path, progress: Progress, taxonomy: Taxonomy) -> dict[str, Any]:
    """Run the whole recipe (about an hour on two cores) and return what `recipe.json` holds."""
    out.mkdir(parents=True, exist_ok=True)
    recipe: dict[str, Any] = {"config": config.model_dump(), "taxonomy": taxonomy.digest(), "torch": torch.__version__, "figures": {}}
    place = out / "recipe.json"
    if place.exists():
        recipe["figures"] = json.loads(place.read_text())["figures"]

    def part(name: str, done: bool, work: Any) -> None:
        if done:
            progress.say(f"pretrain {name}: kept from an earlier run")
            return
        start = time.monotonic()
        figures = work()
        recipe["figures"][name] = {**figures, "seconds": round(time.monotonic() - start)}
        place.write_text(json.dumps(recipe, indent=2) + "\n")

    part("vae", (out / "vae" / "config.json").exists(), lambda: _vae(config, out, progress))
    part("policy", (out / "flux-fill" / "model_index.json").exists(), lambda: _policy(config, out, progress, taxonomy))
    part("judge", (out / "judge" / "config.json").exists(), lambda: _judge(config, out, progress, taxonomy))
    return recipe


def _vae(config: PretrainConfig, out: Path, progress: Progress) -> dict[str, float]:
    vae, figures = pretrain_vae(config.vae_steps, config.vae_batch, config.vae_learning_rate, config.seed, progress)
    vae.save_pretrained(out / "vae")
    return figures


def _policy(config: PretrainConfig, out: Path, progress: Progress, taxonomy: Taxonomy) -> dict[str, float]:
    torch.manual_seed(config.seed)
    texts = sorted({prompt for _, _, prompt in requests(taxonomy, 2000, seed=5)} | {f'the word "{word}"' for word in WORDS} | set(NEGATIVES))
    pipe = build_flux_fill(texts)
    pipe.vae = AutoencoderKL.from_pretrained(out / "vae")
    pool = encode_pool(pipe, taxonomy, config.requests, config.seed, progress)
    figures = pretrain_policy(
        pipe,
        pool,
        steps=config.policy_steps,
        batch=config.policy_batch,
        learning_rate=config.policy_learning_rate,
        seed=config.seed,
        progress=progress,
    )
    FluxFillPipeline(**pipe.components).to(dtype=torch.float16).save_pretrained(out / "flux-fill")
    return figures


def _judge(config: PretrainConfig, out: Path, progress: Progress, taxonomy: Taxonomy) -> dict[str, float]:
    bank = make_bank(load_pipeline(out / "flux-fill"), taxonomy, config.judge_requests, config.seed, progress)
    judge, figures = pretrain_judge(
        taxonomy,
        bank,
        dense_steps=config.judge_dense_steps,
        compare_steps=config.judge_compare_steps,
        learning_rate=config.judge_learning_rate,
        seed=config.seed,
        progress=progress,
    )
    judge.model.to(torch.float16)
    judge.save(out / "judge")
    return figures
