"""Is a policy better than the base? Held-out conditions, the same seeds for everyone, scored by measures and by the judge.

    evaluate(EvaluateConfig(), base=Path("data/base"), curated=..., judge=reward_model, policies={"static": ..., "ema": ...},
             out=Path("evaluation"), progress=Progress(print), taxonomy=Taxonomy.load())

Every contestant (base, each policy, production where there is one) edits the same conditions from the same noise. Edits are
measured as a user gets them: 8-bit, pasted into the source outside the mask. The judge sees them so too, unless it was
fitted to raw pictures; preservation is measured on the raw output. The reference mode is chosen on the validation split,
everything reported comes from the test split. `items.jsonl` holds every score and the shards every edit
(`<condition>.<seed>.<policy>`): ops/win_rates.py makes all figures from the records.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import pydantic
import torch
from diffusers import FluxTransformer2DModel

from infra.progress import Progress
from infra.stores.base import directory_digest
from models.blind import outside_similarity
from models.clip import Clip
from models.device import default_device
from models.errors import NotEnoughData
from models.flux_fill.config import SamplingConfig
from models.flux_fill.loading import load_pipeline, load_transformer
from models.flux_fill.sampler import Encoded, Sampler
from models.images import paste, to_mask, to_pil, to_tensor
from models.judge import Judge, SecondJudge, Template
from models.records import Condition, Pair, read_rows
from models.shards import ShardReader, ShardWriter
from models.taxonomy import Taxonomy
from ops.folders import save_picture, write_metrics
from ops.judge_accuracy import judge_accuracy
from ops.measure_edits import Evidence, Job, Kept, Opinions, measured, require_clip
from ops.pictures import grid, overlay, table
from ops.policy_health import preservation, shown_pasted
from ops.second_opinion import figures, second_opinions
from ops.win_rates import BASE, COUNTED, ITEMS, PAIRS, PRODUCTION, SCENE, TIE_TOLERANCE, recompute, win_rate_plot, write_items

RAW = ".raw"  # behind the key of an edit before it was pasted, kept where the judge was fitted to such


class EvaluateConfig(SamplingConfig):
    """What is sampled, how, and when two edits count as equal."""

    evidence: Evidence = pydantic.Field(
        "ground_truth",
        description="Family of measures that the gates read: against the known target of procedural scenes, or `blind`, without a target, "
        "on pictures of every kind (ours).",
    )
    split: Literal["validation", "test"] = pydantic.Field("test", description="Split that everything reported comes from (ours).")
    choose_split: Literal["train", "validation", "none"] = pydantic.Field(
        "validation", description="Split the reference mode is chosen on (ours)."
    )
    max_per_task: int = pydantic.Field(40, ge=1, description="Most conditions per task, scenes and other pictures counted apart (ours).")
    max_per_task_choose: int = pydantic.Field(16, ge=1, description="The same on the split the mode is chosen on (ours).")
    seeds_per_condition: int = pydantic.Field(1, ge=1, description="Seeds per condition (ours).")
    seed: int = pydantic.Field(0, description="Changes every seed drawn (ours).")
    batch_size: int = pydantic.Field(16, ge=1, description="Edits sampled or judged at once (ours).")
    tie_tolerance: float = pydantic.Field(
        TIE_TOLERANCE, ge=0, lt=1, description="Measures that differ by this share or less are a tie (ours)."
    )
    confidence: float = pydantic.Field(0.95, gt=0, lt=1, description="Level of every interval (ours).")
    resamples: int = pydantic.Field(2000, ge=100, description="Bootstrap draws of photographs and scenes (ours).")
    grid_rows: int = pydantic.Field(4, ge=1, description="Rows of each side-by-side picture (ours).")
    dtype: Literal["float32", "bfloat16", "float16"] = pydantic.Field("float32", description="Precision of the networks (ours).")


def evaluate(
    config: EvaluateConfig,
    base: Path,
    curated: Path,
    judge: Path,
    policies: Mapping[str, Path],
    out: Path,
    progress: Progress,
    *,
    taxonomy: Taxonomy,
    production: Path | None = None,
    candidates: Path | None = None,
    pairs: Path | None = None,
    base_judge: Path | None = None,
    clip: Path | None = None,
    second_judge: Path | None = None,
    second_template: Path | None = None,
) -> dict[str, Any]:
    """Compare every policy with the base (and production) and write items.jsonl, the edits, pictures and metrics.json.

    Args:
        base: pipeline folder. judge: reward_model artifact (or a judge's folder). production: a policy or release artifact.
        policies: artifact folder per reference mode.
        candidates, pairs, base_judge: with the first two, the judge's own accuracy on the held-out pairs is measured too.
        clip: CLIP checkpoint, for blind evidence on tasks whose measures need one.
        second_judge: folder of an edit judge that was not fitted here, asked as `second_template` says (None: as shipped).

    Raises NotEnoughData where the split holds no condition of an active task, ConfigError where a CLIP checkpoint is needed and absent.
    """
    contestants: dict[str, Path | None] = {BASE: None, **policies}
    if production:
        contestants[PRODUCTION] = production
    shards = ShardReader(curated)
    jobs = _jobs(config, curated, shards, taxonomy, chosen=len(policies) > 1)
    if config.evidence == "blind" and clip is None:
        require_clip(jobs, taxonomy)
    with torch.inference_mode():
        kept = _sample(config, base, contestants, jobs, out, progress, keep_raw=not shown_pasted(judge))
        edits = ShardReader(out)
        opinions = _judge(config, judge, list(contestants), jobs, edits, taxonomy, progress)
    digests = {name: directory_digest(folder or base)[0] for name, folder in contestants.items()}
    seen_by = Clip.load(clip) if clip and config.evidence == "blind" else None
    about = (digests, directory_digest(judge)[0], kept, opinions)
    items = measured(jobs, *about, edits, shards, taxonomy, progress, evidence=config.evidence, clip=seen_by)
    write_items(out / ITEMS, items)
    metrics = recompute(
        items,
        taxonomy,
        split=config.split,
        choose_split=config.choose_split,
        tie_tolerance=config.tie_tolerance,
        confidence=config.confidence,
        resamples=config.resamples,
        evidence=config.evidence,
    )
    if second_judge:
        asked = SecondJudge.load(second_judge, Template.load(second_template), getattr(torch, config.dtype))
        rows = second_opinions(asked, list(contestants), jobs, edits, out, progress)
        metrics["second_judge"] = figures(rows, split=config.split, confidence=config.confidence, resamples=config.resamples)
    if pairs and candidates:
        held_out = [pair for pair in read_rows(pairs / "pairs.jsonl", Pair) if pair.split == config.split]
        judges = {"judge": judge, **({"base": base_judge} if base_judge else {})}
        metrics["judge"] = _judge_accuracy(config, judges, held_out, curated, candidates, out, progress, taxonomy)
    metrics["sampling"] = config.sampling()
    write_metrics(out, metrics)
    tested = [job for job in jobs if job.condition.split == config.split]
    _pictures(config, metrics, tested, list(contestants), edits, shards, taxonomy, out)
    return metrics


def _jobs(config: EvaluateConfig, curated: Path, shards: ShardReader, taxonomy: Taxonomy, *, chosen: bool) -> list[Job]:
    """The first conditions of each split, task and sort, each with its seeds; the choosing split only where there is a choice."""
    caps: dict[str, int] = {config.split: config.max_per_task}
    if chosen and config.choose_split != "none":
        caps.setdefault(config.choose_split, config.max_per_task_choose)
    counts: dict[tuple[str, str, bool], int] = defaultdict(int)
    active = {task.name for task in taxonomy.active}
    jobs = []
    for condition in read_rows(curated / "conditions.jsonl", Condition):
        sort = (condition.split, condition.task, condition.kind == SCENE)
        if condition.task not in active or counts[sort] >= caps.get(condition.split, 0):
            continue
        counts[sort] += 1
        image, mask = to_tensor(shards[f"{condition.id}.image"]), to_mask(shards[f"{condition.id}.mask"])
        jobs += [Job(condition, _seed(config, condition, i), image, mask) for i in range(config.seeds_per_condition)]
    if not any(job.condition.split == config.split for job in jobs):
        raise NotEnoughData(
            f"{curated.name} holds no {config.split} condition of {', '.join(sorted(active))}.", "Curate more images or change `split`."
        )
    return jobs


def _seed(config: EvaluateConfig, condition: Condition, index: int) -> int:
    """A seed that belongs to the condition: adding or leaving out others does not change it."""
    return int.from_bytes(hashlib.sha256(f"{config.seed}/{condition.id}/{index}".encode()).digest()[:4], "big")


def _batches(jobs: Iterable[Job], size: int, by: Callable[[Job], Hashable]) -> list[list[Job]]:
    groups: dict[Hashable, list[Job]] = defaultdict(list)
    for job in jobs:
        groups[by(job)].append(job)
    return [group[i : i + size] for group in groups.values() for i in range(0, len(group), size)]


def _transformer(base: Path, folder: Path | None, dtype: torch.dtype) -> FluxTransformer2DModel:
    """The base's transformer, a policy artifact's, or that of a release, which is a pipeline of its own."""
    if folder and (folder / "model").is_dir():
        return load_transformer(folder / "model", None, dtype)
    return load_transformer(base, folder, dtype)


def _sample(
    config: EvaluateConfig,
    base: Path,
    contestants: Mapping[str, Path | None],
    jobs: list[Job],
    out: Path,
    progress: Progress,
    *,
    keep_raw: bool,
) -> dict[str, Kept]:
    """Let every contestant edit every job; edits go to the shards of `out`. Returns per edit key what was kept outside the mask."""
    dtype = getattr(torch, config.dtype)
    sampler = Sampler(load_pipeline(base, dtype).to(default_device()))
    batches = _batches(jobs, config.batch_size, by=lambda job: (job.condition.split, job.image.shape))
    kept: dict[str, Kept] = {}
    encoded: dict[int, Encoded] = {}  # the same for every contestant
    total = sum(len(jobs) if name != PRODUCTION else sum(j.condition.split == config.split for j in jobs) for name in contestants)
    with ShardWriter(out) as writer, progress.bar("evaluation: edits", total, "image") as bar:
        for name, folder in contestants.items():
            transformer = _transformer(base, folder, dtype).to(default_device()).eval()
            for index, batch in enumerate(batches):
                if name == PRODUCTION and batch[0].condition.split != config.split:
                    continue  # production is not one of the modes to choose from
                if index not in encoded:
                    encoded[index] = _encode(config, sampler, batch)
                images = sampler.sample(
                    transformer,
                    encoded[index],
                    [job.seed for job in batch],
                    steps=config.steps,
                    true_cfg=config.true_cfg,
                    guidance_scale=config.guidance_scale,
                )  # [B, 3, H, W]
                for job, image in zip(batch, images.cpu().nan_to_num(), strict=True):  # a ruined policy's nan is a black picture, and loses
                    outside = (image, job.image, job.mask)
                    kept[job.key(name)] = Kept(preservation(*outside), outside_similarity(*outside))
                    writer.add(job.key(name), to_pil(paste(job.image, image, job.mask)))
                    if keep_raw:
                        writer.add(job.key(name) + RAW, to_pil(image))
                bar.advance(len(batch))
            del transformer
    return kept


def _encode(config: EvaluateConfig, sampler: Sampler, batch: list[Job]) -> Encoded:
    images, masks = torch.stack([job.image for job in batch]), torch.stack([job.mask for job in batch])
    prompts: list[str] = [job.condition.prompt for job in batch]
    negatives: list[str | None] | None = [config.negative_prompt] * len(batch) if config.true_cfg > 1 else None
    return sampler.encode(images.to(default_device()), masks.to(default_device()), prompts, negatives)


def _load_judge(config: EvaluateConfig, folder: Path, taxonomy: Taxonomy) -> Judge:
    judge = Judge.load(folder, taxonomy, getattr(torch, config.dtype))
    judge.model.to(default_device())
    return judge


def _judge(
    config: EvaluateConfig,
    folder: Path,
    names: list[str],
    jobs: list[Job],
    edits: ShardReader,
    taxonomy: Taxonomy,
    progress: Progress,
) -> Opinions:
    """Edit key -> opponent -> dimension -> [P(Yes | edit, opponent), P(Yes | opponent, edit)] of every mode against base and production."""
    judge, kind = _load_judge(config, folder, taxonomy), "" if shown_pasted(folder) else RAW
    modes = [name for name in names if name not in (BASE, PRODUCTION)]
    opinions: dict[str, dict[str, dict[str, list[float]]]] = defaultdict(lambda: defaultdict(dict))
    batches = _batches(jobs, config.batch_size, by=lambda job: (job.condition.split, job.condition.task, job.image.shape))
    with progress.bar("evaluation: judge", len(jobs), "image") as bar:
        for batch in batches:
            present = [name for name in names if batch[0].key(name) in edits]
            seen = {name: judge.encode(torch.stack([to_tensor(edits[job.key(name) + kind]) for job in batch])) for name in present}
            task = batch[0].condition.task
            for mode in modes:
                for opponent in (name for name in (BASE, PRODUCTION) if name in present):
                    first, second = seen[mode].join(seen[opponent]), seen[opponent].join(seen[mode])  # both orders at once
                    for dimension in taxonomy.task(task).dimensions:
                        queries = [taxonomy.query(task, dimension, job.condition.prompt) for job in batch]
                        forward, backward = judge.compare(first, second, queries * 2).sigmoid().view(2, -1).tolist()
                        for job, p, q in zip(batch, forward, backward, strict=True):
                            opinions[job.key(mode)][opponent][dimension] = [p, q]
            bar.advance(len(batch))
    return opinions


def _judge_accuracy(
    config: EvaluateConfig,
    judges: Mapping[str, Path],
    held_out: list[Pair],
    curated: Path,
    candidates: Path,
    out: Path,
    progress: Progress,
    taxonomy: Taxonomy,
) -> dict[str, Any]:
    """How often the judge, and the one it was fitted from, agree with the annotators on pairs that nobody has trained or chosen on.

    Writes judge-pairs.jsonl: one row per pair and judge. Without held-out pairs every figure is None, which no gate lets pass.
    """
    found: dict[str, dict[str, Any]] = {}
    with (out / PAIRS).open("w") as file:
        for name, folder in judges.items() if held_out else ():
            found[name] = judge_accuracy(
                _load_judge(config, folder, taxonomy),
                taxonomy,
                held_out,
                curated,
                candidates,
                batch_size=config.batch_size,
                progress=progress,
                paste_source=shown_pasted(judges["judge"]),
                label=f"evaluation: pairs, {name}",
            )
            asked = {"judge": name, "judge_digest": directory_digest(folder)[0]}
            file.writelines(json.dumps({**asked, **row}, sort_keys=True) + "\n" for row in found[name].pop("rows"))
    nothing: dict[str, Any] = {"mean_accuracy": None, "lo": None, "hi": None, "se": None, "order_consistency": None, "n": 0, "cells": []}
    base_accuracy = None
    if "base" in found:
        base_accuracy = found["base"]["mean_accuracy"]
        for cell, before in zip(found["judge"]["cells"], found["base"]["cells"], strict=True):  # the same pairs, hence the same cells
            cell["base_accuracy"] = before["accuracy"]
    return {"split": config.split, **found.get("judge", nothing), "base_mean_accuracy": base_accuracy}


def _pictures(
    config: EvaluateConfig,
    metrics: dict[str, Any],
    jobs: list[Job],
    names: list[str],
    edits: ShardReader,
    shards: ShardReader,
    taxonomy: Taxonomy,
    out: Path,
) -> None:
    """Side-by-side grids (the first conditions of each task, not chosen), win rates with intervals, the table of cells."""
    for task in taxonomy.active:
        rows, captions = [], []
        for job in [job for job in jobs if job.condition.task == task.name][: config.grid_rows]:
            key = job.condition.id
            target = [shards[f"{key}.target"]] if f"{key}.target" in shards else [None]
            asked = overlay(shards[f"{key}.image"], shards[f"{key}.mask"])
            rows.append([asked, *(edits[job.key(name)] for name in names), *target])
            captions.append(job.condition.prompt)
        if rows:
            save_picture(out, f"grid-{task.name}", grid(rows, columns=["asked", *names, "target"], captions=captions))
    if not any(summary["n"] for summary in metrics["policy"].values()):
        return  # nothing was measured: ground truth was asked for, and there are no scenes
    save_picture(out, "win-rates", win_rate_plot(metrics["policy"], taxonomy))
    cells = [(task, dimension) for task, dimension in taxonomy.cells]
    lines = [
        [taxonomy.task(task).title, dimension, *(_cell_text(summary, task, dimension) for summary in metrics["policy"].values())]
        for task, dimension in cells
    ]
    save_picture(
        out, "cells", table(["task", "dimension", *metrics["policy"]], lines, title=f"Win rate over the base, {COUNTED[config.evidence]}")
    )


def _cell_text(summary: dict[str, Any], task: str, dimension: str) -> str:
    for cell in summary["cells"]:
        if (cell["task"], cell["dimension"]) == (task, dimension):
            return f"{cell['win_rate']:.2f} ({cell['lo']:.2f} to {cell['hi']:.2f}), n {cell['n']}"
    return "no data"
