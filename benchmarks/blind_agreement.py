"""How far do the measures that need no target agree with the known truth? Some five minutes of one core.

    python -m benchmarks.blind_agreement                 # the mini base's own samples on procedural scenes
    python -m benchmarks.blind_agreement --clip FOLDER   # with a CLIP checkpoint, those that need one too

Written to `benchmarks/results/blind_agreement.json`; the table that is printed is the one in docs/measures.md.

Every pair of candidates of a scene which the acceptance measure tells apart is put to each measure: a share of one half is chance.
The annotator's measure (`labelled_by`) is asked the same: what knowing the target is worth.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.rows import machine
from infra.data import ensure_data
from infra.disk import replacing
from models.blind import WITH_CLIP, Edit, blind
from models.clip import Clip
from models.flux_fill.loading import load_pipeline
from models.flux_fill.sampler import Sampler
from models.images import paste, to_mask, to_tensor
from models.mini.acceptance import accept
from models.mini.measures import measure
from models.mini.scenes import Scene, render_scene
from models.taxonomy import Taxonomy
from ops.pretrain_policy import scene_request
from ops.statistics import clustered_mean
from ops.win_rates import TIE_TOLERANCE, won
from pipelines.report import commit

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "blind_agreement.json"
ASKED = ("measured_by", "confirmed_by", "labelled_by")  # fields of a dimension that name a measure
FIRST_SCENE = 7_000_000  # ours: scenes that neither the base nor the chain has met
PER_SCENE, STEPS, CFG = 4, (4, 8), (1.0, 4.0)  # candidates and what is drawn for them: as ops/generate.py


class _Request(NamedTuple):
    scene: Scene
    source: Tensor
    mask: Tensor
    target: Tensor
    prompt: str


def _requests(taxonomy: Taxonomy, task: str, count: int) -> list[_Request]:
    found: list[_Request] = []
    for seed in itertools.count(FIRST_SCENE):
        if len(found) == count:
            return found
        scene = render_scene(seed)
        made = scene_request(taxonomy.task(task), scene, np.random.default_rng(seed))
        if made and made.target:
            found.append(_Request(scene, to_tensor(made.image), to_mask(made.mask), to_tensor(made.target), made.prompt))
    raise AssertionError  # seeds do not end


def _samples(sampler: Sampler, requests: list[_Request]) -> Tensor:
    """Edits pasted into their sources, [R, PER_SCENE, 3, H, W]."""
    rng = np.random.default_rng(0)
    sources, masks = torch.stack([r.source for r in requests]), torch.stack([r.mask for r in requests])
    encoded = sampler.encode(sources, masks, [r.prompt for r in requests], [""] * len(requests))
    rows = len(requests) * PER_SCENE
    made = sampler.sample(
        sampler.pipe.transformer,
        encoded.select([row // PER_SCENE for row in range(rows)]),
        list(range(rows)),
        steps=rng.integers(STEPS[0], STEPS[1] + 1, rows).tolist(),
        true_cfg=rng.uniform(*CFG, rows).tolist(),
    )
    return torch.stack([paste(requests[row // PER_SCENE].source, image, requests[row // PER_SCENE].mask) for row, image in enumerate(made)])


def agreement(scores: list[list[float]], truth: list[list[float]]) -> dict[str, float] | None:
    """Share of pairs told apart by `truth` [scenes][candidates] in which `scores` names the same winner, ties half: mean, lo, hi, pairs."""
    values, scenes = [], []
    for scene, (ours, known) in enumerate(zip(scores, truth, strict=True)):
        for a, b in itertools.combinations(range(len(known)), 2):
            verdict, said = (won(row[a], row[b], TIE_TOLERANCE) for row in (known, ours))
            if verdict != 0.5:
                values.append(0.5 if said == 0.5 else float(said == verdict))
                scenes.append(scene)
    if not values:
        return None
    found = clustered_mean(values, scenes)
    return {"mean": found.mean, "lo": found.lo, "hi": found.hi, "pairs": found.n}


def score(sampler: Sampler, taxonomy: Taxonomy, scenes: int, clip: Clip | None) -> Iterator[dict[str, Any]]:
    """A row per task and dimension: what `agreement` finds for the measure in each of ASKED, None for one that was not asked."""
    for task in taxonomy.active:
        requests = _requests(taxonomy, task.name, scenes)
        edits = _samples(sampler, requests).view(len(requests), PER_SCENE, *requests[0].source.shape)
        for dimension in map(taxonomy.dimension, task.dimensions):
            scores: dict[str, list[list[float]]] = defaultdict(list)
            for r, row in zip(requests, edits, strict=True):
                known = (r.target, r.mask, r.scene.truth, r.prompt)
                scores[dimension.accepted_by].append([accept(dimension.accepted_by, e, *known) for e in row])
                scores[dimension.labelled_by].append([measure(dimension.labelled_by, e, *known) for e in row])
                for name in (dimension.measured_by, dimension.confirmed_by):
                    if clip or name not in WITH_CLIP or (name == "prompt_followed" and task.condition == "word"):
                        scores[name].append([blind(name, Edit(e, r.source, r.mask, r.prompt), clip) for e in row])
            names = {field: getattr(dimension, field) for field in ASKED}
            found = {f: agreement(scores[name], scores[dimension.accepted_by]) if name in scores else None for f, name in names.items()}
            yield {"task": task.name, "dimension": dimension.name, **found}


def table(rows: Iterable[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [f"| task | dimension | pairs | {' | '.join(f'`{field}`' for field in ASKED)} |", "| --- | --- | --- | --- | --- | --- |"]
    for row in rows:
        found = [row[field] for field in ASKED]
        told = [f"{each['mean']:.2f} ({each['lo']:.2f} to {each['hi']:.2f})" if each else "not asked" for each in found]
        lines.append(f"| {row['task']} | {row['dimension']} | {max(each['pairs'] for each in found if each)} | {' | '.join(told)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=24, help="scenes per task")
    parser.add_argument("--clip", type=Path, help="folder of a CLIP checkpoint")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    taxonomy, clip = Taxonomy.load(), Clip.load(arguments.clip) if arguments.clip else None
    sampler = Sampler(load_pipeline(ensure_data(ROOT) / "mini" / "flux-fill"))
    with torch.inference_mode():
        rows = list(score(sampler, taxonomy, arguments.scenes, clip))
    command = f"python -m benchmarks.blind_agreement --scenes {arguments.scenes}"
    with replacing(arguments.out) as draft:
        draft.write_text(json.dumps({"command": command, "commit": commit(), "machine": machine(), "rows": rows}, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
