"""Mini base, part three: the judge. Called by ops/pretrain_mini.py.

From random weights a Yes/No answer is one bit a sample and teaches the vision tower nothing for hundreds of steps. So:
1. dense: every merged vision token regresses what its 16x16 pixels hold (colour, edges, error and edge error against the
   target, share of mask and of object), which is 9 numbers x 16 tokens a picture;
2. comparison: for two edits of one request the log-odds are drawn towards how far the two scores lie apart,
   `L = BCE(log-odds, sigmoid(SHARPNESS * (s_first - s_second) / spread))`, over both orders; beside it the last hidden state
   regresses the mean figures of the first and of the second picture, which teaches it to tell the two apart, and, where the query
   holds the prompt, colour and shape of the object that it names. Before the comparison of everything lies one by the dimensions that
   read the prompt, of requests that name an object (`read_steps`): reading is learned from many such questions in a row and from few
   among others not at all.
Every step has a second half: the same pictures, each moved a little along the gradient of its loss, to where the judge is most wrong
(adversarial training: Goodfellow, Shlens and Szegedy, arXiv 1412.6572). A judge trained on unspoiled pictures alone hangs on the finest
pattern of pixels, and its gradient, which is all that the policy learns from, points into such patterns.
The edits are samples and one-step predictions of the mini base and, beside them, spoiled targets. One sample and one target show a rival:
the same scene with another colour, shape or word than was asked for. Which of the two fits the prompt nothing else can tell. (Where a
task's prompt is fixed there is no rival: the sample stands twice, and the other target shows another object.)
No annotator's label is used here, but the scores are those of the annotator's measures (`labelled_by`): the base judge has seen, without
error and on other scenes, what the labels of the chain are made from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from infra.progress import Progress
from models.flux_fill import FluxFillCFGPipeline
from models.flux_fill.sampler import Encoded, Sampler
from models.images import paste, shifted, to_mask, to_tensor
from models.judge import Judge
from models.mini.build import IMAGE_SIZE
from models.mini.judge_build import build_judge
from models.mini.measures import measure
from models.mini.scenes import COLOURS, SHAPES, WORDS, render_scene
from models.taxonomy import Task, Taxonomy
from ops.pretrain_policy import scene_request
from ops.pretrain_vae import BASE_SCENES

# Every value below is ours.
VARIANTS = 5  # edits of one request: a sample, one of its rival, a one-step prediction, a spoiled target, one of the rival
STEPS = 8
STOPS = (3, 8)  # steps taken before the one-step prediction, lowest and one past the highest: as the mini preset's candidates
SHARPNESS = 2.0
TOWER_RATE = 0.3  # the vision tower's learning rate in the comparison, relative to the language model's
RECALL_WEIGHT = 1.0  # of the regression beside the answer
DENSE_FIGURES = 9
ASKED = 3 + len(SHAPES)
ASKED_SCALE = 3.0  # brings its spread near one, where that of the other figures is
JITTER = 8  # pixels
STRENGTH = 0.02  # of the step along the gradient, root mean square over a picture in [0, 1], at most
RAMP = 100  # steps until it is reached
TOKENS_PER_SIDE = 4


@dataclass
class Bank:
    """R requests with VARIANTS edits each, pasted into their sources."""

    tasks: list[Task]  # R
    prompts: list[str]
    edits: Tensor  # [R, V, 3, 64, 64] in [0, 1]
    truths: Tensor  # [R, 5, 64, 64] in [0, 1]: target (3), mask, object
    asked: Tensor  # [R, ASKED]: RGB of the object in [0, 1], its shape one-hot; nan where the prompt does not name it
    scores: list[dict[str, Tensor]]  # R times {dimension: [V]}


def all_queries(taxonomy: Taxonomy) -> list[str]:
    """Every question the mini judge can be asked: the words its tokenizer must know."""
    prompts = [render_scene(BASE_SCENES + index).caption for index in range(2000)] + [f'the word "{word}"' for word in WORDS]
    return sorted({taxonomy.query(task, dimension, prompt) for task, dimension in taxonomy.cells for prompt in prompts})


def make_bank(pipe: FluxFillCFGPipeline, taxonomy: Taxonomy, count: int, seed: int, progress: Progress) -> Bank:
    """`count` requests on scenes, edited by the mini base and by spoiling their targets, with every score."""
    rng = np.random.default_rng(seed)
    sampler = Sampler(pipe)
    tasks: list[Task] = []
    prompts: list[str] = []
    rival_prompts: list[str] = []
    parts: list[tuple[Tensor, ...]] = []
    truths: list[dict] = []
    asked: list[Tensor] = []
    scene_seed = BASE_SCENES + 1_000_000 * (seed + 50)
    while len(tasks) < count:
        scene_seed += 1
        scene, task = render_scene(scene_seed), taxonomy.active[rng.integers(len(taxonomy.active))]
        request = scene_request(task, scene, rng)
        if request is None or request.target is None:
            continue
        rival = scene_request(task, render_scene(scene_seed, instead=_instead(task, scene.truth, rng)), rng)
        if rival is None or rival.target is None:
            continue
        tasks.append(task)
        prompts.append(request.prompt)
        rival_prompts.append(rival.prompt)
        truths.append(scene.truth)
        asked.append(_asked(scene.truth, request.prompt))
        pictures = to_tensor(request.target), to_tensor(rival.target)
        parts.append((to_tensor(request.image), to_mask(request.mask), *pictures, to_mask(scene.object_mask)))
    sources, masks, targets, rivals, objects = (torch.stack(column) for column in zip(*parts, strict=True))
    edits = torch.empty(count, VARIANTS, 3, IMAGE_SIZE, IMAGE_SIZE)
    with progress.bar("pretrain judge: edits", count, "request") as bar:
        for start in range(0, count, 64):
            rows = slice(start, min(start + 64, count))
            encoded = sampler.encode(sources[rows], masks[rows], prompts[rows])
            seeds = [seed * 10_000_000 + start + row for row in range(len(encoded))]
            edits[rows, 0] = sampler.sample(pipe.transformer, encoded, seeds, steps=STEPS)
            other = sampler.encode(sources[rows], masks[rows], rival_prompts[rows])
            edits[rows, 1] = sampler.sample(pipe.transformer, other, seeds, steps=STEPS)
            edits[rows, 2] = _predict(sampler, encoded, [s + 1_000_000 for s in seeds], stop=int(rng.integers(*STOPS)))
            bar.advance(len(encoded))
    edits[:, 3], edits[:, 4] = _spoil(targets, rng), _spoil(rivals, rng)
    edits = paste(sources[:, None], edits, masks[:, None])
    scores = [
        {
            name: torch.tensor(
                [measure(taxonomy.dimension(name).labelled_by, e, targets[r], masks[r], truths[r], prompts[r]) for e in edits[r]]
            )
            for name in tasks[r].dimensions
        }
        for r in range(count)
    ]
    return Bank(tasks, prompts, edits, torch.cat([targets, masks, objects], dim=1), torch.stack(asked), scores)


def _instead(task: Task, truth: dict[str, Any], rng: np.random.Generator) -> dict[str, str]:
    """What a rival shows instead: another word where words are asked for, else another colour or another shape of the object."""
    if task.condition == "word":
        return {"word": str(rng.choice([word for word in WORDS if word != truth["word"]["text"]]))}
    what, names = ("colour", tuple(COLOURS)) if rng.random() < 0.5 else ("shape", SHAPES)
    return {what: str(rng.choice([name for name in names if name != truth["object"][what]]))}


def _asked(truth: dict[str, Any], prompt: str) -> Tensor:
    """RGB of the object in [0, 1] and its shape one-hot, [ASKED]; nan where the prompt does not name it."""
    shape, colour = truth["object"]["shape"], truth["object"]["colour"]
    if f"{colour} {shape}" not in prompt:
        return torch.full((ASKED,), torch.nan)
    return torch.cat([torch.tensor(COLOURS[colour]) / 255, F.one_hot(torch.tensor(SHAPES.index(shape)), len(SHAPES)).float()])


@torch.no_grad()
def _predict(sampler: Sampler, encoded: Encoded, seeds: list[int], stop: int) -> Tensor:
    """One-step predictions after `stop` of STEPS steps, [B, 3, 64, 64] in [0, 1]."""
    noise = sampler.noise(seeds, IMAGE_SIZE, IMAGE_SIZE)
    x_t, sigma_t = sampler.denoise(sampler.pipe.transformer, encoded, noise, steps=STEPS, stop=stop)
    return sampler.decode(sampler.predict_x0(sampler.pipe.transformer, x_t, sigma_t, encoded), IMAGE_SIZE, IMAGE_SIZE)


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


def _dense_figures(edits: Tensor, truths: Tensor) -> Tensor:
    """[B, 16, DENSE_FIGURES] per token: colour (3), edge strength, error, signed error in brightness, edge error, mask, object.

    `edits` [B, 3, 64, 64] and `truths` [B, 5, 64, 64] as in `Bank`.
    """
    targets, masks, objects = truths.split([3, 1, 1], dim=1)

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


def _moved(*pictures: Tensor) -> list[Tensor]:
    """Batches of pictures [B, C, 64, 64], all moved by one random distance of at most `JITTER` each way: no grid of patches is learned."""
    dx, dy = torch.randint(-JITTER, JITTER + 1, (2,)).tolist()
    return [shifted(batch, dx, dy) for batch in pictures]


def _worsened(pictures: Tensor, gradient: Tensor | None, step: int) -> Tensor:
    """Pictures [B, 3, H, W] moved up the gradient of their loss by a random distance of at most STRENGTH, less in the first steps."""
    assert gradient is not None
    size = gradient.pow(2).mean((1, 2, 3), keepdim=True).sqrt().clamp(min=1e-12)
    distance = STRENGTH * min(1.0, step / RAMP) * torch.rand(len(pictures), 1, 1, 1)
    return (pictures + distance * gradient / size).clamp(0, 1).detach()


def untrained_judge(taxonomy: Taxonomy, seed: int) -> Judge:
    """A mini judge with random weights that knows every word it can be asked."""
    model, processor = build_judge(all_queries(taxonomy), layers=3, vision_hidden=96, vision_depth=3, seed=seed)
    return Judge(model, processor, taxonomy)


def pretrain_judge(
    judge: Judge, bank: Bank, *, dense_steps: int, read_steps: int, compare_steps: int, learning_rate: float, seed: int, progress: Progress
) -> dict[str, float]:
    """Train a mini judge in place; returns the dense R2 and the share of comparisons it gets right on the last tenth, by dimension."""
    torch.manual_seed(seed)
    taxonomy, model = judge.taxonomy, judge.model.train()
    held_out = max(1, len(bank.tasks) // 10)
    kept = len(bank.tasks) - held_out
    r2 = _train_dense(judge, bank, kept, dense_steps, learning_rate, progress)
    spread = {
        cell: float(torch.cat([s[cell[1]] for t, s in zip(bank.tasks, bank.scores, strict=True) if t.name == cell[0]]).std())
        for cell in taxonomy.cells
    }
    naming = [row for row in range(kept) if bank.asked[row].isfinite().all()]
    if read_steps and naming:
        _train_comparison(judge, bank, _Questions(naming, reading=True), read_steps, learning_rate, spread, progress, "reading")
    _train_comparison(judge, bank, _Questions(range(kept)), compare_steps, learning_rate, spread, progress, "comparison")
    model.eval()
    return {"dense_r2": r2, **_held_out_figures(judge, bank, range(kept, len(bank.tasks)), spread)}


@torch.no_grad()
def _held_out_figures(judge: Judge, bank: Bank, rows: range, spread: dict[tuple[str, str], float]) -> dict[str, float]:
    """Share of comparisons that the judge gets right: random ones, over all and by dimension; a sample against its rival's, by task."""
    right: dict[str, list[float]] = {}
    for _ in range(16):
        drawn = _draw(bank, _Questions(rows), 64, spread, judge.taxonomy)
        odds = judge.logit(bank.edits[drawn.rows, drawn.first], bank.edits[drawn.rows, drawn.second], drawn.queries)
        for dimension, hit in zip(drawn.dimensions, ((odds > 0) == (drawn.wanted > 0.5)).float().tolist(), strict=True):
            right.setdefault(dimension, []).append(hit)
    figures = {"comparison_accuracy": float(np.mean([hit for hits in right.values() for hit in hits]))}
    figures |= {f"comparison_accuracy_{name}": float(np.mean(hits)) for name, hits in sorted(right.items())}
    for task in judge.taxonomy.active:
        of_task = [row for row in rows if bank.tasks[row].name == task.name]
        for name in _reading(task, judge.taxonomy)[:1] if of_task else ():
            queries = [judge.taxonomy.query(task.name, name, bank.prompts[row]) for row in of_task]
            better = torch.stack([bank.scores[row][name][0] > bank.scores[row][name][1] for row in of_task])
            odds = judge.logit(bank.edits[of_task, 0], bank.edits[of_task, 1], queries)
            figures[f"rival_accuracy_{task.name}"] = float(((odds > 0) == better).float().mean())
    return figures


