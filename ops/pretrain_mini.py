"""Train the mini base weights: autoencoder, FLUX Fill, judge (`onereward pretrain-mini [--start FOLDER]`).

    pretrain_mini(PretrainConfig(), out, Progress(print), Taxonomy.load())                               # from nothing
    pretrain_mini(FURTHER, out, Progress(print), Taxonomy.load(), start=Path("data/mini"))               # from an earlier base

Writes `out/flux-fill/` and `out/judge/` in the layouts of FLUX.1-Fill-dev and Qwen2.5-VL-7B-Instruct, in float16, and
`out/recipe.json` with configuration, figures and durations, and the same of the base it started from. A part is there whole
or not at all, and parts already in `out` are kept, so an interrupted run goes on.
The shipped weights are an output of this recipe; they are not rebuilt elsewhere, because floats differ between processors.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxFillPipeline
from pydantic import Field, model_validator

from infra.progress import Progress
from infra.stores.base import directory_digest
from models.config import OpConfig
from models.errors import ConfigError
from models.flux_fill.loading import forget_origin, load_pipeline
from models.judge import Judge
from models.mini.build import build_flux_fill, build_vae
from models.mini.scenes import WORDS
from models.taxonomy import Taxonomy
from ops.pretrain_judge import make_bank, pretrain_judge, untrained_judge
from ops.pretrain_policy import encode_pool, pretrain_policy, requests
from ops.pretrain_vae import pretrain_vae

RECIPE = "recipe.json"
PARTS = {"vae": "vae", "policy": "flux-fill", "judge": "judge"}  # and their folders
KEPT_FROM = {**PARTS, "vae": "flux-fill/vae"}  # where a finished base has them
DRAFT = "draft"
NEGATIVES = ("nsfw", "blurry", "low quality", "")


class PretrainConfig(OpConfig):
    """How long each part of the mini base is trained."""

    vae_steps: int = Field(2200, ge=0, description="autoencoder steps; 0 keeps the start's (ours)")
    vae_batch: int = Field(32, ge=1, description="autoencoder batch (ours)")
    vae_learning_rate: float = Field(2.5e-3, gt=0, description="autoencoder learning rate of AdamW (ours)")
    vae_muon_rate: float = Field(0.02, gt=0, description="autoencoder learning rate of Muon (ours)")
    requests: int = Field(8000, ge=64, description="editing requests the policy is trained on (ours)")
    policy_steps: int = Field(3000, ge=0, description="flow-matching steps; 0 keeps the start's (ours)")
    policy_batch: int = Field(64, ge=1, description="flow-matching batch (ours)")
    policy_learning_rate: float = Field(1.2e-3, gt=0, description="flow-matching learning rate of AdamW (ours)")
    policy_muon_rate: float = Field(0.02, gt=0, description="flow-matching learning rate of Muon (ours)")
    judge_requests: int = Field(1000, ge=64, description="requests whose edits the judge is trained on (ours)")
    judge_dense_steps: int = Field(350, ge=1, description="steps of dense supervision of the vision tower (ours)")
    judge_read_steps: int = Field(300, ge=0, description="steps of comparison by what the prompt says of an object, before the next (ours)")
    judge_compare_steps: int = Field(420, ge=0, description="steps of comparison on scores; 0 keeps the start's judge (ours)")
    judge_learning_rate: float = Field(1.5e-3, gt=0, description="judge peak learning rate (ours)")
    seed: int = Field(0, description="seed of every draw (ours)")

    @model_validator(mode="after")
    def _one_vae(self) -> PretrainConfig:
        if self.vae_steps and not self.policy_steps:
            raise ValueError("policy_steps 0 keeps the start's policy with the autoencoder in its folder: vae_steps has to be 0 too")
        return self


# Going on from weights that are already trained, at lower rates. The shipped base was made so from the one before it, whose `data.dvc` and
# bytes are in the history of this file; its recipe stands under "start" in recipe.json. Of that one it kept autoencoder and policy.
FURTHER = PretrainConfig(
    vae_steps=0,
    policy_steps=0,
    judge_requests=3000,
    judge_dense_steps=200,
    judge_read_steps=600,
    judge_compare_steps=600,
    judge_learning_rate=1e-3,
    seed=4,
)


def resumable(out: Path) -> bool:
    """Whether nothing in the folder `out` is foreign to this recipe: it is empty, or an interrupted run left it."""
    return {path.name for path in out.iterdir()} <= {RECIPE, DRAFT, *PARTS.values()}


def pretrain_mini(config: PretrainConfig, out: Path, progress: Progress, taxonomy: Taxonomy, start: Path | None = None) -> dict[str, Any]:
    """Run the whole recipe (about an hour on two cores) and return what `recipe.json` holds.

    Args:
        start: a base made by this recipe under the same taxonomy, whose weights training goes on from; random ones without.

    Raises ConfigError where `start` is no such base, and where 0 steps ask for a part that no start has.
    """
    if start and not (start / RECIPE).is_file():
        raise ConfigError(
            f"{start} is no mini base: it holds no {RECIPE}.", "Give what `onereward pretrain-mini` wrote, such as data/mini."
        )
    out.mkdir(parents=True, exist_ok=True)
    recipe: dict[str, Any] = {"config": config.model_dump(), "taxonomy": taxonomy.digest(), "torch": torch.__version__, "figures": {}}
    if start:
        recipe["start"] = json.loads((start / RECIPE).read_text()) | {"digest": directory_digest(start)[0]}
    place, draft = out / RECIPE, out / DRAFT
    if place.exists():
        recipe["figures"] = json.loads(place.read_text())["figures"]

    def part(name: str, steps: int, work: Callable[[Path], dict[str, float]]) -> None:
        """Let `work`, or the start where no step is asked for, fill the draft, which becomes the part once its figures are recorded."""
        if (out / PARTS[name]).exists() or (name == "vae" and (out / PARTS["policy"]).exists()):  # the policy's folder holds the vae
            progress.say(f"pretrain {name}: kept from an earlier run")
            return
        began = time.monotonic()
        shutil.rmtree(draft, ignore_errors=True)
        if steps:
            draft.mkdir()
            recipe["figures"][name] = {**work(draft), "seconds": round(time.monotonic() - began)}
        elif start:
            shutil.copytree(start / KEPT_FROM[name], draft)
            recipe["figures"][name] = recipe["start"]["figures"][name]
        else:
            raise ConfigError(f"{name}: 0 steps keep what the start has, and there is no start.", "Give --start, or steps.")
        record = draft / RECIPE
        record.write_text(json.dumps(recipe, indent=2) + "\n")
        record.replace(place)
        draft.replace(out / PARTS[name])

    part("vae", config.vae_steps, lambda folder: _vae(config, start, folder, progress))
    part("policy", config.policy_steps, lambda folder: _policy(config, start, out / PARTS["vae"], folder, progress, taxonomy))
    part("judge", config.judge_compare_steps, lambda folder: _judge(config, start, out / PARTS["policy"], folder, progress, taxonomy))
    return recipe


def _vae(config: PretrainConfig, start: Path | None, out: Path, progress: Progress) -> dict[str, float]:
    torch.manual_seed(config.seed)
    vae = load_pipeline(start / PARTS["policy"]).vae if start else build_vae()
    figures = pretrain_vae(
        vae,
        steps=config.vae_steps,
        batch=config.vae_batch,
        learning_rate=config.vae_learning_rate,
        muon_rate=config.vae_muon_rate,
        seed=config.seed,
        progress=progress,
    )
    vae.save_pretrained(out)
    return figures


def _policy(config: PretrainConfig, start: Path | None, vae: Path, out: Path, progress: Progress, taxonomy: Taxonomy) -> dict[str, float]:
    torch.manual_seed(config.seed)
    if start:
        pipe = load_pipeline(start / PARTS["policy"])
    else:
        asked = {prompt for _, _, prompt in requests(taxonomy, 2000, seed=5)}
        pipe = build_flux_fill(sorted(asked | {f'the word "{word}"' for word in WORDS} | set(NEGATIVES)))
    pipe.vae = AutoencoderKL.from_pretrained(vae)
    pool = encode_pool(pipe, taxonomy, config.requests, config.seed, progress)
    figures = pretrain_policy(
        pipe,
        pool,
        steps=config.policy_steps,
        batch=config.policy_batch,
        learning_rate=config.policy_learning_rate,
        muon_rate=config.policy_muon_rate,
        seed=config.seed,
        progress=progress,
    )
    FluxFillPipeline(**pipe.components).to(dtype=torch.float16).save_pretrained(out)
    forget_origin(out)
    return figures


def _judge(config: PretrainConfig, start: Path | None, flux: Path, out: Path, progress: Progress, taxonomy: Taxonomy) -> dict[str, float]:
    bank = make_bank(load_pipeline(flux), taxonomy, config.judge_requests, config.seed, progress)
    judge = Judge.load(start / PARTS["judge"], taxonomy) if start else untrained_judge(taxonomy, config.seed)
    figures = pretrain_judge(
        judge,
        bank,
        dense_steps=config.judge_dense_steps,
        read_steps=config.judge_read_steps,
        compare_steps=config.judge_compare_steps,
        learning_rate=config.judge_learning_rate,
        seed=config.seed,
        progress=progress,
    )
    judge.model.to(torch.float16)
    judge.save(out)
    return figures
