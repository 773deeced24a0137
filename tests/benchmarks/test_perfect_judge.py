"""The judge that knows the perfect edit: it prefers what is nearer to it, and its gradient leads there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from benchmarks.perfect_judge import PerfectlyJudged
from models.images import to_mask, to_tensor
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


def test_it_prefers_what_is_nearer_to_the_perfect_edit(tmp_path: Path) -> None:
    curated, rows, rng = tmp_path / "curated", [], np.random.default_rng(0)
    curated.mkdir()
    with ShardWriter(curated) as shards:
        for seed in range(4):
            made = scene_request(FILL, scene := render_scene(seed), rng)
            assert made is not None
            known = seed < 3
            key = f"fill-{seed}"
            rows.append(
                Condition(
                    id=key, source_id=key, task="fill", prompt=made.prompt, split="train", kind="scene", truth=scene.truth if known else {}
                )
            )
            shards.add(f"{key}.image", made.image)
            shards.add(f"{key}.mask", made.mask)
            if known:
                shards.add(f"{key}.target", made.target)
    write_rows(curated / "conditions.jsonl", rows)
    spread = dict.fromkeys(TAXONOMY.cells, 0.1)
    parts = save_tiny_flux(tmp_path / "flux"), save_tiny_judge(tmp_path / "judge"), curated
    trainer = PerfectlyJudged(spread, TrainPolicyConfig(steps=3, stop_low=1, stop_high=2, batch_size=2), *parts, TAXONOMY, "static")
    assert [row.id for row in trainer.conditions] == ["fill-0", "fill-1", "fill-2"]  # of the fourth no perfect edit is known

    batch = trainer.conditions
    targets, masks = (
        torch.stack([read(trainer.shards[f"{row.id}.{name}"]) for row in batch])
        for read, name in ((to_tensor, "target"), (to_mask, "mask"))
    )
    grey = targets * (1 - masks) + 0.5 * masks
    near = (0.7 * targets + 0.3 * grey).requires_grad_()
    odds = trainer.log_odds(FILL, batch, masks, near, grey, [[0, 0]])
    assert odds.shape == (len(FILL.dimensions), 3) and (odds > 0).all()
    assert torch.allclose(odds, -trainer.log_odds(FILL, batch, masks, grey, near, [[0, 0]]))
    odds.mean().backward()
    nearer = near.detach() + 0.1 * near.grad / near.grad.norm()
    assert (nearer - targets).norm() < (near.detach() - targets).norm()
