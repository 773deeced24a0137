"""Algorithms 1 and 2 on toy networks: every step climbs, resuming equals not stopping, each mode moves what it should, and two
processes train what one trains and leave together.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from accelerate import Accelerator, DistributedType
from safetensors.torch import load_file

from infra.progress import Progress
from models.errors import ConfigError, NotEnoughData
from models.flux_fill.loading import load_transformer
from models.judge import hinge_reward_loss
from models.mini.scenes import render_scene
from models.records import Condition, read_rows, write_rows
from models.shards import ShardWriter
from models.taxonomy import Taxonomy
from ops import policy_health
from ops.folders import write_metrics
from ops.policy_config import TrainPolicyConfig
from ops.policy_health import rewarded_dimensions
from ops.pretrain_policy import scene_request
from ops.train_policy import Trainer, train_policy
from tests.models.tiny import save_tiny_flux
from tests.models.tiny_judge import save_tiny_judge

ROOT = Path(__file__).parents[2]
TAXONOMY = Taxonomy.load()
Parts = tuple[Path, Path, Path]  # FLUX Fill, judge, curated dataset
LEAVE_S = 60  # a process left behind would wait for the others for half an hour
QUICK = TrainPolicyConfig(
    iterations=4,
    batch_size=2,
    learning_rate=1e-3,
    steps=3,
    stop_low=1,
    stop_high=2,
    checkpoint_every=2,
    watch_per_task=1,
    warmup=0,
    difficulty_window=2,
    jitter=2,
    views=2,
)


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Parts:
    return make_parts(tmp_path_factory.mktemp("parts"))


def make_parts(folder: Path) -> Parts:
    """Tiny FLUX Fill, tiny judge, and a curated dataset of scenes."""
    curated, rng, rows = folder / "curated", np.random.default_rng(0), []
    curated.mkdir(parents=True)
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


def test_the_picture_shows_every_task(parts, tmp_path, monkeypatch):
    shown, draw = [], policy_health.grid
    monkeypatch.setattr(policy_health, "grid", lambda rows, **named: shown.extend(named["captions"]) or draw(rows, **named))
    _train(parts, tmp_path / "policy", QUICK.model_copy(update={"iterations": 1, "watch_per_task": 3}))
    assert [caption.split(": ")[0] for caption in shown] == [task.title for task in TAXONOMY.active]


@pytest.mark.parametrize("mode", ["static", "ema"])
def test_resumed_equals_uninterrupted(parts, tmp_path, mode, monkeypatch):
    _train(parts, tmp_path / "whole", QUICK, mode)
    scratch = tmp_path / "scratch"
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


def test_lora_layers_over_a_release_are_merged(parts, tmp_path):
    """Whoever loads a policy adds its LoRA layers to the base, so layers over other weights are no policy by themselves."""
    config = QUICK.model_copy(update={"lora_rank": 2, "iterations": 1})
    _train(parts, tmp_path / "over_base", config)
    _train(parts, tmp_path / "over_release", config.model_copy(update={"start": "production"}))
    assert not (tmp_path / "over_release" / "adapter").exists()
    merged, whole = load_transformer(parts[0], tmp_path / "over_base").state_dict(), _weights(tmp_path / "over_release")
    assert merged.keys() == whole.keys() and all(torch.equal(merged[name], whole[name]) for name in whole)


def test_lora_trains_an_adapter_that_merges(parts, tmp_path):
    metrics = _train(parts, tmp_path / "policy", QUICK.model_copy(update={"lora_rank": 2}))
    assert metrics["relative_change"] > 0
    merged, base = load_transformer(parts[0], tmp_path / "policy").state_dict(), load_transformer(parts[0]).state_dict()
    assert merged.keys() == base.keys() and any(not torch.equal(merged[name], base[name]) for name in base)


@pytest.mark.parametrize(
    "mode, changes",
    [
        ("static", {}),
        ("ema", {"lora_rank": 2, "learning_rate": 3e-3, "dtype": "bfloat16", "gradient_checkpointing": True, "true_cfg": 2.0}),
    ],
)
def test_every_step_on_the_same_draw_pleases_the_judge_more(parts, mode, changes):
    """A policy that sees one batch and one noise again and again climbs at every step: the gradient points at P(Yes)."""
    trainer = Trainer(QUICK.model_copy(update={"cap": 1.0, "decay": 0.999, **changes}), *parts, TAXONOMY, mode)
    rewards = []
    for _ in range(6):
        rewards.append(trainer.iterate(0)["reward"])
        trainer.rows.clear()  # whose turn it is depends on who had one
    assert all(after > before for before, after in pairwise(rewards)), rewards


@pytest.mark.parametrize("by_shortfall", [False, True])
def test_a_dimension_above_the_cap_gives_no_gradient(parts, by_shortfall):
    trainer = Trainer(QUICK.model_copy(update={"cap": 0.01, "by_shortfall": by_shortfall}), *parts, TAXONOMY, "static")
    row = trainer.iterate(0)
    assert row["loss"] == row["grad_norm"] == row["below_cap"] == 0 and row["reward"] > 0.01


@pytest.mark.parametrize("by_shortfall", [False, True])
def test_a_dimension_further_under_the_cap_weighs_more_if_asked(parts, by_shortfall):
    trainer = Trainer(QUICK.model_copy(update={"cap": 1.0, "temperature": 0.05, "by_shortfall": by_shortfall}), *parts, TAXONOMY, "static")
    rows = [trainer.iterate(step) for step in range(3)]
    shortfalls = [np.array([1.0 - reward for reward in row["rewards"].values()]) for row in rows]
    assert max(np.ptp(each) for each in shortfalls) > 0.01  # else the two rules could not be told apart
    for row, each in zip(rows, shortfalls, strict=True):
        weights = each / each.mean() if by_shortfall else 1.0
        assert row["loss"] == pytest.approx((weights * each).mean(), rel=1e-5)
        assert row["below_cap"] == 1  # of a cap of 1


def test_shortfalls_are_those_of_the_whole_batch_and_take_no_gradient(parts, monkeypatch):
    trainer, given = Trainer(QUICK.model_copy(update={"cap": 0.5, "by_shortfall": True}), *parts, TAXONOMY, "static"), []
    p_yes = torch.tensor([[0.3, 0.9], [0.4, 0.4], [0.6, 0.8]])
    torch.testing.assert_close(trainer._weights(p_yes), torch.tensor([1.5, 1.5, 0.0]))
    with monkeypatch.context() as patch:  # what another process has of the batch
        patch.setattr(trainer.accelerator, "reduce", lambda mine, how: (mine + torch.tensor([0.3, 0.1, 0.2])) / 2)
        torch.testing.assert_close(trainer._weights(p_yes), torch.tensor([1.5, 0.75, 0.75]))

    def shown(p_yes: torch.Tensor, cap: float, weights: torch.Tensor) -> torch.Tensor:
        given.append(weights)
        return hinge_reward_loss(p_yes, cap, weights)

    monkeypatch.setattr("ops.train_policy.hinge_reward_loss", shown)
    trainer.iterate(0)
    assert [weights.requires_grad for weights in given] == [False]


@pytest.mark.parametrize("same_noise", [False, True])
def test_from_one_noise_an_untrained_policy_edits_as_its_reference(parts, same_noise, monkeypatch):
    config = QUICK.model_copy(update={"same_noise": same_noise, "stop_low": QUICK.steps - 1})  # one step is left
    trainer, shown = Trainer(config, *parts, TAXONOMY, "static"), []
    encode = trainer.judge.encode
    monkeypatch.setattr(trainer.judge, "encode", lambda images: shown.append(images.detach()) or encode(images))
    trainer.iterate(0)
    evaluated, reference = shown
    assert torch.allclose(evaluated, reference, atol=1e-5) == same_noise


def test_a_task_that_is_won_is_drawn_less_and_never_forgotten(parts):
    trainer = Trainer(QUICK.model_copy(update={"difficulty_window": 2, "least_difficulty": 0.35}), *parts, TAXONOMY, "static")
    trainer.rows = [{"task": "fill", "below_cap": share} for share in (1.0, 0.6, 0.8)] + [{"task": "remove", "below_cap": 0.0}]
    assert [trainer._difficulty(task) for task in ("fill", "remove", "text")] == pytest.approx([0.7, 0.35, 1.0])
    trainer.rows.clear()
    for turn in range(400):
        task = trainer._next_task(np.random.default_rng(turn)).name
        trainer.rows.append({"task": task, "below_cap": 0.0 if task == "remove" else 0.7})
    turns = [row["task"] for row in trainer.rows]
    assert set(turns[: len(TAXONOMY.active)]) == {task.name for task in TAXONOMY.active}  # every task once, before any comes again
    share = turns.count("remove") / TAXONOMY.task("remove").probability / (turns.count("fill") / TAXONOMY.task("fill").probability)
    assert share == pytest.approx(0.5, abs=0.05)


def test_tasks_take_turns_in_proportion_to_their_probability(parts):
    trainer = Trainer(QUICK.model_copy(update={"difficulty_window": 0}), *parts, TAXONOMY, "static")
    turns = [trainer.iterate(step)["task"] for step in range(16)]
    assert all(abs(turns.count(task.name) - 16 * task.probability) <= 1 for task in TAXONOMY.active)


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


def test_processes_that_would_not_train_one_policy_are_refused(parts, monkeypatch):
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    with pytest.raises(ConfigError, match="FSDP splits the weights"):
        Trainer(QUICK, *parts, TAXONOMY, "static")
    monkeypatch.setenv("WORLD_SIZE", "2")  # as a launcher sets it, while accelerate, on a machine without GPU, sees one process
    with pytest.raises(ConfigError, match="each would train alone"):
        Trainer(QUICK, *parts, TAXONOMY, "static")


def test_wrong_settings_are_named(parts, tmp_path):
    with pytest.raises(ConfigError, match="dynamic"):
        _train(parts, tmp_path / "policy", QUICK, mode="dynamic")
    with pytest.raises(ValueError, match=r"stop steps 2\.\.9"):
        TrainPolicyConfig(steps=4, stop_low=2, stop_high=9)
    with pytest.raises(ValueError, match="2 views are all the same without jitter"):
        TrainPolicyConfig(views=2)


# Two processes, started by the real `accelerate launch`, over gloo, on the CPU.


def _job(parts: Parts, folder: Path, mode: str, **changes) -> dict:
    (folder / "out").mkdir(parents=True)
    (folder / "scratch").mkdir()
    config = QUICK.model_copy(update=changes).model_dump()
    return {"parts": [str(p) for p in parts], "config": config, "mode": mode, "out": f"{folder}/out", "scratch": f"{folder}/scratch"}


def _launch(folder: Path, *jobs: dict) -> subprocess.Popen:
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0", "-m"]
    with (folder / "log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", *command, "tests.ops.launched_policy", str(folder / "jobs.json")],
            cwd=ROOT,
            env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a signal meant for it must not reach the tests
        )


def _ended(launched: subprocess.Popen, seconds: float) -> int:
    """The launcher's exit code; fails where it or one of its workers is still there after `seconds`."""
    started, deadline = psutil.Process(launched.pid), time.monotonic() + seconds
    workers: set[psutil.Process] = set()
    try:
        while launched.poll() is None and time.monotonic() < deadline:
            with suppress(psutil.NoSuchProcess):
                workers |= set(started.children(recursive=True))
            time.sleep(0.05)
        assert launched.poll() is not None, "the launcher still waits"
        assert not psutil.wait_procs(workers, timeout=5)[1], "a worker was left behind"
        return launched.returncode
    finally:
        for process in (*workers, started):
            with suppress(psutil.NoSuchProcess):
                process.kill()


