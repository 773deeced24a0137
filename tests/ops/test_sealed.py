"""The test split is sealed: whatever its pictures, prompts and labels are, nothing that is trained or chosen changes.

Two worlds differ in their test rows alone, and every stage before the evaluation gives the same in both. Candidates and labels of
the test rows themselves are made, for the judge's accuracy on them, which only the evaluation reads.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import ImageOps

from infra.progress import Progress
from models.mini.scenes import render_scene
from models.records import SPLITS, Candidate, Condition, Pair, Preference, read_rows, write_rows
from models.shards import ShardReader, ShardWriter
from models.taxonomy import Taxonomy
from ops.fit_reward import FitRewardConfig, fit_reward
from ops.generate import GenerateConfig, generate
from ops.label import LabelConfig, label_scripted
from ops.pair import PairConfig, make_pairs
from ops.policy_config import TrainPolicyConfig
from ops.pretrain_policy import scene_request
from ops.train_policy import train_policy
from tests.models.tiny_judge import save_tiny_judge

TAXONOMY = Taxonomy.load()
SCENES = 6  # per task, two of each split
POLICY = {"iterations": 2, "checkpoint_every": 1, "batch_size": 2, "steps": 2, "stop_low": 1, "stop_high": 1, "warmup": 0}


class World(NamedTuple):
    """Folders of one world, stage by stage."""

    curated: Path
    candidates: Path
    preferences: Path
    pairs: Path
    reward_model: Path
    policy: Path


def curate(folder: Path, unsealed: bool) -> Path:
    """Scenes of every task in all splits; `unsealed` has other pictures and prompts in the test split."""
    folder.mkdir(parents=True)
    rng, rows = np.random.default_rng(0), []
    seeds = iter(seed for seed in range(500) if render_scene(seed).words)
    with ShardWriter(folder) as shards:
        for task in TAXONOMY.active:
            for index in range(SCENES):
                scene = render_scene(next(seeds))
                made = scene_request(task, scene, rng)
                assert made is not None and made.target is not None
                split = SPLITS[index % 3]
                other = unsealed and split == "test"
                key = f"{task.name}-{index}"
                prompt = f"{made.prompt} in few colours" if other else made.prompt
                rows.append(Condition(id=key, source_id=key, task=task.name, prompt=prompt, split=split, kind="scene", truth=scene.truth))
                for ending, picture in {"image": made.image, "mask": made.mask, "target": made.target}.items():
                    shards.add(f"{key}.{ending}", ImageOps.posterize(picture, 3) if other and ending != "mask" else picture)
    write_rows(folder / "conditions.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def worlds(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[World, World]:
    root = tmp_path_factory.mktemp("sealed")
    judge = save_tiny_judge(root / "judge")

    def build(name: str, unsealed: bool) -> World:
        world = World(*(root / name / field for field in World._fields))
        curate(world.curated, unsealed)
        for folder in world[1:]:
            folder.mkdir()
        drawn = GenerateConfig(per_condition=2, steps_low=1, steps_high=2)
        generate(drawn, {"0": tiny_base}, world.curated, world.candidates, Progress(), TAXONOMY)
        labels = LabelConfig(tie_margin=0.5)
        label_scripted(labels, world.curated, world.candidates, [], TAXONOMY, world.preferences, Progress())
        make_pairs(PairConfig(), world.curated, world.candidates, world.preferences, world.pairs, Progress(), TAXONOMY)
        fit = FitRewardConfig(steps=2, batch_size=4, eval_every=1, learning_rate=1e-3, second_share=0.5)
        fit_reward(fit, judge, world.curated, world.candidates, world.pairs, world.reward_model, Progress(), TAXONOMY)
        config, scratch = TrainPolicyConfig(**POLICY, watch_per_task=1, least_judged=0.0), root / name / "scratch"
        train_policy(
            config, tiny_base, world.reward_model, world.curated, world.policy, Progress(), TAXONOMY, mode="static", scratch=scratch
        )
        return world

    return build("as_it_is", False), build("unsealed", True)


def digests(folder: Path) -> dict[str, str]:
    """Every file that was written, by its bytes."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def test_the_worlds_differ_in_what_is_sealed(worlds: tuple[World, World]) -> None:
    """Else the tests below could not fail."""
    one, other = worlds
    for split in SPLITS:
        keys = [row.id for row in read_rows(one.curated / "conditions.jsonl", Condition) if row.split == split]
        same = [ShardReader(one.candidates)[f"{key}.0"].tobytes() == ShardReader(other.candidates)[f"{key}.0"].tobytes() for key in keys]
        assert not any(same) if split == "test" else all(same)
    assert digests(one.candidates) != digests(other.candidates) and digests(one.preferences) != digests(other.preferences)


@pytest.mark.parametrize(
    ("stage", "read"),
    [
        ("candidates", lambda folder: [(row.condition_id, row) for row in read_rows(folder / "candidates.jsonl", Candidate)]),
        ("preferences", lambda folder: [(row.condition_id, row) for row in read_rows(folder / "preferences.jsonl", Preference)]),
        ("pairs", lambda folder: [(row.condition_id, row) for row in read_rows(folder / "pairs.jsonl", Pair)]),
    ],
    ids=["generate", "label", "pair"],
)
def test_other_rows_are_made_without_them(
    worlds: tuple[World, World], stage: str, read: Callable[[Path], list[tuple[str, object]]]
) -> None:
    sealed = {row.id for row in read_rows(worlds[0].curated / "conditions.jsonl", Condition) if row.split == "test"}
    one, other = ([row for key, row in read(getattr(world, stage)) if key not in sealed] for world in worlds)
    assert one == other and one


@pytest.mark.parametrize("stage", ["reward_model", "policy"], ids=["fit_reward", "train_policy"])
def test_what_is_fitted_to_the_other_rows_is_the_same_to_the_last_byte(worlds: tuple[World, World], stage: str) -> None:
    one, other = (digests(getattr(world, stage)) for world in worlds)
    assert one == other and any(name.endswith(".safetensors") for name in one)
