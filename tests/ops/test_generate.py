"""Candidates: every drawn value is stored, draws are independent of the batch, and the pictures belong to their rows."""

from pathlib import Path

import pytest
import torch

from infra.progress import Progress
from models.errors import NotEnoughData, UnknownTask
from models.flux_fill.loading import load_pipeline
from models.flux_fill.sampler import Sampler
from models.images import to_mask, to_tensor
from models.mini.scenes import render_scene
from models.records import Candidate, Condition, read_rows, write_rows
from models.shards import ShardReader, ShardWriter
from models.taxonomy import Taxonomy
from ops.generate import GenerateConfig, generate
from tests.models.tiny import save_tiny_flux

TAXONOMY = Taxonomy.load()
CONFIG = GenerateConfig(steps_low=1, steps_high=3, chunk=2)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_tiny_flux(tmp_path_factory.mktemp("flux"))


def _curated(folder: Path, seeds: list[int], task: str = "remove") -> Path:
    folder.mkdir()
    rows = [Condition(id=f"c{s}", source_id=f"s{s}", task=task, prompt="remove", split="train", kind="scene") for s in seeds]
    with ShardWriter(folder) as shards:
        for seed in seeds:
            scene = render_scene(seed)
            shards.add(f"c{seed}.image", scene.image)
            shards.add(f"c{seed}.mask", scene.object_mask)
    write_rows(folder / "conditions.jsonl", rows)
    return folder


def _generate(base: Path, curated: Path, out: Path, config: GenerateConfig = CONFIG) -> list[Candidate]:
    out.mkdir()
    generate(config, {"d" * 64: base}, curated, out, Progress(), TAXONOMY)
    return read_rows(out / "candidates.jsonl", Candidate)


def test_a_candidate_can_be_made_again_from_its_row(base, tmp_path):
    curated = _curated(tmp_path / "curated", [1, 2, 3])
    rows = _generate(base, curated, tmp_path / "candidates")
    assert len(rows) == 12 and len({row.seed for row in rows}) == 12
    row, shards = rows[5], ShardReader(curated)
    pipe = load_pipeline(base)
    sampler = Sampler(pipe)
    encoded = sampler.encode(
        to_tensor(shards[f"{row.condition_id}.image"])[None],
        to_mask(shards[f"{row.condition_id}.mask"])[None],
        ["remove"],
        [row.negative_prompt],
    )
    again = sampler.sample(
        pipe.transformer,
        encoded,
        [row.seed],
        steps=row.steps,
        true_cfg=row.true_cfg,
        guidance_scale=row.guidance_scale,
        strength=row.strength,
    )[0]
    stored = to_tensor(ShardReader(tmp_path / "candidates")[row.id])
    assert (again - stored).abs().max() < 1.01 / 255 + 1e-4  # one grey level of rounding


def test_draws_do_not_depend_on_the_other_conditions(base, tmp_path):
    few = _generate(base, _curated(tmp_path / "a", [2]), tmp_path / "few")
    many = _generate(base, _curated(tmp_path / "b", [1, 2, 3]), tmp_path / "many")
    assert few == [row for row in many if row.condition_id == "c2"]


def test_the_same_configuration_gives_the_same_bytes(base, tmp_path):
    curated = _curated(tmp_path / "curated", [4])
    _generate(base, curated, tmp_path / "one")
    _generate(base, curated, tmp_path / "two")
    first, second = ShardReader(tmp_path / "one"), ShardReader(tmp_path / "two")
    assert all(torch.equal(to_tensor(first[f"c4.{i}"]), to_tensor(second[f"c4.{i}"])) for i in range(4))


def test_ranges_are_respected_and_checked(base, tmp_path):
    rows = _generate(base, _curated(tmp_path / "curated", [5, 6]), tmp_path / "candidates")
    assert all(1 <= row.steps <= 3 and 1 <= row.true_cfg <= 4 and row.strength in (0.9, 1.0) for row in rows)
    with pytest.raises(ValueError, match="steps_low is above"):
        GenerateConfig(steps_low=9, steps_high=2)
    with pytest.raises(ValueError, match=r"1\.5"):
        GenerateConfig(strengths=[1.5])


def test_one_step_predictions_are_drawn_as_training_will_show_them(base, tmp_path):
    config = CONFIG.model_copy(update={"one_step": 0.5, "one_step_of": 4, "stop_low": 2, "stop_high": 3})
    rows = _generate(base, _curated(tmp_path / "curated", list(range(1, 9))), tmp_path / "candidates", config)
    early = [row for row in rows if row.stop is not None]
    assert 0.25 < len(early) / len(rows) < 0.75
    assert all((row.steps, row.true_cfg, row.strength) == (4, 1.0, 1.0) and 2 <= row.stop <= 3 for row in early)
    assert all(row.steps <= 3 for row in rows if row.stop is None)
    with pytest.raises(ValueError, match=r"stop steps 14\.\.27"):
        GenerateConfig(one_step_of=8)


def test_the_base_samples_its_share_beside_a_release(base, tmp_path):
    curated, config = _curated(tmp_path / "curated", list(range(1, 9))), CONFIG.model_copy(update={"base_share": 0.5})
    tuned = save_tiny_flux(tmp_path / "tuned", seed=1)
    mixed, alone, of_tuned = (tmp_path / name for name in ("mixed", "alone", "tuned-alone"))
    for out, models in ((mixed, {"r": tuned, "b": base}), (alone, {"b": base}), (of_tuned, {"r": tuned})):
        out.mkdir()
        generate(config, models, curated, out, Progress(), TAXONOMY)
    rows, own = read_rows(mixed / "candidates.jsonl", Candidate), {"b": ShardReader(alone), "r": ShardReader(of_tuned)}
    assert [row.id for row in rows] == [row.id for row in read_rows(alone / "candidates.jsonl", Candidate)]
    assert 0.25 < sum(row.model_digest == "b" for row in rows) / len(rows) < 0.75
    pictures = ShardReader(mixed)
    off = [(to_tensor(pictures[row.id]) - to_tensor(own[row.model_digest][row.id])).abs().max() for row in rows]
    assert max(off) < 1.01 / 255 + 1e-4  # alone it was in another batch


def test_nothing_to_do_and_unknown_tasks_are_refused(base, tmp_path):
    with pytest.raises(NotEnoughData, match="no conditions"):
        _generate(base, _curated(tmp_path / "empty", []), tmp_path / "a")
    with pytest.raises(UnknownTask, match="paint"):
        _generate(base, _curated(tmp_path / "strange", [1], task="paint"), tmp_path / "b")