def _unreadable(parts: Parts, folder: Path) -> tuple[Parts, str]:
    """A dataset with two training conditions, of which the first one's picture does not decode; and that picture's key."""
    curated = shutil.copytree(parts[2], folder)
    rows = read_rows(curated / "conditions.jsonl", Condition)
    chosen = [row for row in rows if row.task == "fill" and row.split == "train"][:2]
    write_rows(curated / "conditions.jsonl", chosen)
    key = f"{chosen[0].id}.image"
    with tarfile.open(curated / "images-00000.tar") as shard:
        start = shard.getmember(f"{key}.png").offset_data
    with (curated / "images-00000.tar").open("r+b") as file:
        file.seek(start)
        file.write(bytes(64))
    return (*parts[:2], curated), key


@dataclass(frozen=True)
class Trained:
    """What one launch of two processes left: a batch of three, a whole run of either mode, and a run that one of them cannot read."""

    jobs: dict[str, dict]
    code: int
    log: str
    unreadable: str


@pytest.fixture(scope="module")
def trained(parts, tmp_path_factory) -> Trained:
    folder = tmp_path_factory.mktemp("trained")
    broken, key = _unreadable(parts, folder / "curated")
    jobs = {
        "uneven": _job(parts, folder / "uneven", "static", batch_size=3),
        "static": _job(parts, folder / "static", "static", batch_size=4, keep_weight=20.0, true_cfg=2.0, by_shortfall=True),
        "ema": _job(parts, folder / "ema", "ema", batch_size=4, lora_rank=2, decay=0.5, gradient_checkpointing=True),
        "unreadable": _job(broken, folder / "unreadable", "static"),
    }
    code = _ended(_launch(folder, *jobs.values()), 300)
    return Trained(jobs, code, (folder / "log").read_text(), key)


