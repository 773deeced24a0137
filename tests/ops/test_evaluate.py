"""Evaluation through its front door, with the real pipeline and judge at toy size; its figures follow from its records."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from infra.progress import Progress
from models.blind import Edit, blind
from models.clip import Clip
from models.errors import ConfigError, NotEnoughData
from models.flux_fill.loading import load_transformer
from models.images import to_mask, to_tensor
from models.judge import Judge, SecondJudge, Template
from models.mini.acceptance import accept
from models.mini.judge_build import build_judge
from models.mini.measures import measure
from models.mini.scenes import render_scene
from models.records import Candidate, Condition, Pair, read_rows, write_rows
from models.shards import ShardReader, ShardWriter
from models.taxonomy import Taxonomy
from ops.evaluate import EvaluateConfig, evaluate
from ops.gate import GateConfig
from ops.gate_checks import check
from ops.policy_health import preservation
from ops.pretrain_policy import scene_request
from ops.second_opinion import figures
from ops.win_rates import read_items, recompute
from tests.models.tiny import save_tiny_flux
from tests.models.tiny_clip import save_tiny_clip
from tests.models.tiny_judge import save_tiny_judge

TAXONOMY = Taxonomy.load()
CONFIG = EvaluateConfig(steps=2, true_cfg=1.0, max_per_task=2, max_per_task_choose=1, batch_size=4, resamples=100, grid_rows=2)


WITHHELD = ("fill", "extend", "extend_free")  # of a photograph, what was under the mask answers these


def _curated(folder: Path) -> Path:
    """Two test scenes, one test photo and one validation scene for every active task."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows, taken = [], iter(seed for seed in range(500) if render_scene(seed).words)
    with ShardWriter(folder) as shards:
        for task in TAXONOMY.active:
            for split, kind in [("test", "scene"), ("test", "scene"), ("test", "photo"), ("validation", "scene")]:
                seed = next(taken)
                scene = render_scene(seed)
                made = scene_request(task, scene, rng)
                assert made is not None and made.target is not None
                key = f"{task.name}-{seed}"
                row = {"id": key, "source_id": f"s{seed}", "task": task.name, "prompt": made.prompt, "split": split, "kind": kind}
                rows.append(Condition(**row, truth={**scene.truth, "origin": f"o{seed}"} if kind == "scene" else {}))
                shards.add(f"{key}.image", made.image)
                shards.add(f"{key}.mask", made.mask)
                if kind == "scene" or task.name in WITHHELD:
                    shards.add(f"{key}.target", made.target)
    write_rows(folder / "conditions.jsonl", rows)
    return folder


