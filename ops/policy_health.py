"""Is a trained policy a sane network? Finite, moved away from its start, and quiet outside the mask. Quality is evaluation's business."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from infra.progress import Progress
from models.adapters import Shadow
from models.flux_fill.sampler import Sampler
from models.images import to_mask, to_pil, to_tensor
from models.records import Condition
from models.shards import ShardReader
from models.taxonomy import Taxonomy
from ops.folders import read_metrics, save_picture
from ops.pictures import curves, grid, overlay

SHOWN = 5  # ours: conditions in the before-and-after picture, of each task in turn
MOST_PSNR = 100.0  # dB; a copy without any error would be infinite, which JSON cannot hold


def rewarded_dimensions(taxonomy: Taxonomy, judge: Path, least: float) -> dict[str, tuple[str, ...]]:
    """Per active task the dimensions worth rewarding: those whose judge accuracy has a lower bound of `least` or more.

    What the judge cannot judge must not be rewarded. A judge's folder without measured cells (a base judge) rewards all.
    """
    cells = read_metrics(judge).get("cells", []) if (judge / "metrics.json").exists() else []
    low = {(cell["task"], cell["dimension"]): cell["lo"] for cell in cells}
    unmeasured = 0.0 if cells else 1.0
    return {task.name: tuple(d for d in task.dimensions if low.get((task.name, d), unmeasured) >= least) for task in taxonomy.active}


def shown_pasted(judge: Path) -> bool:
    """Was this judge fitted on edits pasted into their source? It must be shown the same kind. A base judge knows neither: yes."""
    return bool(read_metrics(judge).get("paste_source", True)) if (judge / "metrics.json").exists() else True


def preservation(image: Tensor, source: Tensor, mask: Tensor) -> float:
    """PSNR in dB (at most 100) of images [3, H, W] in [0, 1] over the pixels outside the mask [1, H, W]."""
    kept = 1 - mask
    error = ((image - source) ** 2 * kept).sum().item() / (3 * kept.sum().item())
    return MOST_PSNR if error <= 0 else min(-10 * math.log10(error), MOST_PSNR)  # in this order nan stays nan, which no gate lets pass


def stored_change(base: Path, policy: Path) -> float:
    """Norm of what a stored policy adds to the base's transformer, over the norm of that transformer.

    nan where a stored value is not finite, or a file is absent, cut, or of another architecture. Reads one layer at a time.
    """
    try:
        before = _stored(base / "transformer")
        start = sum(float(_tensor(before, name).square().sum()) for name in before)
        moved = sum(float(step.square().sum()) for step in _steps(before, policy))
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError):
        return math.nan
    # Six digits: the last ones depend on the number of threads, and equal verdicts must be equal bytes of evidence.
    return float(f"{math.sqrt(moved / start):.6g}") if start else math.nan


def _steps(before: Mapping[str, Path], policy: Path) -> Iterator[Tensor]:
    """What the policy adds to each weight of the base: the difference, or the product of a LoRA's two factors, scaled."""
    if (policy / "transformer").is_dir():
        after = _stored(policy / "transformer")
        yield from (_tensor(after, name) - _tensor(before, name) for name in sorted(before.keys() | after.keys()))
        return
    adapter, config = _stored(policy / "adapter"), json.loads((policy / "adapter" / "adapter_config.json").read_text())
    for name in adapter:
        if ".lora_B." in name:
            step = _tensor(adapter, name) @ _tensor(adapter, name.replace(".lora_B.", ".lora_A."))
            yield step * (config["lora_alpha"] / config["r"])


def _stored(folder: Path) -> dict[str, Path]:
    """Name of a weight -> the safetensors file that holds it."""
    found: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            found |= dict.fromkeys(weights.keys(), file)
    return found


def _tensor(places: Mapping[str, Path], name: str) -> Tensor:
    with safe_open(places[name], framework="pt") as weights:
        return weights.get_tensor(name).double()


