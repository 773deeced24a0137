"""Algorithms 1 and 2 on toy networks: the reward rises, resuming equals not stopping, and each mode moves what it should."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from infra.progress import Progress
from models.errors import ConfigError, NotEnoughData
from models.flux_fill.loading import load_transformer
from models.mini.scenes import render_scene
from models.records import Condition, write_rows
from models.shards import ShardWriter
from models.taxonomy import Taxonomy
from ops.folders import write_metrics
from ops.policy_health import rewarded_dimensions
from ops.pretrain_policy import scene_request
from ops.train_policy import TrainPolicyConfig, train_policy
from tests.models.tiny import save_tiny_flux
from tests.models.tiny_judge import save_tiny_judge

TAXONOMY = Taxonomy.load()
QUICK = TrainPolicyConfig(
    iterations=4, batch_size=2, learning_rate=1e-3, steps=3, stop_low=1, stop_high=2, checkpoint_every=2, health_conditions=2, warmup=0
)


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> tuple[Path, Path, Path]:
    """Tiny FLUX Fill, tiny judge, and a curated dataset of scenes."""
    folder = tmp_path_factory.mktemp("parts")
    curated, rng, rows = folder / "curated", np.random.default_rng(0), []
    curated.mkdir()
    with ShardWriter(curated) as shards:
        for seed in range(12):
            scene = render_scene(seed)
            for task in TAXONOMY.active:
                if made := scene_request(task, scene, rng):
                    key = f"{task.name}-{seed}"
                    rows.append(
                        Condition(id=key, source_id=str(seed), task=task.name, prompt=made.prompt, split=_split(seed), kind="scene")
                    )
                    shards.add(f"{key}.image", made.image)
                    shards.add(f"{key}.mask", made.mask)
    write_rows(curated / "conditions.jsonl", rows)
    return save_tiny_flux(folder / "flux"), save_tiny_judge(folder / "judge"), curated


def _split(seed: int) -> str:
    return "train" if seed < 8 else "validation"


def _train(parts, out: Path, config: TrainPolicyConfig, mode: str = "static", scratch: Path | None = None) -> dict:
    out.mkdir()
    return train_policy(config, *parts, out, Progress(), TAXONOMY, mode=mode, scratch=scratch or out.parent / f"{out.name}-scratch")


def _weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "transformer" / "diffusion_pytorch_model.safetensors")


def test_a_run_moves_the_policy_and_writes_a_loadable_version(parts, tmp_path):
    metrics = _train(parts, tmp_path / "policy", QUICK)
    assert metrics["finite"] and metrics["relative_change"] > 0 and metrics["steps"] == 4
    assert json.loads((tmp_path / "policy" / "metrics.json").read_text()) == metrics
    rows = [json.loads(line) for line in (tmp_path / "policy" / "curve.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(set(row["rewards"]) <= set(TAXONOMY.task(row["task"]).dimensions) for row in rows)
    load_transformer(parts[0], tmp_path / "policy")
    assert {path.name for path in (tmp_path / "policy" / "pictures").iterdir()} == {"curve.png", "before_after.png"}


@pytest.mark.parametrize("mode", ["static", "ema"])
def test_resumed_equals_uninterrupted(parts, tmp_path, mode, monkeypatch):
    _train(parts, tmp_path / "whole", QUICK, mode)
    scratch = tmp_path / "scratch"
    from ops.train_policy import Trainer

    iterate = Trainer.iterate

    def interrupted(self, step):
        if step == 3:
            raise KeyboardInterrupt
        return iterate(self, step)

    monkeypatch.setattr(Trainer, "iterate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _train(parts, tmp_path / "cut", QUICK, mode, scratch)
    monkeypatch.setattr(Trainer, "iterate", iterate)
    _train(parts, tmp_path / "resumed", QUICK, mode, scratch)
    whole, resumed = _weights(tmp_path / "whole"), _weights(tmp_path / "resumed")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert (tmp_path / "whole" / "curve.jsonl").read_bytes() == (tmp_path / "resumed" / "curve.jsonl").read_bytes()


def test_the_modes_differ_once_the_reference_has_moved(parts, tmp_path):
    config = QUICK.model_copy(update={"decay": 0.0})  # the reference is the policy of the step before
    _train(parts, tmp_path / "static", config)
    _train(parts, tmp_path / "ema", config, "ema")
    static, ema = _weights(tmp_path / "static"), _weights(tmp_path / "ema")
    assert any(not torch.equal(static[name], ema[name]) for name in static)


def test_the_average_can_be_delivered(parts, tmp_path):
    config = QUICK.model_copy(update={"decay": 0.999999, "deliver": "average"})
    assert _train(parts, tmp_path / "policy", config)["relative_change"] < 1e-4  # an average that hardly follows has hardly moved


def test_lora_trains_an_adapter_that_merges(parts, tmp_path):
    metrics = _train(parts, tmp_path / "policy", QUICK.model_copy(update={"lora_rank": 2}))
    assert metrics["relative_change"] > 0
    merged, base = load_transformer(parts[0], tmp_path / "policy").state_dict(), load_transformer(parts[0]).state_dict()
    assert merged.keys() == base.keys() and any(not torch.equal(merged[name], base[name]) for name in base)


def test_the_policy_pleases_the_judge_more_after_training(parts, tmp_path):
    """The mean P(yes) of the last ten of forty steps beats that of the first ten."""
    config = QUICK.model_copy(
        update={"iterations": 40, "learning_rate": 3e-3, "cap": 1.0, "checkpoint_every": 100, "stop_low": 2, "batch_size": 2}
    )
    out = tmp_path / "policy"
    _train(parts, out, config)
    rewards = [json.loads(line)["reward"] for line in (out / "curve.jsonl").read_text().splitlines()]
    assert np.mean(rewards[-10:]) > np.mean(rewards[:10])


def test_cells_the_judge_cannot_judge_give_no_reward(tmp_path):
    cells = [{"task": t, "dimension": d, "lo": 0.4 if d == "structure" else 0.7} for t, d in TAXONOMY.cells]
    write_metrics(tmp_path, {"cells": cells})
    rewarded = rewarded_dimensions(TAXONOMY, tmp_path, 0.5)
    assert all("structure" not in dimensions for dimensions in rewarded.values())
    assert rewarded["remove"] == ("removal_quality",)


def test_a_judge_that_can_judge_nothing_stops_the_run(parts, tmp_path):
    judge = tmp_path / "judge"
    save_tiny_judge(judge / "model")
    write_metrics(judge, {"cells": [{"task": t, "dimension": d, "lo": 0.3} for t, d in TAXONOMY.cells]})
    with pytest.raises(NotEnoughData, match="judge"):
        _train((parts[0], judge, parts[2]), tmp_path / "policy", QUICK)


def test_wrong_settings_are_named(parts, tmp_path):
    with pytest.raises(ConfigError, match="dynamic"):
        _train(parts, tmp_path / "policy", QUICK, mode="dynamic")
    with pytest.raises(ValueError, match=r"stop steps 2\.\.9"):
        TrainPolicyConfig(steps=4, stop_low=2, stop_high=9)