def _pairs(root: Path, curated: Path) -> tuple[Path, Path]:
    """Two flat candidates and one pair for each dimension of each scene."""
    candidates, pairs = root / "candidates", root / "pairs"
    candidates.mkdir()
    pairs.mkdir()
    drawn, judged = [], []
    conditions = [Condition.model_validate_json(line) for line in (curated / "conditions.jsonl").read_text().splitlines()]
    with ShardWriter(candidates) as shards:
        for condition in conditions:
            names = [f"{condition.id}.0", f"{condition.id}.1"]
            for index, name in enumerate(names):
                shards.add(name, Image.new("RGB", (64, 64), ["red", "white"][index]))
                setting = {"seed": index, "steps": 2, "negative_prompt": "", "true_cfg": 1, "guidance_scale": 1, "strength": 1}
                drawn.append(Candidate(id=name, condition_id=condition.id, index=index, scheduler="euler", model_digest="0", **setting))
            for dimension in TAXONOMY.task(condition.task).dimensions:
                what = {"condition_id": condition.id, "task": condition.task, "dimension": dimension, "prompt": condition.prompt}
                judged.append(Pair(**what, split=condition.split, winner=names[0], loser=names[1]))
    write_rows(candidates / "candidates.jsonl", drawn)
    write_rows(pairs / "pairs.jsonl", judged)
    return candidates, pairs


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("world")
    base = save_tiny_flux(root / "base")
    queries = [TAXONOMY.query(task, dimension, "a red circle") for task, dimension in TAXONOMY.cells]
    model, processor = build_judge(queries, hidden=32, layers=1, vision_hidden=32, vision_depth=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # untrained weights hardly see a difference
    Judge(model, processor, TAXONOMY).save(root / "judge" / "model")
    same, other = root / "same", root / "other"
    shutil.copytree(base / "transformer", same / "transformer")
    torch.manual_seed(1)
    moved = load_transformer(base, None, torch.float32)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    moved.save_pretrained(other / "transformer")
    curated = _curated(root / "curated")
    candidates, pairs = _pairs(root, curated)
    return {
        "base": base,
        "judge": root / "judge",
        "same": same,
        "other": other,
        "curated": curated,
        "candidates": candidates,
        "pairs": pairs,
    }


@pytest.fixture(scope="module")
def result(world: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("evaluation")
    metrics = evaluate(
        CONFIG,
        world["base"],
        world["curated"],
        world["judge"],
        {"static": world["same"], "ema": world["other"]},
        out,
        Progress(),
        taxonomy=TAXONOMY,
        production=world["same"],
        candidates=world["candidates"],
        pairs=world["pairs"],
        base_judge=world["judge"],
    )
    return out, metrics


def test_a_policy_equal_to_the_base_ties_everywhere(result: tuple[Path, dict[str, Any]]) -> None:
    static = result[1]["policy"]["static"]
    assert static["mean_win_rate"] == 0.5
    assert {cell["win_rate"] for cell in static["cells"]} == {0.5}
    for figure in ("preservation_psnr", "outside_similarity"):
        assert static[figure] == static[f"base_{figure}"]
        assert result[1]["policy"]["ema"][figure] != static[figure]


def test_every_task_and_cell_is_reported_on_scenes_alone(result: tuple[Path, dict[str, Any]]) -> None:
    ema = result[1]["policy"]["ema"]
    assert [entry["task"] for entry in ema["tasks"]] == ["fill", "text", "extend", "extend_free", "remove"]
    assert [(cell["task"], cell["dimension"]) for cell in ema["cells"]] == list(TAXONOMY.cells)
    assert {entry["n"] for entry in ema["tasks"]} == {2}
    assert ema["n"] == ema["conditions"] == 10 and result[1]["not_evaluated"] == []
    assert {entry["n_without_truth"] for entry in ema["tasks"]} == {1}  # the photograph
    assert ema["mean_lo"] <= ema["mean_win_rate"] <= ema["mean_hi"]
    photos = result[1]["photos"]["ema"]
    assert photos["n"] == 5
    assert not any("win_rate" in cell for cell in photos["cells"])
    same, other = (result[1]["withheld"][mode] for mode in ("static", "ema"))
    assert same["n"] == other["n"] == len(WITHHELD) and same["win_rate"] == 0.5
    assert same["psnr"] == same["base_psnr"] == other["base_psnr"] != other["psnr"]


def test_figures_follow_from_the_records(result: tuple[Path, dict[str, Any]]) -> None:
    out, metrics = result
    items = read_items(out / "items.jsonl")
    settings = {"split": "test", "choose_split": "validation", "tie_tolerance": CONFIG.tie_tolerance, "resamples": CONFIG.resamples}
    again = recompute(items, TAXONOMY, **settings)
    assert again == {name: value for name, value in metrics.items() if name not in ("judge", "sampling")}
    assert metrics["sampling"] == {"steps": 2, "true_cfg": 1.0, "guidance_scale": 1.0, "negative_prompt": "nsfw"}
    assert json.loads((out / "metrics.json").read_text()) == metrics


def test_records_follow_from_the_stored_edits(world: dict[str, Path], result: tuple[Path, dict[str, Any]]) -> None:
    out, _ = result
    edits, curated = ShardReader(out), ShardReader(world["curated"])
    scenes = [item for item in read_items(out / "items.jsonl") if item["measures"] and item["policy"] == "ema"]
    truths = {c["id"]: c["truth"] for c in map(json.loads, (world["curated"] / "conditions.jsonl").read_text().splitlines())}
    known = {c.id: c.origin for c in read_rows(world["curated"] / "conditions.jsonl", Condition)}
    assert all(item["origin"] == known[item["condition_id"]] for item in scenes)
    for item in scenes[:5]:
        edit = to_tensor(edits[f"{item['condition_id']}.{item['seed']}.ema"])
        source, mask = to_tensor(curated[f"{item['condition_id']}.image"]), to_mask(curated[f"{item['condition_id']}.mask"])
        assert torch.equal(edit * (1 - mask), source * (1 - mask))  # pasted into the source
        scored = (edit, to_tensor(curated[f"{item['condition_id']}.target"]), mask, truths[item["condition_id"]], item["prompt"])
        assert set(item["measures"]) == set(item["confirming_measures"]) == set(TAXONOMY.task(item["task"]).dimensions)
        for name, value in item["measures"].items():
            assert accept(TAXONOMY.dimension(name).accepted_by, *scored) == value
            assert measure(TAXONOMY.dimension(name).labelled_by, *scored) == item["confirming_measures"][name]


def test_everyone_gets_the_same_conditions_and_seeds(result: tuple[Path, dict[str, Any]]) -> None:
    items = read_items(result[0] / "items.jsonl")
    keys = {
        name: [(i["condition_id"], i["seed"]) for i in items if i["policy"] == name and i["split"] == "test"]
        for name in ("base", "static", "ema")
    }
    assert keys["base"] == keys["static"] == keys["ema"]
    assert len(set(keys["base"])) == len(keys["base"]) == 15
    assert {item["split"] for item in items if item["policy"] == "production"} == {"test"}
    digests = {item["policy"]: item["policy_digest"] for item in items}
    assert digests["static"] == digests["production"] != digests["ema"]


def test_judge_is_asked_in_both_orders(world: dict[str, Path], result: tuple[Path, dict[str, Any]]) -> None:
    edits, judge = ShardReader(result[0]), Judge.load(world["judge"] / "model", TAXONOMY)
    asked = 0
    for item in read_items(result[0] / "items.jsonl"):
        if item["policy"] != "ema" or item["split"] != "test":
            continue
        theirs, ours = (to_tensor(edits[f"{item['condition_id']}.{item['seed']}.{name}"])[None] for name in ("base", "ema"))
        for dimension, (forward, backward) in item["judge"]["base"].items():
            query = [TAXONOMY.query(item["task"], dimension, item["prompt"])]
            with torch.no_grad():
                assert forward == pytest.approx(judge.p_yes(ours, theirs, query).item(), abs=1e-5)
                assert backward == pytest.approx(judge.p_yes(theirs, ours, query).item(), abs=1e-5)
            asked += abs(forward - backward) > 1e-3
    assert asked > 10  # else the orders could be swapped and nobody would see it


def test_the_judges_own_accuracy_comes_from_the_sealed_split(result: tuple[Path, dict[str, Any]]) -> None:
    judge = result[1]["judge"]
    assert judge["split"] == "test"
    assert judge["n"] == 3 * len(TAXONOMY.cells)
    assert judge["mean_accuracy"] == judge["base_mean_accuracy"]  # the same folder was given as both
    rows = [json.loads(line) for line in (result[0] / "judge-pairs.jsonl").read_text().splitlines()]
    assert {row["judge"] for row in rows} == {"judge", "base"} and len(rows) == 2 * judge["n"]
    assert {row["judge_digest"] for row in rows} == {item["judge_digest"] for item in read_items(result[0] / "items.jsonl")}


def test_pictures_are_small(result: tuple[Path, dict[str, Any]]) -> None:
    pictures = {path.stem: path.stat().st_size for path in (result[0] / "pictures").iterdir()}
    assert set(pictures) == {*(f"grid-{task.name}" for task in TAXONOMY.active), "win-rates", "cells"}
    assert max(pictures.values()) <= 200_000


def test_production_may_be_a_release_one_mode_needs_no_choice_and_a_judge_of_raw_pictures_sees_them(
    world: dict[str, Path], tmp_path: Path
) -> None:
    release = tmp_path / "release"
    shutil.copytree(world["other"] / "transformer", release / "model" / "transformer")
    out = tmp_path / "out"
    out.mkdir()
    judge = tmp_path / "judge"
    shutil.copytree(world["judge"], judge)
    (judge / "metrics.json").write_text('{"paste_source": false}')
    arguments = (world["base"], world["curated"], judge, {"ema": world["other"]}, out, Progress())
    metrics = evaluate(CONFIG.model_copy(update={"max_per_task": 1}), *arguments, taxonomy=TAXONOMY, production=release)
    assert metrics["against_production"]["ema"]["mean_win_rate"] == 0.5
    assert metrics["best_mode"] == "ema" and metrics["chosen_on"] == "test"
    assert "judge" not in metrics
    edits, loaded = ShardReader(out), Judge.load(judge / "model", TAXONOMY)
    item = next(item for item in read_items(out / "items.jsonl") if item["policy"] == "ema")
    dimension, (forward, _) = next(iter(item["judge"]["base"].items()))
    raw = [to_tensor(edits[f"{item['condition_id']}.{item['seed']}.{name}.raw"])[None] for name in ("ema", "base")]
    with torch.no_grad():  # a judge of raw pictures is shown raw pictures
        assert forward == pytest.approx(loaded.p_yes(*raw, [TAXONOMY.query(item["task"], dimension, item["prompt"])]).item(), abs=1e-5)


def test_no_condition_of_the_split_is_an_error(world: dict[str, Path], tmp_path: Path) -> None:
    curated = tmp_path / "curated"
    shutil.copytree(world["curated"], curated)
    lines = [line for line in (curated / "conditions.jsonl").read_text().splitlines() if '"split":"test"' not in line]
    (curated / "conditions.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(NotEnoughData, match="no test condition"):
        evaluate(CONFIG, world["base"], curated, world["judge"], {"ema": world["other"]}, tmp_path, Progress(), taxonomy=TAXONOMY)


@pytest.mark.parametrize(("kept", "truth"), [('"task":"remove"', True), ('"kind":"photo"', False)])
def test_only_tasks_in_the_data_are_gated_and_those_by_ground_truth(world: dict[str, Path], tmp_path: Path, kept: str, truth: bool) -> None:
    """A dataset of one task, and one of photographs only, which says in a sentence what is missing."""
    curated, out = _only(world["curated"], kept, tmp_path / "curated"), tmp_path / "out"
    out.mkdir()
    evaluate(CONFIG, world["base"], curated, world["judge"], {"ema": world["other"]}, out, Progress(), taxonomy=TAXONOMY)
    gates = {gate.name: gate for gate in check("evaluation", out, GateConfig(min_task_lo=0), curated=curated)}
    assert gates["ground_truth"].passed == gates["task_lo"].passed == truth
    if truth:
        assert json.loads((out / "metrics.json").read_text())["not_evaluated"] == ["fill", "text", "extend", "extend_free"]
    else:
        assert "fill, text, extend, extend_free, remove. Only procedural scenes have one" in gates["ground_truth"].description
        assert gates["win_rate"].measure is None and not gates["win_rate"].passed


def _only(curated: Path, kept: str, copy: Path) -> Path:
    """A copy with those conditions alone whose line holds `kept`."""
    shutil.copytree(curated, copy)
    lines = [line for line in (copy / "conditions.jsonl").read_text().splitlines() if kept in line]
    (copy / "conditions.jsonl").write_text("\n".join(lines) + "\n")
    return copy


def test_on_photographs_every_gate_is_measured_under_blind_evidence(world: dict[str, Path], tmp_path: Path) -> None:
    """Targets are not looked at. The records are of the measures that the taxonomy names for it; a preset that asks for truth refuses."""
    curated, out = _only(world["curated"], '"kind":"photo"', tmp_path / "curated"), tmp_path / "out"
    out.mkdir()
    config = CONFIG.model_copy(update={"evidence": "blind"})
    arguments = (world["base"], curated, world["judge"], {"ema": world["other"]}, out, Progress())
    with pytest.raises(ConfigError, match="needs a CLIP checkpoint, for clip_score, object_gone, prompt_followed"):
        evaluate(config, *arguments, taxonomy=TAXONOMY)
    assert not any(out.iterdir())  # known before anything is sampled
    clip = save_tiny_clip(tmp_path / "clip")
    second = save_tiny_judge(tmp_path / "second", seed=5)
    metrics = evaluate(config, *arguments, taxonomy=TAXONOMY, clip=clip, second_judge=second)
    assert metrics["evidence"] == "blind" and metrics["photos"]["ema"] is None
    assert {(row["n"], row["n_without_truth"]) for row in metrics["policy"]["ema"]["tasks"]} == {(1, 0)}

    gates = {gate.name: gate for gate in check("evaluation", out, GateConfig(require_ground_truth=False), curated=curated)}
    assert {name for name, gate in gates.items() if gate.measure is None} == {"sealed_judge_accuracy"}  # no pairs were given
    assert gates["ground_truth"].passed and "not asked" in gates["ground_truth"].description
    assert not {gate.name: gate for gate in check("evaluation", out, GateConfig(), curated=curated)}["ground_truth"].passed

    edits, shards, loaded = ShardReader(out), ShardReader(curated), Clip.load(clip)
    opinions = [json.loads(line) for line in (out / "second-judge.jsonl").read_text().splitlines()]
    assert metrics["second_judge"]["base"]["ema"] == figures(opinions, split="test", confidence=0.95, resamples=100)["base"]["ema"]
    row, other = opinions[0], SecondJudge.load(second, Template.load())
    key = row["condition_id"]
    ours, theirs = (to_tensor(edits[f"{key}.{row['seed']}.{name}"]) for name in ("ema", "base"))
    prompt = next(item["prompt"] for item in read_items(out / "items.jsonl") if item["condition_id"] == key)
    source = to_tensor(shards[f"{key}.image"])
    assert row["p"] == pytest.approx([other.prefers(source, *pair, prompt) for pair in ((ours, theirs), (theirs, ours))])
    for item in read_items(out / "items.jsonl"):
        edit = to_tensor(edits[f"{item['condition_id']}.{item['seed']}.{item['policy']}"])
        source, mask = to_tensor(shards[f"{item['condition_id']}.image"]), to_mask(shards[f"{item['condition_id']}.mask"])
        asked = Edit(edit, source, mask, item["prompt"])
        assert set(item["measures"]) == set(item["confirming_measures"]) == set(TAXONOMY.task(item["task"]).dimensions)
        for name in item["measures"]:
            dimension = TAXONOMY.dimension(name)
            assert blind(dimension.measured_by, asked, loaded) == pytest.approx(item["measures"][name])
            assert blind(dimension.confirmed_by, asked, loaded) == pytest.approx(item["confirming_measures"][name])


def test_preservation_looks_outside_the_mask_only() -> None:
    source, mask = torch.full((3, 8, 8), 0.5), torch.zeros(1, 8, 8)
    mask[:, :4] = 1
    edit = source.clone()
    edit[:, :4] = 1.0
    assert preservation(edit, source, mask) == 100.0
    assert preservation(edit + 0.1 * (1 - mask), source, mask) == pytest.approx(20.0, abs=1e-3)
    assert math.isnan(preservation(edit * math.nan, source, mask))  # ruined, not perfectly kept