def _train_dense(judge: Judge, bank: Bank, kept: int, steps: int, learning_rate: float, progress: Progress) -> float:
    tower = judge.model.model.visual
    head = torch.nn.Linear(judge.model.config.text_config.hidden_size, DENSE_FIGURES)
    parameters = [*tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    wanted = _dense_figures(bank.edits[kept:].flatten(0, 1), bank.truths[kept:].repeat_interleave(VARIANTS, 0))
    variance = wanted.var((0, 1))
    with progress.bar("pretrain judge: dense", steps, "step") as bar:
        for step in range(steps):
            rows, variants = torch.randint(kept, (64,)), torch.randint(VARIANTS, (64,))
            shown, truths = _moved(bank.edits[rows, variants], bank.truths[rows])
            figures = _dense_figures(shown, truths)

            def loss_of(pictures: Tensor, figures: Tensor = figures) -> Tensor:
                return ((head(judge.encode(pictures).tokens) - figures).pow(2).mean((0, 1)) / variance).mean()

            shown.requires_grad_()
            optimizer.zero_grad()
            loss = loss_of(shown)
            loss.backward()
            adversarial = loss_of(_worsened(shown, shown.grad, step))
            adversarial.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            bar.advance(1, loss=loss.item(), adversarial=adversarial.item())
    with torch.no_grad():
        error = (head(judge.encode(bank.edits[kept:].flatten(0, 1)[:256]).tokens) - wanted[:256]).pow(2).mean((0, 1)) / variance
        r2 = float(1 - error.mean())
        progress.say(f"pretrain judge: dense R2 {r2:.3f}, per figure {[round(float(1 - e), 2) for e in error]}")
    return r2


class _Drawn(NamedTuple):
    """Random comparisons: rows and variants in the bank, dimensions, queries, wanted P(Yes) [B]."""

    rows: Tensor
    first: Tensor
    second: Tensor
    dimensions: list[str]
    queries: list[str]
    wanted: Tensor


class _Questions(NamedTuple):
    """What comparisons are drawn from: rows of the bank, and all dimensions of their tasks or those alone that read the prompt."""

    rows: Sequence[int]
    reading: bool = False


def _reading(task: Task, taxonomy: Taxonomy) -> tuple[str, ...]:
    return tuple(name for name in task.dimensions if taxonomy.dimension(name).reads_prompt)


def _draw(bank: Bank, asked: _Questions, count: int, spread: dict[tuple[str, str], float], taxonomy: Taxonomy) -> _Drawn:
    chosen = torch.tensor([asked.rows[int(i)] for i in torch.randint(len(asked.rows), (count,))])
    pairs = torch.stack([torch.randperm(VARIANTS)[:2] for _ in range(count)])  # [B, 2]
    dimensions, queries, wanted = [], [], []
    for row, (a, b) in zip(chosen.tolist(), pairs.tolist(), strict=True):
        task = bank.tasks[row]
        names = _reading(task, taxonomy) if asked.reading else task.dimensions
        dimension = names[int(torch.randint(len(names), ()))]
        score = bank.scores[row][dimension]
        dimensions.append(dimension)
        wanted.append(torch.sigmoid(SHARPNESS * (score[a] - score[b]) / (spread[task.name, dimension] + 1e-6)))
        queries.append(taxonomy.query(task.name, dimension, bank.prompts[row]))
    return _Drawn(chosen, pairs[:, 0], pairs[:, 1], dimensions, queries, torch.stack(wanted))


def _train_comparison(
    judge: Judge,
    bank: Bank,
    questions: _Questions,
    steps: int,
    learning_rate: float,
    spread: dict[tuple[str, str], float],
    progress: Progress,
    label: str,
) -> None:
    tower = list(judge.model.model.visual.parameters())
    known = {id(parameter) for parameter in tower}
    language = [parameter for parameter in judge.model.parameters() if id(parameter) not in known]
    recall = torch.nn.Linear(judge.model.config.text_config.hidden_size, 2 * DENSE_FIGURES + ASKED)
    means = torch.stack([_dense_figures(bank.edits[:, v], bank.truths).mean(1) for v in range(VARIANTS)], dim=1)  # [R, V, DENSE_FIGURES]
    centre, width = means.mean((0, 1)), means.std((0, 1))
    rates = [learning_rate * TOWER_RATE, learning_rate]
    optimizer = torch.optim.AdamW([{"params": tower}, {"params": [*language, *recall.parameters()]}], lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps, pct_start=0.1)
    last: list[Tensor] = []
    hook = judge.model.lm_head.register_forward_pre_hook(lambda module, inputs: last.append(inputs[0][:, -1]))
    right = 0.5
    with progress.bar(f"pretrain judge: {label}", steps, "step") as bar:
        for step in range(steps):
            drawn = _draw(bank, questions, 32, spread, judge.taxonomy)
            one, two = ((means[drawn.rows, variant] - centre) / width for variant in (drawn.first, drawn.second))
            reads = torch.tensor([judge.taxonomy.dimension(name).reads_prompt for name in drawn.dimensions])
            asked = torch.where(reads[:, None], ASKED_SCALE * bank.asked[drawn.rows], torch.nan)
            held = torch.cat([torch.cat([one, two, asked], 1), torch.cat([two, one, asked], 1)])

            def losses_of(pictures: Tensor, drawn: _Drawn = drawn, held: Tensor = held) -> tuple[Tensor, Tensor, Tensor]:
                """Loss of the answers, loss of the recall, log-odds [2B]."""
                seen = judge.encode(pictures)
                a, b = seen[: len(drawn.rows)], seen[len(drawn.rows) :]
                last.clear()
                logits = judge.compare(a.join(b), b.join(a), [*drawn.queries, *drawn.queries])
                answer = F.binary_cross_entropy_with_logits(logits, torch.cat([drawn.wanted, 1 - drawn.wanted]))
                return answer, (recall(last[0]) - held)[held.isfinite()].pow(2).mean(), logits

            shown = _moved(torch.cat([bank.edits[drawn.rows, drawn.first], bank.edits[drawn.rows, drawn.second]]))[0].requires_grad_()
            optimizer.zero_grad()
            answer, recalled, logits = losses_of(shown)
            (answer + RECALL_WEIGHT * recalled).backward()
            worse_answer, worse_recalled, _ = losses_of(_worsened(shown, shown.grad, step))
            (worse_answer + RECALL_WEIGHT * worse_recalled).backward()
            torch.nn.utils.clip_grad_norm_(judge.model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            right = 0.98 * right + 0.02 * float(((logits[: len(drawn.wanted)] > 0) == (drawn.wanted > 0.5)).float().mean())
            bar.advance(1, answer=answer.item(), adversarial=worse_answer.item(), recall=recalled.item(), right=right)
    hook.remove()
