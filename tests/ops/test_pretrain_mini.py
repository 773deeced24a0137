"""The recipe of the mini base runs end to end at toy size, and the shipped weights are what their record says."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxFillPipeline

from infra.data import ensure_data
from infra.progress import Progress
from infra.stores.base import directory_digest
from models.errors import ConfigError
from models.flux_fill.loading import load_pipeline
from models.images import to_tensor
from models.judge import Judge
from models.mini.scenes import COLOURS, render_scene
from models.taxonomy import Taxonomy
from ops.pretrain_judge import make_bank
from ops.pretrain_mini import PretrainConfig, pretrain_mini, resumable
from ops.pretrain_policy import FLAWS, flawed, requests
from ops.pretrain_vae import BASE_SCENES, base_pictures, reconstruction_psnr

ROOT = Path(__file__).parents[2]
TAXONOMY = Taxonomy.load()
TOY = PretrainConfig(
    vae_steps=2,
    vae_batch=4,
    requests=64,
    policy_steps=2,
    policy_batch=4,
    judge_requests=64,
    judge_dense_steps=2,
    judge_read_steps=2,
    judge_compare_steps=2,
)


def test_an_interrupted_recipe_goes_on_to_loadable_weights_and_keeps_finished_parts(tmp_path, monkeypatch):
    save = FluxFillPipeline.save_pretrained

    def cut(pipe, folder):
        save(pipe, folder)
        next(Path(folder).glob("transformer/*.safetensors")).unlink()  # config.json is there, the weights are not
        raise KeyboardInterrupt

    monkeypatch.setattr(FluxFillPipeline, "save_pretrained", cut)
    with pytest.raises(KeyboardInterrupt):
        pretrain_mini(TOY, tmp_path, Progress(), TAXONOMY)
    assert resumable(tmp_path) and (tmp_path / "vae").exists() and not (tmp_path / "flux-fill").exists()
    monkeypatch.undo()

    lines: list[str] = []
    start = ensure_data(ROOT) / "mini"  # the interrupted run began from nothing, this one goes on from an earlier base
    recipe = pretrain_mini(TOY, tmp_path, Progress(lines.append), TAXONOMY, start)
    assert recipe["start"]["digest"] == directory_digest(start)[0]
    assert [line for line in lines if "kept" in line] == ["pretrain vae: kept from an earlier run"]
    # Loading shows that the part was made again and not half of it taken.
    old, new = (load_pipeline(folder / "flux-fill").transformer.proj_out.weight for folder in (start, tmp_path))
    assert 0 < float((old - new).abs().max()) < 0.01  # two small steps away, not drawn anew
    Judge.load(tmp_path / "judge", TAXONOMY)
    assert {path.name for path in tmp_path.iterdir()} == {"vae", "flux-fill", "judge", "recipe.json"}
    assert json.loads((tmp_path / "recipe.json").read_text())["figures"] == recipe["figures"]
    assert set(recipe["figures"]) == {"vae", "policy", "judge"}

    lines.clear()
    again = pretrain_mini(TOY, tmp_path, Progress(lines.append), TAXONOMY, start)
    assert again["figures"] == recipe["figures"] and len(lines) == 3 and all("kept" in line for line in lines)


def test_no_steps_keep_what_the_start_has(tmp_path):
    start = ensure_data(ROOT) / "mini"
    with pytest.raises(ValueError, match="vae_steps has to be 0"):
        PretrainConfig(vae_steps=1, policy_steps=0)
    kept = TOY.model_copy(update={"vae_steps": 0, "policy_steps": 0, "judge_compare_steps": 0})
    recipe = pretrain_mini(kept, tmp_path, Progress(), TAXONOMY, start)
    assert recipe["figures"] == recipe["start"]["figures"]
    for part in ("flux-fill", "judge"):
        assert directory_digest(tmp_path / part) == directory_digest(start / part)
    with pytest.raises(ConfigError, match="no start"):
        pretrain_mini(kept, tmp_path / "nothing", Progress(), TAXONOMY)
    with pytest.raises(ConfigError, match=r"gone is no mini base: it holds no recipe\.json"):
        pretrain_mini(TOY, tmp_path / "never", Progress(), TAXONOMY, tmp_path / "gone")
    assert not (tmp_path / "never").exists()


def test_requests_cover_every_task_by_its_share():
    drawn = list(requests(TAXONOMY, 400, seed=1))
    removals = sum(prompt == TAXONOMY.task("remove").fixed_prompt for _, _, prompt in drawn)
    assert 0.10 < removals / len(drawn) < 0.35  # p_k is .25, less what goes without prompt or is spoiled
    assert any(prompt.startswith("the word") for _, _, prompt in drawn)


def test_half_of_the_corpus_is_flawed_and_the_original_is_left_alone():
    picture = render_scene(3).image
    before, rng = picture.tobytes(), np.random.default_rng(0)
    drawn = [flawed(picture, rng) for _ in range(300)]
    assert picture.tobytes() == before and all((each.size, each.mode) == (picture.size, "RGB") for each in drawn)
    whole = sum(each.tobytes() == before for each in drawn) / len(drawn)
    assert FLAWS[0] - 0.1 < whole < FLAWS[0] + 0.12  # some displacements are none


def test_the_shipped_autoencoder_reconstructs_as_recorded():
    data = ensure_data(ROOT) / "mini"
    recorded = json.loads((data / "recipe.json").read_text())["figures"]["vae"]["psnr_scenes"]
    torch.manual_seed(0)
    measured = reconstruction_psnr(load_pipeline(data / "flux-fill").vae, base_pictures(64, 0, first_scene=2 * BASE_SCENES))
    assert measured == pytest.approx(recorded, abs=0.3)


def test_rivals_fit_the_prompt_less():
    """In the judge's pictures the sample of a rival and its target follow the prompt less than the request's own."""
    bank = make_bank(load_pipeline(ensure_data(ROOT) / "mini" / "flux-fill"), TAXONOMY, 64, 11, Progress())
    fills = [row for row, task in enumerate(bank.tasks) if task.name == "fill"]
    sample, rival, _, target, rival_target = torch.stack([bank.scores[row]["text_alignment"] for row in fills]).mean(0)
    assert sample > rival + 0.1 and target > rival_target + 0.1
    named = [bool(asked.isfinite().all()) for asked in bank.asked]
    assert named == [task.prompt == "caption" for task in bank.tasks]


def test_the_shipped_judge_reads_colours_in_the_prompt():
    """Of one fill in two colours it prefers the one that is asked for, whichever of the two that is."""
    task, judge = TAXONOMY.task("fill"), Judge.load(ensure_data(ROOT) / "mini" / "judge", TAXONOMY)
    pictures, asked = [], []
    for seed in range(2 * BASE_SCENES, 2 * BASE_SCENES + 60):
        scene = render_scene(seed)
        colour = list(COLOURS)[(list(COLOURS).index(scene.truth["object"]["colour"]) + 1 + seed % 7) % len(COLOURS)]
        pair = scene, render_scene(seed, instead={"colour": colour})
        pictures.append(torch.stack([to_tensor(each.image) for each in pair]))
        asked.append([TAXONOMY.query(task.name, "text_alignment", each.caption) for each in pair])
    first, second = torch.stack(pictures).unbind(1)
    with torch.no_grad():
        own, other = (judge.logit(first, second, [queries[k] for queries in asked]) for k in (0, 1))
    assert (own > 0).float().mean() > 0.8 and (other < 0).float().mean() > 0.8  # the base judge before it: .56 and .44
