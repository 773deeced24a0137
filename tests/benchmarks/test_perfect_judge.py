"""The judge that knows the perfect edit: it prefers what is nearer to it, by the annotator's measures, and its gradient leads there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.perfect_judge import PerfectlyJudged
from models.images import to_mask, to_tensor
from models.mini.measures import measure
from models.mini.scenes import render_scene
from models.records import Condition, write_rows
from models.shards import ShardWriter
from models.taxonomy import Taxonomy
from ops.policy_config import TrainPolicyConfig
from ops.pretrain_policy import scene_request
from tests.models.tiny import save_tiny_flux
from tests.models.tiny_judge import save_tiny_judge

TAXONOMY = Taxonomy.load()
FILL = TAXONOMY.task("fill")


def make_curated(folder: Path) -> Path:
    """Four fills, of which the last has no known perfect edit, and a removal without one."""
    rows, rng = [], np.random.default_rng(0)
    folder.mkdir()
    with ShardWriter(folder) as shards:
        for number, task in enumerate(("fill", "fill", "fill", "fill", "remove")):
            scene = render_scene(number)
            made = scene_request(TAXONOMY.task(task), scene, rng)
            assert made is not None
            key = f"{task}-{number}"
            row = Condition(id=key, source_id=key, task=task, prompt=made.prompt, split="train", kind="scene", truth=scene.truth)
            rows.append(row)
            shards.add(f"{key}.image", made.image)
            shards.add(f"{key}.mask", made.mask)
            if number < 3:
                shards.add(f"{key}.target", made.target)
    write_rows(folder / "conditions.jsonl", rows)
    return folder


def test_it_prefers_what_is_nearer_to_the_perfect_edit(tmp_path: Path) -> None:
    spread = {cell: 0.05 * number for number, cell in enumerate(TAXONOMY.cells, start=1)}
    parts = save_tiny_flux(tmp_path / "flux"), save_tiny_judge(tmp_path / "judge"), make_curated(tmp_path / "curated")
    trainer = PerfectlyJudged(spread, TrainPolicyConfig(batch_size=2), *parts, TAXONOMY, "static")
    assert [row.id for row in trainer.conditions] == ["fill-0", "fill-1", "fill-2"] and trainer.tasks == [FILL]

    batch, shards = trainer.conditions, trainer.shards
    targets = torch.stack([to_tensor(shards[f"{row.id}.target"]) for row in batch])
    masks = torch.stack([to_mask(shards[f"{row.id}.mask"]) for row in batch])
    grey = targets * (1 - masks) + 0.5 * masks
    near = (0.7 * targets + 0.3 * grey).requires_grad_()
    odds = trainer.log_odds(FILL, batch, masks, near, grey, [[0, 0]])
    for row, name in enumerate(FILL.dimensions):
        for column, condition in enumerate(batch):
            known, of = TAXONOMY.dimension(name).labelled_by, (targets[column], masks[column], condition.truth, condition.prompt)
            better = measure(known, near[column].detach(), *of) - measure(known, grey[column], *of)
            assert better > 0 and odds[row, column].item() == pytest.approx(better / spread["fill", name], rel=0.1)

    odds.mean().backward()
    assert near.grad is not None
    nearer = near.detach() + 0.1 * near.grad / near.grad.norm()
    assert (nearer - targets).norm() < (near.detach() - targets).norm()