@pytest.mark.launch
def test_a_batch_that_does_not_split_is_refused_by_every_process(trained):
    refusals = [(Path(trained.jobs["uneven"]["out"]) / f"refused-{rank}.txt").read_text() for rank in range(2)]
    assert all("batch_size 3 does not split evenly over 2 processes" in text for text in refusals)


@pytest.mark.launch
@pytest.mark.parametrize("mode", ["static", "ema"])
def test_two_processes_train_what_one_trains(parts, trained, mode, tmp_path):
    """The same figures and files, and weights that moved the same way: the gradient of the whole batch reaches both."""
    job, alone = trained.jobs[mode], tmp_path / "alone"
    alone.mkdir()
    config = TrainPolicyConfig(**job["config"])
    metrics = train_policy(config, *parts, alone, Progress(), TAXONOMY, mode=mode, scratch=tmp_path / "scratch")
    together = Path(job["out"])
    assert {path.name for path in together.iterdir()} == {path.name for path in alone.iterdir()}, trained.log
    found = json.loads((together / "metrics.json").read_text())
    assert found.keys() == metrics.keys() and found["preservation_psnr"] == pytest.approx(metrics["preservation_psnr"], abs=0.05)
    curves = [[json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()] for folder in (together, alone)]
    for ours, theirs in zip(*curves, strict=True):
        assert [ours[key] for key in ("step", "task", "stop")] == [theirs[key] for key in ("step", "task", "stop")]
        for key in ("loss", "reward", "grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3), key
    base, *weights = (load_transformer(parts[0], folder).state_dict() for folder in (None, together, alone))
    apart, way = (sum(float((weights[1][name] - other[name]).pow(2).sum()) ** 0.5 for name in base) for other in (weights[0], base))
    assert apart < 0.01 * way  # not equal: Adam blows up the rounding of the smallest gradients


@pytest.mark.launch
@pytest.mark.parametrize("mode", ["static", "ema"])
def test_policy_and_shadows_are_the_same_in_every_process(trained, mode):
    first, second = (load_file(Path(trained.jobs[mode]["scratch"]) / f"rank-{rank}.safetensors") for rank in range(2))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.launch
def test_what_one_process_cannot_read_ends_both(trained):
    """Its process fails and names the picture; the other does not wait for it, and nothing is written."""
    assert trained.code != 0 and trained.unreadable in trained.log
    assert not list(Path(trained.jobs["unreadable"]["out"]).iterdir())


@pytest.mark.launch
def test_ctrl_c_ends_both_and_the_run_goes_on_from_its_checkpoint(parts, tmp_path):
    """Stopped with two processes, finished by one."""
    job = _job(parts, tmp_path / "run", "static", iterations=24)
    launched, deadline = _launch(tmp_path, job), time.monotonic() + 300
    while not list(Path(job["scratch"]).glob("*/step-*")):
        assert launched.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.05)
    launched.send_signal(signal.SIGINT)  # Ctrl-C: the launcher passes it on, its workers are sessions of their own
    assert _ended(launched, LEAVE_S) != 0
    out, lines = Path(job["out"]), []
    assert not list(out.iterdir())
    config = TrainPolicyConfig(**job["config"])
    train_policy(config, *parts, out, Progress(lines.append), TAXONOMY, mode="static", scratch=Path(job["scratch"]))
    assert "resumed after iteration" in lines[0]
    assert [json.loads(line)["step"] for line in (out / "curve.jsonl").read_text().splitlines()] == list(range(1, 25))
