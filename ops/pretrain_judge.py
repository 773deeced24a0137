"""Mini base, part three: the judge. Called by ops/pretrain_mini.py.

From random weights a Yes/No answer is one bit a sample and teaches the vision tower nothing for hundreds of steps. So:
1. dense: every merged vision token regresses what its 16x16 pixels hold (colour, edges, error and edge error against the
   target, share of mask and of object), which is 9 numbers x 16 tokens a picture;
2. comparison: for two edits of one request the log-odds are drawn towards how far the two scores lie apart,
   `L = BCE(log-odds, sigmoid(SHARPNESS * (s_first - s_second) / spread))`, over both orders.
The edits are samples of the mini base and, beside them, spoiled targets. No preference label is used here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from infra.progress import Progress
from models.flux_fill import FluxFillCFGPipeline
from models.flux_fill.sampler import Sampler
from models.images import paste, to_mask, to_tensor
from models.judge import Judge
from models.mini.build import IMAGE_SIZE
from models.mini.judge_build import build_judge
from models.mini.measures import measure
from models.mini.scenes import WORDS, render_scene
from models.taxonomy import Task, Taxonomy
from ops.pretrain_policy import scene_request
from ops.pretrain_vae import BASE_SCENES

# Every value below is ours.
VARIANTS = 4  # edits of one request: two samples, two spoiled targets
SHARPNESS = 2.0
DENSE_FIGURES = 9
TOKENS_PER_SIDE = 4


@dataclass
class Bank:
    """R requests with VARIANTS edits each, pasted into their sources."""

    tasks: list[Task]  # R
    prompts: list[str]
    edits: Tensor  # [R, V, 3, 64, 64] in [0, 1]
    dense: Tensor  # [R, V, 16, DENSE_FIGURES]
    scores: list[dict[str, Tensor]]  # R times {dimension: [V]}


def all_queries(taxonomy: Taxonomy) -> list[str]:
    """Every question the mini judge can be asked: the words its tokenizer must know."""
    prompts = [render_scene(BASE_SCENES + index).caption for index in range(2000)] + [f'the word "{word}"' for word in WORDS]
    return sorted({taxonomy.query(task, dimension, prompt) for task, dimension in taxonomy.cells for prompt in prompts})


def make_bank(pipe: FluxFillCFGPipeline, taxonomy: Taxonomy, count: int, seed: int, progress: Progress) -> Bank:
    """`count` requests on scenes, edited by the mini base and by spoiling their targets, with every score."""
    rng = np.random.default_rng(seed)
    sampler, tasks, prompts, parts, truths = Sampler(pipe), [], [], [], []
    scene_seed = BASE_SCENES + 1_000_000 * (seed + 50)
    while len(tasks) < count:
        scene_seed += 1
        scene, task = render_scene(scene_seed), taxonomy.active[rng.integers(len(taxonomy.active))]
        request = scene_request(task, scene, rng)
        if request is None or request.target is None:
            continue
        tasks.append(task)
        prompts.append(request.prompt)
        truths.append(scene.truth)
        object_mask = to_mask(scene.object_mask)
        parts.append((to_tensor(request.image), to_mask(request.mask), to_tensor(request.target), object_mask))
    sources, masks, targets, objects = (torch.stack(column) for column in zip(*parts, strict=True))
    edits = torch.empty(count, VARIANTS, 3, IMAGE_SIZE, IMAGE_SIZE)
    with progress.bar("pretrain judge: edits", count, "request") as bar:
        for start in range(0, count, 64):
            rows = slice(start, min(start + 64, count))
            encoded = sampler.encode(sources[rows], masks[rows], prompts[rows])
            seeds = [seed * 10_000_000 + start + row for row in range(len(encoded))]
            for variant, steps in enumerate((4, 8)):
                edits[rows, variant] = sampler.sample(pipe.transformer, encoded, [s + variant * 1_000_000 for s in seeds], steps=steps)
            bar.advance(len(encoded))
    edits[:, 2], edits[:, 3] = _spoil(targets, rng), _spoil(targets, rng)
    edits = paste(sources[:, None], edits, masks[:, None])
    dense = torch.stack([_dense_figures(edits[:, v], targets, masks, objects) for v in range(VARIANTS)], dim=1)
    scores = [
        {
            name: torch.tensor([measure(taxonomy.dimension(name).measure, e, targets[r], masks[r], truths[r]) for e in edits[r]])
            for name in tasks[r].dimensions
        }
        for r in range(count)
    ]
    return Bank(tasks, prompts, edits, dense, scores)


def _spoil(targets: Tensor, rng: np.random.Generator) -> Tensor:
    """Targets [R, 3, H, W] with one to three faults each: another picture shining through, blur, a tint, grain, a shift."""
    spoiled = targets.clone()
    others = targets[torch.from_numpy(rng.permutation(len(targets)))]
    for row in range(len(targets)):
        picture = spoiled[row]
        for fault in rng.permutation(5)[: rng.integers(0, 4)]:
            if fault == 0:
                picture = torch.lerp(picture, others[row], float(rng.uniform(0.2, 1.0)))
            elif fault == 1:
                picture = F.avg_pool2d(F.pad(picture[None], (2, 2, 2, 2), mode="replicate"), 5, stride=1)[0]
            elif fault == 2:
                picture = picture + torch.from_numpy(rng.normal(0, 0.12, (3, 1, 1)).astype(np.float32))
            elif fault == 3:
                picture = picture + torch.from_numpy(rng.normal(0, rng.uniform(0.02, 0.1), picture.shape).astype(np.float32))
            else:
                picture = picture.roll(tuple(int(v) for v in rng.integers(-4, 5, 2)), (1, 2))
        spoiled[row] = picture.clamp(0, 1)
    return spoiled


def _dense_figures(edits: Tensor, targets: Tensor, masks: Tensor, objects: Tensor) -> Tensor:
    """[R, 16, DENSE_FIGURES] per token: colour (3), edge strength, error, signed error in brightness, edge error, mask, object."""

    def edges(x: Tensor) -> Tensor:
        grey = F.pad(x.mean(1, keepdim=True), (0, 1, 0, 1), mode="replicate")
        return (grey[..., :-1, 1:] - grey[..., :-1, :-1]).abs() + (grey[..., 1:, :-1] - grey[..., :-1, :-1]).abs()

    figures = torch.cat(
        [
            edits,
            4 * edges(edits),
            4 * (edits - targets).abs().mean(1, keepdim=True),
            4 * (edits - targets).mean(1, keepdim=True),
            8 * (edges(edits) - edges(targets)).abs(),
            masks,
            objects,
        ],
        dim=1,
    )
    return F.adaptive_avg_pool2d(figures, TOKENS_PER_SIDE).flatten(2).transpose(1, 2)


def pretrain_judge(
    taxonomy: Taxonomy, bank: Bank, *, dense_steps: int, compare_steps: int, learning_rate: float, seed: int, progress: Progress
) -> tuple[Judge, dict[str, float]]:
    """Train a mini judge from random weights; returns it with the dense R2 and the share of comparisons it gets right on the last tenth."""
    torch.manual_seed(seed)
    model, processor = build_judge(all_queries(taxonomy), seed=seed)
    judge = Judge(model.train(), processor, taxonomy)
    held_out = max(1, len(bank.tasks) // 10)
    kept = len(bank.tasks) - held_out
    r2 = _train_dense(judge, bank, kept, dense_steps, learning_rate, progress)
    spread = {
        cell: float(torch.cat([s[cell[1]] for t, s in zip(bank.tasks, bank.scores, strict=True) if t.name == cell[0]]).std())
        for cell in taxonomy.cells
    }
    _train_comparison(judge, bank, kept, compare_steps, learning_rate, spread, progress)
    model.eval()
    with torch.no_grad():
        drawn = [_draw(bank, range(kept, len(bank.tasks)), 32, spread, taxonomy) for _ in range(16)]
        right = [((judge.logit(a, b, q) > 0) == (t > 0.5)).float().mean() for a, b, q, t in drawn]
    return judge, {"dense_r2": r2, "comparison_accuracy": float(torch.stack(right).mean())}


def _train_dense(judge: Judge, bank: Bank, kept: int, steps: int, learning_rate: float, progress: Progress) -> float:
    tower = judge.model.model.visual
    head = torch.nn.Linear(judge.model.config.text_config.hidden_size, DENSE_FIGURES)
    parameters = [*tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    variance = bank.dense.var((0, 1, 2))
    r2 = 0.0
    with progress.bar("pretrain judge: dense", steps, "step") as bar:
        for _ in range(steps):
            rows, variants = torch.randint(kept, (64,)), torch.randint(VARIANTS, (64,))
            predicted = head(judge.encode(bank.edits[rows, variants]).tokens)  # [64, 16, DENSE_FIGURES]
            loss = ((predicted - bank.dense[rows, variants]).pow(2).mean((0, 1)) / variance).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            bar.advance(1, loss=float(loss))
    with torch.no_grad():
        edits, wanted = bank.edits[kept:].flatten(0, 1)[:256], bank.dense[kept:].flatten(0, 1)[:256]
        error = (head(judge.encode(edits).tokens) - wanted).pow(2).mean((0, 1)) / wanted.var((0, 1))
        r2 = float(1 - error.mean())
        progress.say(f"pretrain judge: dense R2 {r2:.3f}, per figure {[round(float(1 - e), 2) for e in error]}")
    return r2


def _draw(
    bank: Bank, rows: range, count: int, spread: dict[tuple[str, str], float], taxonomy: Taxonomy
) -> tuple[Tensor, Tensor, list[str], Tensor]:
    """`count` random comparisons: first and second [B, 3, H, W], queries, wanted P(Yes) [B]."""
    first, second, queries, wanted = [], [], [], []
    for _ in range(count):
        row = rows[int(torch.randint(len(rows), ()))]
        task = bank.tasks[row]
        a, b = torch.randperm(VARIANTS)[:2].tolist()
        dimension = task.dimensions[int(torch.randint(len(task.dimensions), ()))]
        score = bank.scores[row][dimension]
        wanted.append(torch.sigmoid(SHARPNESS * (score[a] - score[b]) / (spread[task.name, dimension] + 1e-6)))
        first.append(bank.edits[row, a])
        second.append(bank.edits[row, b])
        queries.append(taxonomy.query(task.name, dimension, bank.prompts[row]))
    return torch.stack(first), torch.stack(second), queries, torch.stack(wanted)


def _train_comparison(
    judge: Judge, bank: Bank, kept: int, steps: int, learning_rate: float, spread: dict[tuple[str, str], float], progress: Progress
) -> None:
    optimizer = torch.optim.AdamW(judge.model.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    right = 0.5
    with progress.bar("pretrain judge: comparison", steps, "step") as bar:
        for _ in range(steps):
            first, second, queries, wanted = _draw(bank, range(kept), 32, spread, judge.taxonomy)
            seen = judge.encode(torch.cat([first, second]))
            a, b = seen[: len(first)], seen[len(first) :]
            logits = judge.compare(a.join(b), b.join(a), [*queries, *queries])
            loss = F.binary_cross_entropy_with_logits(logits, torch.cat([wanted, 1 - wanted]))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(judge.model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            right = 0.98 * right + 0.02 * float(((logits[: len(wanted)] > 0) == (wanted > 0.5)).float().mean())
            bar.advance(1, loss=float(loss), right=right)
