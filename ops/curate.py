"""From pictures to editing requests: drop copies, keep a diverse subset, split by source image, make conditions.

    curate(CurateConfig(), sources, out, Progress(print), embed=vae_embedder(base), taxonomy=Taxonomy.load())

The paper: CLIP embeddings, then K-means, pick the diverse pool that feeds both the reward model and the RL. Everything is
drawn from the seed: equal sources and configuration give equal conditions.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import imagehash
import numpy as np
import pydantic
import torch
from PIL import Image

from infra.progress import Bar, Progress
from models.conditions import Made, make_condition
from models.config import OpConfig
from models.errors import NotEnoughData
from models.images import to_tensor
from models.records import SPLITS, Condition, Source, Split, read_rows, write_rows
from models.shards import ShardReader, ShardWriter
from models.taxonomy import Task, Taxonomy
from ops.diverse import Choice, choice_grid, choice_plot, choose
from ops.embed import Embedder
from ops.folders import save_picture, write_metrics
from ops.pictures import grid, overlay

OWN = "vae"
EMBED_BATCH = 32
EXAMPLES = 4  # rows of a task's example picture


class CurateConfig(OpConfig):
    """What becomes of the pool."""

    embedder: str = pydantic.Field(
        OWN, description="'vae' (the base's own), or a CLIP checkpoint: a folder or `hub:<id>[@revision]` (paper: CLIP; the VAE is ours)."
    )
    embed_size: int = pydantic.Field(64, ge=16, multiple_of=16, description="Side in px of what the embedder sees (ours).")
    phash_distance: int = pydantic.Field(4, ge=0, le=64, description="Bits of 64 within which two perceptual hashes mean a copy (ours).")
    colour_distance: float = pydantic.Field(
        0.08, ge=0, le=1, description="Mean difference of 8x8 thumbnails under which a copy is believed (ours)."
    )
    clusters: int = pydantic.Field(32, ge=1, description="K of K-means over the embeddings (ours).")
    subset: int = pydantic.Field(400, ge=1, description="Pictures kept, taken in turn from every cluster, nearest its centre first (ours).")
    train_share: float = pydantic.Field(0.6, gt=0, lt=1, description="Share of source images in the training split (ours).")
    validation_share: float = pydantic.Field(
        0.2, gt=0, lt=1, description="Share in the validation split; the rest is the sealed test (ours)."
    )
    rotation: int = pydantic.Field(
        0,
        ge=0,
        description="Round of retraining: each seals other source images, what was sealed before is validated on, then trained on (ours).",
    )
    train_per_task: int = pydantic.Field(48, ge=1, description="Conditions per task in the training split, where sources allow (ours).")
    validation_per_task: int = pydantic.Field(16, ge=1, description="Conditions per task in the validation split (ours).")
    test_per_task: int = pydantic.Field(16, ge=1, description="Conditions per task in the sealed test (ours).")
    tasks_per_source: int = pydantic.Field(2, ge=1, description="Most conditions one source image may serve (ours).")
    seed: int = pydantic.Field(0, ge=0, description="Seed of subset, splits and masks (ours).")

    @pydantic.model_validator(mode="after")
    def _room_for_test(self) -> CurateConfig:
        if self.train_share + self.validation_share >= 1:
            raise ValueError(f"train_share {self.train_share} and validation_share {self.validation_share} leave nothing for the test")
        return self

    def per_task(self, split: Split) -> int:
        return {"train": self.train_per_task, "validation": self.validation_per_task, "test": self.test_per_task}[split]


def curate(
    config: CurateConfig, sources: Path, out: Path, progress: Progress, embed: Embedder, taxonomy: Taxonomy | None = None
) -> dict[str, Any]:
    """Write `conditions.jsonl`, `rejected.jsonl`, shards, pictures and `metrics.json` into `out`; return the metrics.

    Raises NotEnoughData when a split would hold no condition.
    """
    taxonomy = taxonomy or Taxonomy.load()
    rows, shards = read_rows(sources / "sources.jsonl", Source), ShardReader(sources)
    unique, rejected = drop_copies(config, rows, shards, progress)
    progress.say(f"{len(rows)} sources, {len(rows) - len(unique)} copies dropped")
    chosen = unique
    if len(unique) > config.subset:
        choice = diverse_subset(config, unique, shards, embed, progress)
        chosen = [row for row, kept in zip(unique, choice.kept, strict=True) if kept]
        save_picture(out, "choice", choice_plot(choice))
        save_picture(out, "clusters", choice_grid(choice, lambda index: shards[f"{unique[index].id}.image"]))
        progress.say(f"{len(chosen)} kept of {len(unique)}, taken in turn from {len(set(choice.clusters))} clusters")
    splits = split_by_origin(config, chosen)
    plan: list[tuple[Split, Task, Source]] = []
    with progress.bar("what each picture can serve", len(chosen), "image") as bar:
        for split in SPLITS:
            planned, useless = _plan(config, split, [row for row in chosen if splits[_origin(row)] == split], shards, taxonomy, bar)
            plan += planned
            rejected += useless
    conditions: list[Condition] = []
    with ShardWriter(out) as written, progress.bar("conditions", len(plan), "condition") as bar:
        for split, task, row in plan:
            condition, request = _condition(config, split, task, row, shards)
            conditions.append(condition)
            for ending, picture in {"image": request.image, "mask": request.mask, "target": request.target}.items():
                if picture is not None:
                    written.add(f"{condition.id}.{ending}", picture)
            bar.advance()
    _require_every_split(conditions)
    write_rows(out / "conditions.jsonl", conditions)
    (out / "rejected.jsonl").write_text("".join(json.dumps({"name": name, "reason": reason}) + "\n" for name, reason in rejected))
    _draw_examples(out, conditions, taxonomy)
    metrics = {
        "sources": len(rows),
        "chosen": len(chosen),
        "left_out": len(unique) - len(chosen),
        "rejected_by_reason": dict(Counter(reason.split(":")[0] for _, reason in rejected)),
        "splits": {split: sum(c.split == split for c in conditions) for split in SPLITS},
        "origins": {split: len({c.truth["origin"] for c in conditions if c.split == split}) for split in SPLITS},
        "kinds": {split: dict(Counter(c.kind for c in conditions if c.split == split)) for split in SPLITS},
        "per_task": {t.name: {s: sum((c.task, c.split) == (t.name, s) for c in conditions) for s in SPLITS} for t in taxonomy.active},
        "masks": {t.name: dict(Counter(c.mask_kind for c in conditions if c.task == t.name)) for t in taxonomy.active},
        "leaked_sources": leaked_sources(out),
    }
    write_metrics(out, metrics)
    return metrics


def drop_copies(
    config: CurateConfig, rows: list[Source], shards: ShardReader, progress: Progress
) -> tuple[list[Source], list[tuple[str, str]]]:
    """The rows without copies, and (id, reason) of each copy.

    Scenes are compared pixel by pixel only: two of them may look alike and still ask for different things. Of photographs
    and users' pictures a look-alike is a copy too, except that one file may be listed for several different requests.
    """
    kept: list[Source] = []
    rejected: list[tuple[str, str]] = []
    exact: dict[str, str] = {}
    seen: list[Source] = []
    hashes, thumbs = np.zeros((len(rows), 64), bool), np.zeros((len(rows), 192), np.float32)
    with progress.bar("copies", len(rows), "image") as bar:
        for row in rows:
            bar.advance()
            image = shards[f"{row.id}.image"]
            signature = _signature(row, image, shards)
            if signature in exact:
                rejected.append((row.id, f"Copy: equal to {exact[signature]}."))
                continue
            if row.kind != "scene":
                count = len(seen)
                hashes[count] = imagehash.phash(image).hash.ravel()
                thumbs[count] = np.asarray(image.resize((8, 8), Image.Resampling.BOX), np.float32).ravel() / 255
                near = (hashes[:count] != hashes[count]).sum(1) <= config.phash_distance
                near &= np.abs(thumbs[:count] - thumbs[count]).mean(1) <= config.colour_distance
                twins = [seen[i] for i in np.flatnonzero(near) if row.kind == "photo" or _origin(seen[i]) != _origin(row)]
                if twins:
                    rejected.append((row.id, f"Look-alike: of {twins[0].id}."))
                    continue
                seen.append(row)
            exact[signature] = row.id
            kept.append(row)
    return kept, rejected


def _signature(row: Source, image: Image.Image, shards: ShardReader) -> str:
    digest = hashlib.sha256(repr((image.size, row.task, row.caption, row.words)).encode() + image.tobytes())
    if f"{row.id}.object" in shards:
        digest.update(shards[f"{row.id}.object"].tobytes())
    return digest.hexdigest()


def diverse_subset(config: CurateConfig, rows: list[Source], shards: ShardReader, embed: Embedder, progress: Progress) -> Choice:
    """At most `config.subset` of the rows, by K-means over their embeddings."""
    side = (config.embed_size, config.embed_size)
    vectors = []
    with progress.bar("embed", len(rows), "image") as bar:
        for start in range(0, len(rows), EMBED_BATCH):
            batch = rows[start : start + EMBED_BATCH]
            images = torch.stack(
                [to_tensor(shards[f"{row.id}.image"].resize(side, Image.Resampling.LANCZOS)) for row in batch]
            )  # [B, 3, S, S]
            vectors.append(embed(images))
            bar.advance(len(batch))
    points = torch.cat(vectors).double().numpy()  # [N, D]
    return choose(points, count=config.subset, clusters=config.clusters, seed=config.seed)


def split_by_origin(config: CurateConfig, rows: list[Source]) -> dict[str, Split]:
    """Origin (photograph, file or scene) -> split. Each kind is split by itself, so that every split holds every kind it can.

    The origins stand in a circle, in an order drawn from the seed, test first and validation next. Each `rotation` turns it by one
    test's length: the new test comes from what was trained on. That is sound because a retraining starts from the base weights,
    which no round has trained; with a release as base it is not.
    """
    splits: dict[str, Split] = {}
    for kind in sorted({row.kind for row in rows}):
        origins = sorted({_origin(row) for row in rows if row.kind == kind}, key=lambda origin: _hash(config.seed, origin))
        count = len(origins)
        test = max(1, round(count * (1 - config.train_share - config.validation_share))) if count > 1 else 0
        validation = max(1, round(count * config.validation_share)) if count > 2 else 0
        for place, origin in enumerate(origins):
            index = (place + config.rotation * test) % count
            splits[origin] = "test" if index < test else "validation" if index < test + validation else "train"
    return splits


def leaked_sources(curated: Path) -> list[str]:
    """Origins with conditions in more than one split, and ids of conditions whose very pixels lie in more than one. Sound data: []."""
    where: dict[str, set[str]] = defaultdict(set)
    shards = ShardReader(curated)
    ids: dict[str, str] = {}
    for row in read_rows(curated / "conditions.jsonl", Condition):
        where[row.truth.get("origin", row.source_id)].add(row.split)
        pixels = hashlib.sha256(shards[f"{row.id}.image"].tobytes()).hexdigest()
        where[ids.setdefault(pixels, row.id)].add(row.split)
    return sorted(name for name, splits in where.items() if len(splits) > 1)


def _origin(row: Source) -> str:
    return row.truth.get("origin", row.id)


def _hash(seed: int, text: str) -> str:
    return hashlib.sha256(f"{seed}:{text}".encode()).hexdigest()


def _plan(
    config: CurateConfig, split: Split, pool: list[Source], shards: ShardReader, taxonomy: Taxonomy, bar: Bar
) -> tuple[list[tuple[Split, Task, Source]], list[tuple[str, str]]]:
    """Which source serves which task in a split. The task with the fewest able sources chooses first, and unused sources first."""
    pool = sorted(pool, key=lambda row: _hash(config.seed, row.id))
    able: dict[str, list[Source]] = {task.name: [] for task in taxonomy.active}
    rejected = []
    for row in pool:
        pictures = _pictures(row, shards)
        serves = [task.name for task in taxonomy.active if _request(config, task, row, pictures)]
        for name in serves:
            able[name].append(row)
        if not serves:
            rejected.append((row.id, f"Useless: it cannot serve {row.task or 'any active task'} (no mask, caption or words)."))
        bar.advance()
    used: Counter[str] = Counter()
    plan = []
    for task in sorted(taxonomy.active, key=lambda task: len(able[task.name])):
        ready = sorted(able[task.name], key=lambda row: (row.task is None, used[row.id]))
        for row in [row for row in ready if used[row.id] < config.tasks_per_source][: config.per_task(split)]:
            used[row.id] += 1
            plan.append((split, task, row))
    return plan, rejected


def _condition(config: CurateConfig, split: Split, task: Task, row: Source, shards: ShardReader) -> tuple[Condition, Made]:
    request = _request(config, task, row, _pictures(row, shards))
    assert request is not None
    condition = Condition(
        id=f"{row.id}-{task.name}",
        source_id=row.id,
        task=task.name,
        prompt=request.prompt,
        split=split,
        kind=row.kind,
        mask_kind=request.mask_kind,
        truth={**row.truth, "origin": _origin(row)},
        tags=row.tags,
    )
    return condition, request


def _pictures(row: Source, shards: ShardReader) -> dict[str, Image.Image]:
    return {ending: shards[f"{row.id}.{ending}"] for ending in ("image", "clean", "object", "words") if f"{row.id}.{ending}" in shards}


def _request(config: CurateConfig, task: Task, row: Source, pictures: dict[str, Image.Image]) -> Made | None:
    """The row's request for a task, always drawn alike; None where it cannot serve it or its manifest line names another."""
    if row.task not in (None, task.name):
        return None
    return make_condition(
        task,
        pictures["image"],
        clean=pictures.get("clean"),
        object_mask=pictures.get("object"),
        words_mask=pictures.get("words"),
        caption=row.caption,
        words=row.words,
        truth=row.truth,
        rng=np.random.default_rng([config.seed, zlib.crc32(row.id.encode()), zlib.crc32(task.name.encode())]),
        mask=pictures.get("object") if row.task else None,
        verbatim=row.task is not None,
    )


def _require_every_split(conditions: list[Condition]) -> None:
    for split in SPLITS:
        if not any(row.split == split for row in conditions):
            raise NotEnoughData(
                f"The {split} split holds no condition.", "Add source images (three different ones at the least), captions or masks."
            )


def _draw_examples(out: Path, conditions: list[Condition], taxonomy: Taxonomy) -> None:
    """The first requests of each task, one of every kind of picture and of mask before a second of any."""
    shards = ShardReader(out)
    for task in taxonomy.active:
        mine = [row for row in conditions if row.task == task.name]
        firsts = list({(row.kind, row.mask_kind): row for row in reversed(mine)}.values())[::-1]
        shown = (firsts + [row for row in mine if row not in firsts])[:EXAMPLES]
        cells = []
        for row in shown:
            image, key = shards[f"{row.id}.image"], f"{row.id}.target"
            target = shards[key] if key in shards else None  # noqa: SIM401 (a ShardReader is no dict)
            cells.append([image, overlay(image, shards[f"{row.id}.mask"]), target])
        if cells:
            columns, captions = ["image", "asked", "target"], [f"{row.prompt} ({row.mask_kind})" for row in shown]
            save_picture(out, f"examples-{task.name}", grid(cells, columns=columns, captions=captions))