def _in_turn(tasks: Sequence[str]) -> list[int]:
    """The places in `tasks`, the first of every task before the second of any."""
    before = [tasks[:place].count(task) for place, task in enumerate(tasks)]
    return sorted(range(len(tasks)), key=before.__getitem__)


@torch.no_grad()
def measure_health(
    policy: nn.Module,
    base: Shadow,
    sampler: Sampler,
    shards: ShardReader,
    conditions: Sequence[Condition],
    rows: Sequence[Mapping[str, Any]],
    taxonomy: Taxonomy,
    settings: Mapping[str, Any],
    negative_prompt: str,
    batch_size: int,
    out: Path,
    progress: Progress,
    label: str,
) -> dict[str, Any]:
    """Health figures of the weights now in `policy`, against `base`, on validation conditions; writes the run's pictures.

    Args:
        settings: of `Sampler.sample`: steps, true_cfg, guidance_scale. negative_prompt: where true_cfg is above 1.

    Returns finite (weights and every loss), relative_change (norm of the move over norm of the start), and the mean PSNR in dB
    of the raw output outside the mask, of policy and base, from the same seeds.
    """
    moved = sum(float((p.detach() - base.values[n]).pow(2).sum()) for n, p in base.parameters.items())
    start = sum(float(p.detach().pow(2).sum()) for p in policy.parameters())
    finite = all(bool(torch.isfinite(p).all()) for p in policy.parameters()) and all(math.isfinite(row["loss"]) for row in rows)
    figures: dict[str, Any] = {"finite": finite, "relative_change": math.sqrt(moved / start) if finite else math.nan}

    sources = [(to_tensor(shards[f"{c.id}.image"]), to_mask(shards[f"{c.id}.mask"])) for c in conditions]
    after: dict[int, Tensor] = {}
    before: dict[int, Tensor] = {}
    with progress.bar(label, len(sources), "condition") as bar:
        for places in _batches(sources, batch_size):
            images, masks = (torch.stack(parts) for parts in zip(*(sources[place] for place in places), strict=True))
            negatives = [negative_prompt] * len(places) if settings["true_cfg"] > 1 else None
            encoded = sampler.encode(images, masks, [conditions[place].prompt for place in places], negatives)
            # the seed is the condition's place, so that base and policy start from one noise
            after |= zip(places, sampler.sample(policy, encoded, places, **settings).cpu(), strict=True)
            with base.applied():
                before |= zip(places, sampler.sample(policy, encoded, places, **settings).cpu(), strict=True)
            bar.advance(len(places))
    for name, edits in (("preservation_psnr", after), ("base_preservation_psnr", before)):
        figures[name] = sum(preservation(edits[place], *source) for place, source in enumerate(sources)) / len(sources)

    shown = [(place, conditions[place]) for place in _in_turn([c.task for c in conditions])[:SHOWN]]
    table: list[list[Image.Image | None]] = [
        [overlay(shards[f"{c.id}.image"], shards[f"{c.id}.mask"]), to_pil(before[place]), to_pil(after[place])] for place, c in shown
    ]
    captions = [f"{taxonomy.task(c.task).title}: {c.prompt}" for _, c in shown]
    save_picture(out, "before_after", grid(table, columns=["asked", "before", "after"], captions=captions))
    tasks = [task for task in taxonomy.active if any(row["task"] == task.name for row in rows)]
    series = {
        task.title: ([row["step"] for row in rows if row["task"] == task.name], [row["reward"] for row in rows if row["task"] == task.name])
        for task in tasks
    }
    save_picture(out, "curve", curves(series, x="step", y="mean P(yes)", title="Reward while training", reference=0.5, smooth=7))
    return figures


def _batches(sources: Sequence[tuple[Tensor, Tensor]], size: int) -> Iterator[list[int]]:
    """Places in `sources`, `size` or fewer pictures of one size at a time."""
    groups: dict[torch.Size, list[int]] = defaultdict(list)
    for place, (image, _) in enumerate(sources):
        groups[image.shape].append(place)
    for places in groups.values():
        for start in range(0, len(places), size):
            yield places[start : start + size]
