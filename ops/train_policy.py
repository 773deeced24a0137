"""Multi-task reward-feedback RL of FLUX Fill: Algorithms 1 and 2 of arXiv 2508.21066.

    train_policy(TrainPolicyConfig(iterations=60), base, judge, curated, out, Progress(print), Taxonomy.load(), mode="static", scratch=work)

One iteration (`Trainer.iterate`): the task k whose turn it is by p_k, and a random stop step t; the reference denoises fully; the policy
denoises to t without gradient and predicts x0 = x_t - sigma_t v in one step with it; the judge compares both on every dimension e of the
task; the policy goes down the gradient of the mean over e of max(0, cap - P(Yes | evaluated, reference, q)), which may be weighed.
`static` keeps the reference and averages the policy aside (Algorithm 1); `ema` lets the reference follow (Algorithm 2).

Several GPUs: call `train_policy` in a module started by `accelerate launch --multi_gpu --num_processes N -m MODULE` (without a GPU:
the same under `ACCELERATE_USE_CPU=true`). Every process takes an equal share of the batch, and the result is that of one process.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedType
from peft import PeftModel
from torch import Tensor

from infra.progress import Progress
from models.adapters import Shadow, trainable
from models.errors import BrokenWeights, ConfigError, NotEnoughData
from models.flux_fill.loading import forget_origin, load_pipeline
from models.flux_fill.sampler import Encoded, Sampler
from models.images import paste, shifted, to_mask, to_tensor
from models.judge import Judge
from models.judge.loss import hinge_reward_loss, keep_loss
from models.records import Condition, read_rows
from models.shards import ShardReader
from models.taxonomy import Task, Taxonomy
from ops.checkpoints import load_newest, save
from ops.fit_reward import SECOND
from ops.folders import write_metrics
from ops.policy_config import TrainPolicyConfig
from ops.policy_health import measure_health, rewarded_dimensions, shown_pasted
from ops.policy_watch import Watch, summary

MODES = ("static", "ema")
REPLICATED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)  # all weights in each process, as `Shadow` needs


def train_policy(
    config: TrainPolicyConfig,
    base: Path,
    judge: Path,
    curated: Path,
    out: Path,
    progress: Progress,
    taxonomy: Taxonomy,
    mode: str,
    scratch: Path,
    make_trainer: Callable[..., Trainer] | None = None,
) -> dict[str, Any]:
    """Train one policy and write it with its curve, health figures and pictures.

    Args:
        base: FLUX Fill folder the policy starts from, which is also its first reference: the base's, or the release's that
            `config.start` stands for. Only LoRA layers over the base are delivered as such, over a release they are merged.
        judge: a reward_model artifact (its metrics say which cells it can judge) or a judge's folder.
        mode: `static` (Algorithm 1) or `ema` (Algorithm 2).
        scratch: holds checkpoints; a run interrupted here goes on from the newest. All processes must see the same folder.
        make_trainer: called like `Trainer`, in its place; it needs a `scratch` of its own.

    Only the main process writes; the others return an empty dict as soon as training is over.

    Raises ConfigError, NotEnoughData, MissingWeights, BrokenWeights.
    """
    if mode not in MODES:
        raise ConfigError(f"Unknown reference mode {mode!r}.", f"Use one of {', '.join(MODES)}.")
    trainer = (make_trainer or Trainer)(config, base, judge, curated, taxonomy, mode)
    main = trainer.accelerator.is_main_process
    progress = progress if main else Progress()
    checkpoints = scratch / f"checkpoints-{mode}-{config.digest()[:12]}"  # another mode or setting is another run
    done = trainer.resume(checkpoints)
    if done:
        progress.say(f"policy {mode}: resumed after iteration {done}")
    left = range(0) if trainer.watch.stale(config.patience) else range(done, config.iterations)  # killed after its last checkpoint
    with progress.bar(f"policy {mode}", config.iterations, "step", initial=done) as bar:
        for step in left:
            row = trainer.iterate(step)
            bar.advance(1, loss=row["loss"], reward=row["reward"])
            due = (step + 1) % config.checkpoint_every == 0 or step + 1 == config.iterations
            if due and not trainer.checkpoint(checkpoints, step + 1, progress):
                break
    return trainer.finish(out, progress) if main else {}


def _check_processes(accelerator: Accelerator, batch_size: int) -> None:
    """Refuse what would train something else than one process does."""
    count, started = accelerator.num_processes, int(os.environ.get("WORLD_SIZE", 1))
    if started != count:
        raise ConfigError(f"{started} processes were started, and each would train alone.", "Without a GPU set ACCELERATE_USE_CPU=true.")
    if accelerator.distributed_type not in REPLICATED:
        raise ConfigError(
            f"{accelerator.distributed_type.value} splits the weights over processes, which no reference can be swapped into.",
            "Start with `accelerate launch --multi_gpu`, and set lora_rank where memory is short.",
        )
    if batch_size % count:
        raise ConfigError(f"batch_size {batch_size} does not split evenly over {count} processes.", f"Take a multiple of {count}.")


class Trainer:
    """Everything one run holds: policy, its shadows, judge, sampler, conditions by task."""

    def __init__(self, config: TrainPolicyConfig, base: Path, judge: Path, curated: Path, taxonomy: Taxonomy, mode: str):
        self.config, self.curated, self.taxonomy, self.mode = config, curated, taxonomy, mode
        self.accelerator = Accelerator(mixed_precision="no")  # precision is `dtype`; a scaler would not survive resuming
        _check_processes(self.accelerator, config.batch_size)
        device, dtype = self.accelerator.device, getattr(torch, config.dtype)
        torch.manual_seed(config.seed)
        pipe = load_pipeline(base, dtype).to(device)
        self.sampler = Sampler(pipe)
        if config.gradient_checkpointing:
            pipe.transformer.enable_gradient_checkpointing()
        self.policy, self.parameters = trainable(pipe.transformer.eval(), lora_rank=config.lora_rank, lora_alpha=config.lora_alpha)
        for parameter in self.parameters.values():
            parameter.data = parameter.data.float()  # optimizer steps of 1e-5 vanish in bfloat16
        self.judge = Judge.load(judge, taxonomy, dtype)
        self.judge.model.to(device).requires_grad_(False)
        self.paste_source = shown_pasted(judge)
        self.base, self.average = Shadow(self.parameters), Shadow(self.parameters)  # the start, which stays, and what follows the policy
        self.reference = self.base if mode == "static" else self.average
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=config.learning_rate, weight_decay=config.weight_decay)
        self.network, self.optimizer = self.accelerator.prepare(self.policy, self.optimizer)
        self.shards = ShardReader(curated)
        self.conditions = [row for row in read_rows(curated / "conditions.jsonl", Condition) if row.split == "train"]
        self.rewarded = rewarded_dimensions(taxonomy, judge, config.least_judged)
        self.tasks = [t for t in taxonomy.active if self.rewarded[t.name] and any(c.task == t.name for c in self.conditions)]
        if not self.tasks:
            raise NotEnoughData(f"{curated} has no training condition of a task the judge can judge.", "Label more, or lower least_judged.")
        self.best = Shadow(self.parameters)
        self.watch = self._watch(judge, dtype)
        self.rows: list[dict[str, Any]] = []

    def _watch(self, judge: Path, dtype: torch.dtype) -> Watch:
        config, second = self.config, None
        if (judge / SECOND).is_dir():
            second = Judge.load(judge / SECOND, self.taxonomy, dtype)
            second.model.to(self.accelerator.device).requires_grad_(False)
        return Watch(
            self.sampler,
            self.base,
            self.judge,
            second,
            self.shards,
            self._validation(),
            self.taxonomy,
            settings={"steps": config.steps, "true_cfg": config.watch_true_cfg, "guidance_scale": config.guidance_scale},
            negative_prompt=config.negative_prompt,
            batch_size=config.batch_size,
            pasted=self.paste_source,
            enough=config.enough,
        )

    def iterate(self, step: int) -> dict[str, Any]:
        """One iteration of Algorithm 1 or 2. Its draws depend on seed, step and earlier rows alone, so resuming skips nothing."""
        config = self.config
        rng = np.random.default_rng([config.seed, step])  # the same on every process: one task and one stop step per global batch
        task = self._next_task(rng)
        stop = int(rng.integers(config.stop_low, config.stop_high + 1))
        pool = [c for c in self.conditions if c.task == task.name]
        batch = [pool[i] for i in rng.choice(len(pool), config.batch_size, replace=len(pool) < config.batch_size)]
        seeds = rng.integers(2**31, size=(2, config.batch_size))  # two different noises: the reference's, the policy's
        if config.same_noise:
            seeds[0] = seeds[1]
        shifts = rng.integers(-config.jitter, config.jitter + 1, (config.views, 2)).tolist()
        mine = slice(self.accelerator.process_index, None, self.accelerator.num_processes)
        sources, masks, encoded = self._encode(batch[mine])
        loss, p_yes = self._loss(task, batch[mine], sources, masks, encoded, seeds[0, mine].tolist(), seeds[1, mine].tolist(), stop, shifts)
        # Equal shares: the mean over processes is the mean over the batch, and what one process finds wrong stops all of them.
        below = (p_yes < config.cap).float().mean()
        shown, below, *rewards = self.accelerator.reduce(torch.cat([torch.stack([loss.detach(), below]), p_yes.mean(1)]), "mean").tolist()
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * min(1.0, (step + 1) / max(1, config.warmup))
        if not math.isfinite(shown):
            raise BrokenWeights(f"The loss of step {step + 1} is {shown}.", "Lower the learning rate, or use another judge.")
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        norm = self.accelerator.clip_grad_norm_(list(self.parameters.values()), config.max_grad_norm)
        self.optimizer.step()
        self.average.follow(config.decay)
        row = {"step": step + 1, "task": task.name, "stop": stop, "loss": shown, "grad_norm": float(norm or 0.0), "below_cap": below}
        row["reward"] = sum(rewards) / len(rewards)
        row["rewards"] = dict(zip(self.rewarded[task.name], rewards, strict=True))
        self.rows.append(row)
        return row

    def _next_task(self, rng: np.random.Generator) -> Task:
        """The task that lags furthest behind its share of the iterations: p_k holds for few of them too, where chance may forget a task."""
        shares = np.array([task.probability * self._difficulty(task.name) for task in self.tasks])
        had = np.array([sum(row["task"] == task.name for row in self.rows) for task in self.tasks])
        lag = shares / shares.sum() * (len(self.rows) + 1) - had
        return self.tasks[rng.choice(np.flatnonzero(np.isclose(lag, lag.max())))]

    def _difficulty(self, task: str) -> float:
        """Share of the task's last comparisons that gave a gradient, at least `least_difficulty`; one for a task that had no turn."""
        window = self.config.difficulty_window
        last = [row["below_cap"] for row in self.rows if row["task"] == task][-window:] if window else []
        return max(self.config.least_difficulty, sum(last) / len(last)) if last else 1.0

    def _encode(self, batch: list[Condition]) -> tuple[Tensor, Tensor, Encoded]:
        device = self.accelerator.device
        sources = torch.stack([to_tensor(self.shards[f"{c.id}.image"]) for c in batch]).to(device)  # [B, 3, H, W]
        masks = torch.stack([to_mask(self.shards[f"{c.id}.mask"]) for c in batch]).to(device)  # [B, 1, H, W]
        negatives = [self.config.negative_prompt] * len(batch) if self.config.true_cfg > 1 else None
        return sources, masks, self.sampler.encode(sources, masks, [c.prompt for c in batch], negatives)

    def _loss(
        self,
        task: Task,
        batch: list[Condition],
        sources: Tensor,
        masks: Tensor,
        encoded: Encoded,
        reference_seeds: list[int],
        policy_seeds: list[int],
        stop: int,
        shifts: list[list[int]],
    ) -> tuple[Tensor, Tensor]:
        """The loss (mean of J_e by their weights, and the drift if weighted) and P(Yes) [D, B], over the rewarded dimensions."""
        config, sampler, (height, width) = self.config, self.sampler, sources.shape[-2:]
        settings: dict[str, Any] = {"true_cfg": config.true_cfg, "guidance_scale": config.guidance_scale}
        with torch.no_grad():
            with self.reference.applied():
                x0, _ = sampler.denoise(
                    self.network, encoded, sampler.noise(reference_seeds, height, width), steps=config.steps, **settings
                )
            reference = sampler.decode(x0, height, width)
            noise = sampler.noise(policy_seeds, height, width)
            x_t, sigma = sampler.denoise(self.network, encoded, noise, steps=config.steps, stop=stop, **settings)
        evaluated = sampler.decode(sampler.predict_x0(self.network, x_t, sigma, encoded, **settings), height, width)
        drift: Tensor | float = 0.0
        if config.keep_weight:
            kept = (1 - masks).sum()
            share = kept / self.accelerator.reduce(kept, "mean")  # a mean over pixels, of which every process keeps another number
            drift = config.keep_weight * share * keep_loss(evaluated, sources, masks)
        if self.paste_source:
            reference, evaluated = paste(sources, reference, masks), paste(sources, evaluated, masks)
        p_yes = (self.log_odds(task, batch, masks, evaluated, reference, shifts) / config.temperature).sigmoid()  # [D, B]
        return hinge_reward_loss(p_yes, config.cap, self._weights(p_yes.detach())) + drift, p_yes.detach()

    def log_odds(
        self, task: Task, batch: list[Condition], masks: Tensor, evaluated: Tensor, reference: Tensor, shifts: list[list[int]]
    ) -> Tensor:
        """The judge's log(P(Yes) / P(No)) [D, B] of the rewarded dimensions, with a gradient into `evaluated`.

        Args:
            masks: [B, 1, H, W]. evaluated, reference: [B, 3, H, W] in [0, 1], as the judge is shown them.
            shifts: by how many pixels each view is moved, to the left and up.
        """
        first, second = (self.judge.encode(torch.cat([shifted(shown, *by) for by in shifts])) for shown in (evaluated, reference))
        views, log_odds = len(shifts), []  # pictures are encoded once, whatever is asked of them
        for name in self.rewarded[task.name]:
            queries = [self.taxonomy.query(task.name, name, c.prompt) for c in batch]
            log_odds.append(self.judge.compare(first, second, queries * views).view(views, -1).mean(0))
        return torch.stack(log_odds)

    def _weights(self, p_yes: Tensor) -> Tensor:
        """Weights [D] from P(Yes) [D, B], which takes no gradient: ones, or of mean one in proportion to each dimension's mean J_e over the
        whole batch (zeros where all are won), so that a step goes along the gradient of the sum of these means squared."""
        if not self.config.by_shortfall:
            return torch.ones_like(p_yes[:, 0])
        shortfalls = self.accelerator.reduce((self.config.cap - p_yes).relu().mean(1), "mean")  # one share of the batch a process
        return len(shortfalls) * shortfalls / shortfalls.sum().clamp(min=1e-12)  # where all are won: zeros

    def _validation(self) -> list[Condition]:
        rows = [row for row in read_rows(self.curated / "conditions.jsonl", Condition) if row.split == "validation"]
        order = np.random.default_rng(self.config.seed).permutation(len(rows))
        return [
            c for task in self.taxonomy.active for c in [rows[i] for i in order if rows[i].task == task.name][: self.config.watch_per_task]
        ]

    def delivered(self) -> AbstractContextManager[None]:
        """Inside, the policy has the weights that would be delivered now."""
        return self.average.applied() if self.config.deliver == "average" else nullcontext()

    def checkpoint(self, folder: Path, step: int, progress: Progress) -> bool:
        """Compare what would be delivered with the base, keep it when it is the best so far, save where the run stands.

        Main process only; every process is told whether to go on.
        """
        stop = False
        if self.accelerator.is_main_process:
            with self.delivered():
                self.watch.look(self.policy, step, progress, f"policy {self.mode}: validation at step {step}")
                if self.watch.best == step:
                    self.best.follow(0)
            sets = {"policy": dict(self.parameters), "average": self.average.values, "best": self.best.values}
            record = {"curve": self.rows, "looks": self.watch.rows, "over_optimised": self.watch.over_optimised}
            save(folder, step, sets=sets, optimizer=self.optimizer, record=record)  # type: ignore[arg-type]
            stop = self.watch.stale(self.config.patience)
        return not self.accelerator.reduce(torch.tensor(float(stop), device=self.accelerator.device)).item()

    def resume(self, folder: Path) -> int:
        """Take the newest checkpoint, if any; returns the number of iterations already done."""
        found = load_newest(folder, self.optimizer)
        steps = self.accelerator.gather(torch.tensor([found[0] if found else 0], device=self.accelerator.device)).tolist()
        if len(set(steps)) > 1:
            raise ConfigError(f"The processes found checkpoints of steps {steps} in {folder}.", "Keep it where every machine sees it.")
        if found is None:
            return 0
        step, sets, record = found
        self.rows, self.watch.rows, self.watch.over_optimised = record["curve"], record["looks"], record["over_optimised"]
        for name, value in sets["policy"].items():
            self.parameters[name].data.copy_(value)
        self.average.load(sets["average"])
        self.best.load(sets["best"])
        return step

    def finish(self, out: Path, progress: Progress) -> dict[str, Any]:
        """Write the version: weights of the best checkpoint, curve, what was seen of every checkpoint, health, pictures."""
        for name, parameter in self.parameters.items():
            parameter.data.copy_(self.best.values[name])
        looks = summary(self.watch.rows)
        metrics = {
            "mode": self.mode,
            "delivered": self.config.deliver,
            "rewarded": {task: list(dimensions) for task, dimensions in self.rewarded.items()},
            "steps": len(self.rows),
            "best_step": self.watch.best,
            "over_optimised": self.watch.over_optimised,
            "looks": looks,
            **measure_health(
                self.policy,
                self.base,
                self.sampler,
                self.shards,
                self.watch.conditions,
                self.rows,
                self.taxonomy,
                settings=self.watch.settings,
                negative_prompt=self.config.negative_prompt,
                batch_size=self.config.batch_size // self.accelerator.num_processes,  # what has fitted into memory so far
                out=out,
                progress=progress,
                label=f"policy {self.mode}: health",
            ),
        }
        network = self.policy
        if isinstance(network, PeftModel) and self.config.start != "base":  # whoever loads LoRA layers adds them to the base
            network = network.merge_and_unload()
        folder = out / ("adapter" if isinstance(network, PeftModel) else "transformer")
        network.save_pretrained(folder)
        forget_origin(folder)
        with (out / "curve.jsonl").open("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in self.rows)
        with (out / "checkpoints.jsonl").open("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in self.watch.rows)
        write_metrics(out, metrics)
        return metrics
