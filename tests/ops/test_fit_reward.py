"""Fitting the judge: it learns, keeps its best weights, reports figures that can be recomputed, and refuses what it must."""

import json
import random
from pathlib import Path

import pytest
import torch
from PIL import Image

from infra.progress import Progress
from infra.stores.base import directory_digest
from models.errors import BadImage, BadManifest, BrokenWeights, NotEnoughData
from models.judge import Judge, pair_loss
from models.records import Condition, Pair, write_rows
from models.shards import ShardWriter
from models.taxonomy import Taxonomy
from ops.fit_reward import FitRewardConfig, fit_reward
from ops.judge_accuracy import PairImages, ask, both_orders, decisions, judge_accuracy, mean_over_cells, origins_of, summarise
from tests.models.tiny_judge import PROMPT, save_tiny_judge

TAXONOMY = Taxonomy.load()
CELLS = (("fill", "structure"), ("remove", "removal_quality"))
QUICK = {"learning_rate": 1e-3, "warmup_steps": 5, "batch_size": 8, "eval_every": 10}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_tiny_judge(tmp_path_factory.mktemp("judge"))


def flat(grey: int, size: tuple[int, int]) -> Image.Image:
    return Image.new("RGB", size, (grey, grey, grey))


def artifacts(
    folder: Path, *, conditions: int = 40, size: tuple[int, int] = (64, 64), swap: float = 0.0, brighter: int = 1, turn: int = 0
) -> tuple[Path, Path, Path]:
    """Conditions with two candidates each; the brighter one wins in every cell, except that a share `swap` is labelled at random.

    `brighter` is the number of the brighter candidate, `turn` shifts the cycle of splits.
    """
    random.seed(0)
    folders = tuple(folder / name for name in ("curated", "candidates", "pairs"))
    for path in folders:
        path.mkdir(parents=True)
    rows, pairs = [], []
    with ShardWriter(folders[0]) as curated, ShardWriter(folders[1]) as candidates:
        for i in range(conditions):
            task, dimension = CELLS[i % 2]
            split = ("train", "train", "validation", "test")[(i // 2 + turn) % 4]
            rows.append(
                Condition(id=f"c{i}", source_id=f"s{i // 2}", task=task, prompt=PROMPT, split=split, kind="scene", truth={}, tags=[])
            )
            mask = Image.new("L", size, 0)
            mask.paste(255, (8, 8, size[0] - 8, size[1] - 8))
            curated.add(f"c{i}.image", flat(random.randrange(256), size))
            curated.add(f"c{i}.mask", mask)
            dark = random.randrange(0, 120)
            greys = [dark, dark + random.randrange(60, 130)]
            for index, grey in enumerate(greys if brighter else reversed(greys)):
                candidates.add(f"c{i}.{index}", flat(grey, size))
            winner = random.randrange(2) if random.random() < swap else brighter
            names = {"winner": f"c{i}.{winner}", "loser": f"c{i}.{1 - winner}"}
            pairs.append(Pair(condition_id=f"c{i}", task=task, dimension=dimension, prompt=PROMPT, split=split, **names))
    write_rows(folders[0] / "conditions.jsonl", rows)
    write_rows(folders[2] / "pairs.jsonl", pairs)
    return folders


def fit(base: Path, folders: tuple[Path, Path, Path], out: Path, progress: Progress | None = None, **values) -> dict:
    out.mkdir()
    earlier = values.pop("earlier", ())
    return fit_reward(FitRewardConfig(**{**QUICK, **values}), base, *folders, out, progress or Progress(), earlier=earlier)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def pairs_of(folder: Path, split: str) -> list[Pair]:
    return [pair for row in lines(folder / "pairs.jsonl") if (pair := Pair(**row)).split == split]


@pytest.fixture(scope="module")
def fitted(base, tmp_path_factory):
    """One run that learns: (artifact folders, out, metrics)."""
    folder = tmp_path_factory.mktemp("fit")
    folders = artifacts(folder, conditions=80)
    return folders, folder / "out", fit(base, folders, folder / "out", steps=50, eval_every=25)


def test_it_learns_and_writes_what_the_contract_names(fitted):
    _, out, metrics = fitted
    assert metrics["mean_accuracy"] >= 0.8 > metrics["base_mean_accuracy"]
    assert metrics["order_consistency"] >= 0.65 and metrics["loss"] < 0.5 < metrics["base_loss"]
    assert metrics == json.loads((out / "metrics.json").read_text())
    assert [(cell["task"], cell["dimension"], cell["n"]) for cell in metrics["cells"]] == [(*cell, 10) for cell in CELLS]
    assert len(metrics["empty_cells"]) == len(TAXONOMY.cells) - 2
    assert all(cell["lo"] <= cell["accuracy"] <= cell["hi"] for cell in metrics["cells"])
    assert metrics["pairs_train"] == 40 and metrics["pairs_validation"] == 20 and metrics["split"] == "validation"
    assert {path.name for path in out.iterdir()} == {"model", "accuracy.jsonl", "curve.jsonl", "metrics.json", "pictures"}
    for name in ("accuracy", "curve"):
        assert 1000 < (out / "pictures" / f"{name}.png").stat().st_size < 200_000
    curve = lines(out / "curve.jsonl")
    assert curve[0]["step"] == 0 and curve[0]["accuracy"] == metrics["base_mean_accuracy"]
    assert max(point["accuracy"] for point in curve) == metrics["mean_accuracy"]


def test_the_saved_model_is_the_best_one_and_every_figure_can_be_recomputed(fitted):
    folders, out, metrics = fitted
    rows = lines(out / "accuracy.jsonl")
    found = judge_accuracy(
        Judge.load(out / "model", TAXONOMY), TAXONOMY, pairs_of(folders[2], "validation"), *folders[:2], batch_size=7, progress=Progress()
    )
    for before, after in zip(rows, found["rows"], strict=True):
        assert after["winner"] == before["winner"] and after["p_winner_first"] == pytest.approx(before["p_winner_first"], abs=1e-5)
    for name in ("mean_accuracy", "lo", "hi", "order_consistency", "n"):
        assert found[name] == pytest.approx(metrics["pairs_validation"] if name == "n" else metrics[name])
    for prefix, key in (("", "accuracy"), ("base_", "base_accuracy")):
        for cell in metrics["cells"]:
            asked = [row for row in rows if (row["task"], row["dimension"]) == (cell["task"], cell["dimension"])]
            right = [(row[f"{prefix}p_winner_first"] > 0.5) + (row[f"{prefix}p_loser_first"] < 0.5) for row in asked]
            assert sum(right) / 2 / len(right) == pytest.approx(cell[key])


def test_the_sealed_test_split_confirms_it(fitted):
    folders, out, _ = fitted
    judge = Judge.load(out / "model", TAXONOMY)
    found = judge_accuracy(judge, TAXONOMY, pairs_of(folders[2], "test"), *folders[:2], batch_size=8, progress=Progress())
    assert found["mean_accuracy"] > 0.75


def test_shuffled_labels_teach_nothing(base, tmp_path):
    """On sealed pairs the judge of true labels is better than the one of shuffled labels beyond both intervals."""
    sealed = {}
    for name, swap in (("true", 0.0), ("shuffled", 1.0)):
        folders = artifacts(tmp_path / name, conditions=160, swap=swap)
        fit(base, folders, tmp_path / name / "out", steps=50, eval_every=25)
        judge, pairs = Judge.load(tmp_path / name / "out", TAXONOMY), pairs_of(folders[2], "test")
        sealed[name] = judge_accuracy(judge, TAXONOMY, pairs, *folders[:2], batch_size=8, progress=Progress())
    assert sealed["true"]["lo"] > sealed["shuffled"]["hi"]


def test_the_same_seed_gives_the_same_artifact(base, tmp_path):
    folders = artifacts(tmp_path, conditions=16)
    for name in ("a", "b"):
        fit(base, folders, tmp_path / name, steps=2, eval_every=1)
    fit(base, folders, tmp_path / "c", steps=2, eval_every=1, seed=1)
    assert directory_digest(tmp_path / "a") == directory_digest(tmp_path / "b") != directory_digest(tmp_path / "c")


def test_lora_is_merged_and_names_no_path(base, tmp_path):
    folders = artifacts(tmp_path)
    metrics = fit(base, folders, tmp_path / "out", steps=20, lora_rank=4, lora_alpha=8, learning_rate=1e-2)
    assert metrics["best_step"] > 0 and metrics["loss"] < metrics["base_loss"]
    judge = Judge.load(tmp_path / "out" / "model", TAXONOMY)
    pairs = pairs_of(folders[2], "validation")
    winner_first, _ = ask(judge, TAXONOMY, PairImages(*folders[:2]), pairs, batch_size=8, progress=Progress())
    expected = [row["p_winner_first"] for row in lines(tmp_path / "out" / "accuracy.jsonl")]
    assert winner_first.sigmoid().tolist() == pytest.approx(expected, abs=1e-4)
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").exists()
    for path in (tmp_path / "out").rglob("*"):
        assert path.is_dir() or str(tmp_path.parent).encode() not in path.read_bytes(), path


def test_figures_of_a_rounded_judge_are_those_of_what_is_stored(base, tmp_path):
    """Merged into bfloat16, a LoRA is rounded: what is reported must be asked of the merged weights."""
    folders = artifacts(tmp_path)
    metrics = fit(base, folders, tmp_path / "out", steps=20, lora_rank=4, lora_alpha=8, learning_rate=1e-2, dtype="bfloat16")
    assert metrics["best_step"] > 0
    judge, pairs = Judge.load(tmp_path / "out", TAXONOMY, torch.bfloat16), pairs_of(folders[2], "validation")
    odds = ask(judge, TAXONOMY, PairImages(*folders[:2]), pairs, batch_size=QUICK["batch_size"], progress=Progress())
    rows = lines(tmp_path / "out" / "accuracy.jsonl")
    assert odds[0].sigmoid().tolist() == pytest.approx([row["p_winner_first"] for row in rows], abs=1e-6)
    assert metrics["mean_accuracy"] == pytest.approx(mean_over_cells(pairs, decisions(*odds)[0]))


def test_gradients_of_micro_batches_add_up(base, tmp_path):
    folders = artifacts(tmp_path, conditions=16)
    for name, size in (("whole", 0), ("parts", 3)):
        fit(base, folders, tmp_path / name, steps=2, eval_every=1, micro_batch=size)
    whole, parts = (lines(tmp_path / name / "curve.jsonl") for name in ("whole", "parts"))
    for a, b in zip(whole, parts, strict=True):
        assert a["validation_loss"] == pytest.approx(b["validation_loss"], abs=1e-4)


def test_every_pair_of_two_rounds_weighs_alike(fitted, tmp_path):
    _, start, _ = fitted  # to which pairs differ: those of `before` are labelled at random
    now, before = artifacts(tmp_path / "now", conditions=16), artifacts(tmp_path / "before", conditions=8, swap=1.0)  # 8 pairs and 4
    curve = []
    for name, size in (("whole", 0), ("parts", 3)):
        fit(start, now, tmp_path / name, steps=1, eval_every=1, batch_size=12, micro_batch=size, earlier=[before])
        curve.append(lines(tmp_path / name / "curve.jsonl")[1])
    judge = Judge.load(start, TAXONOMY)
    losses = [
        pair_loss(*ask(judge, TAXONOMY, PairImages(*each[:2]), [pair], batch_size=1, progress=Progress())).item()
        for each in (now, before)
        for pair in pairs_of(each[2], "train")
    ]
    assert len(losses) == 12 and abs(sum(losses[:8]) / 8 - sum(losses[8:]) / 4) > 0.02  # else rounds that weigh alike would pass
    for point in curve:
        assert point["loss"] == pytest.approx(sum(losses) / 12, abs=1e-4)
    assert curve[0]["validation_loss"] == pytest.approx(curve[1]["validation_loss"], abs=1e-4)


def test_checkpointing_changes_nothing(base, tmp_path):
    folders = artifacts(tmp_path, conditions=16)
    plain = fit(base, folders, tmp_path / "plain", steps=2)
    saving = fit(base, folders, tmp_path / "saving", steps=2, gradient_checkpointing=True)
    assert plain["loss"] == pytest.approx(saving["loss"], abs=1e-5)


def test_it_stops_early_and_a_base_that_is_never_beaten_is_kept(base, tmp_path):
    folders = artifacts(tmp_path, conditions=16)
    metrics = fit(base, folders, tmp_path / "out", steps=100, eval_every=1, patience=3, learning_rate=1e-12)
    assert metrics["steps"] < 100
    assert metrics["mean_accuracy"] == metrics["base_mean_accuracy"]


def test_the_source_hides_what_lies_outside_the_mask(tmp_path):
    curated, candidates, pairs = artifacts(tmp_path, conditions=8)
    pair = pairs_of(pairs, "train")[0]
    pasted, raw = PairImages(curated, candidates)(pair, pair.winner), PairImages(curated, candidates, paste_source=False)(pair, pair.winner)
    assert torch.equal(pasted[:, 8:56, 8:56], raw[:, 8:56, 8:56])
    assert not torch.equal(pasted[:, :8], raw[:, :8]) and len(raw.unique()) == 1


def test_pairs_of_several_sizes_make_one_batch(base, tmp_path):
    small, large = artifacts(tmp_path / "small", conditions=4), artifacts(tmp_path / "large", conditions=4, size=(96, 48))
    judge = Judge.load(base, TAXONOMY)
    pools = {name: PairImages(*folders[:2]) for name, folders in (("c0", small), ("c1", large), ("c2", small), ("c3", large))}
    pairs = [Pair(**row) for row in lines(small[2] / "pairs.jsonl")]

    def mixed(pair: Pair, candidate: str) -> torch.Tensor:
        return pools[pair.condition_id](pair, candidate)

    with torch.no_grad():
        together = both_orders(judge, TAXONOMY, mixed, pairs)  # type: ignore[arg-type]
        alone = [both_orders(judge, TAXONOMY, mixed, [pair]) for pair in pairs]  # type: ignore[arg-type]
    for side in (0, 1):
        torch.testing.assert_close(together[side], torch.cat([odds[side] for odds in alone]), rtol=0, atol=1e-5)


def test_decisions_count_both_orders():
    winner_first, loser_first = torch.tensor([2.0, 2.0, -1.0, 0.0]), torch.tensor([-1.0, 3.0, 1.0, 0.0])
    assert decisions(winner_first, loser_first) == ([1.0, 0.5, 0.0, 0.5], [1.0, 0.0, 1.0, 1.0])


def test_means_over_cells_are_unweighted():
    def pair(i: int, cell: tuple[str, str]) -> Pair:
        return Pair(condition_id=f"c{i}", task=cell[0], dimension=cell[1], prompt="", split="test", winner="a", loser="b")

    pairs = [pair(i, CELLS[0]) for i in range(9)] + [pair(9, CELLS[1])]
    odds = torch.tensor([1.0] * 9 + [-1.0])
    second_at_last = torch.full((10,), -1.0)  # the last pair's second image in both orders, all other pairs consistent
    assert summarise(TAXONOMY, pairs, [f"s{i}" for i in range(10)], odds, second_at_last)["order_consistency"] == 0.5
    found = summarise(TAXONOMY, pairs, [f"s{i}" for i in range(10)], odds, -odds)
    assert (
        found["order_consistency"] == 1.0
        and found["mean_accuracy"] == 0.5
        and found["n"] == 10
        and [cell["accuracy"] for cell in found["cells"]] == [1.0, 0.0]
    )


def test_without_validation_pairs_there_is_nothing_to_choose_by(base, tmp_path):
    folders = artifacts(tmp_path, conditions=4)
    with pytest.raises(NotEnoughData, match="validation"):
        fit(base, folders, tmp_path / "out", steps=1)


def test_pairs_of_another_dataset_are_refused(base, tmp_path):
    folders, others = artifacts(tmp_path / "a", conditions=16), artifacts(tmp_path / "b", conditions=4)
    with pytest.raises(BadManifest, match="conditions that"):
        fit(base, (others[0], *folders[1:]), tmp_path / "out", steps=1)
    sizes = artifacts(tmp_path / "c", conditions=16, size=(80, 64))
    with pytest.raises(BadImage, match=r"\(64, 80\)"):
        fit(base, (sizes[0], *folders[1:]), tmp_path / "out2", steps=1)
    assert len(origins_of(folders[0], pairs_of(folders[2], "train"))) == 8


def test_an_interrupted_fit_leaves_its_inputs_as_they_were(base, tmp_path):
    folders = artifacts(tmp_path, conditions=16)
    before = [directory_digest(path) for path in (base, *folders)]

    def interrupt(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(base, folders, tmp_path / "out", Progress(interrupt), steps=2)
    assert [directory_digest(path) for path in (base, *folders)] == before
    assert not list((tmp_path / "out").iterdir())


def test_a_base_judge_without_finite_answers_is_broken(base, tmp_path):
    judge = Judge.load(base, TAXONOMY)
    with torch.no_grad():
        judge.model.lm_head.weight.fill_(float("nan"))
    judge.save(tmp_path / "judge")
    with pytest.raises(BrokenWeights, match="not finite"):
        fit(tmp_path / "judge", artifacts(tmp_path, conditions=16), tmp_path / "out", steps=1)


def test_pairs_of_crops_of_one_photograph_are_one_draw(tmp_path):
    curated, _, pairs = artifacts(tmp_path, conditions=16)
    rows = [json.loads(line) for line in (curated / "conditions.jsonl").read_text().splitlines()]
    for row in rows[:8]:
        row["truth"] = {"origin": "photo"}
    (curated / "conditions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = pairs_of(pairs, "train")
    known = {row["id"]: "photo" if row in rows[:8] else row["source_id"] for row in rows}
    assert origins_of(curated, found) == [known[pair.condition_id] for pair in found]
    assert "photo" in known.values() and len(set(known.values())) == 5


def test_the_second_judge_is_fitted_on_other_source_images(base, tmp_path):
    folders = artifacts(tmp_path / "data")
    metrics = fit(base, folders, tmp_path / "both", steps=10, second_share=0.4)
    alone = fit(base, folders, tmp_path / "alone", steps=10)
    assert metrics["pairs_train"] + metrics["second"]["pairs_train"] == alone["pairs_train"] and alone["second"] is None
    assert metrics["second"]["pairs_train"] > 0 and not (tmp_path / "alone" / "second").exists()
    judges = [Judge.load(tmp_path / "both" / name, TAXONOMY) for name in ("", "second")]
    first, second = (dict(judge.model.named_parameters()) for judge in judges)
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_a_second_judge_without_labels_is_refused(base, tmp_path):
    with pytest.raises(NotEnoughData, match="do not share out over two judges"):
        fit(base, artifacts(tmp_path / "data", conditions=8), tmp_path / "out", steps=1, second_share=0.001)


def test_labels_of_earlier_rounds_are_fitted_to_with_their_own_pictures(base, fitted, tmp_path):
    folders, _, alone = fitted
    before = artifacts(tmp_path / "before", conditions=80, brighter=0)  # the same names stand for the other pictures
    metrics = fit(base, folders, tmp_path / "out", steps=50, eval_every=25, earlier=[before])
    assert metrics["pairs_train"] == 80 and metrics["pairs_earlier"] == 40 and alone["pairs_earlier"] == 0
    assert metrics["pairs_validation"] == 20 and metrics["mean_accuracy"] >= 0.8  # one half would teach the contrary of the other


@pytest.mark.parametrize("turn", [1, 3])  # what was trained on is tested on now, or validated on
def test_of_earlier_rounds_nothing_is_learned_that_is_held_out_now(base, tmp_path, turn):
    now, before = artifacts(tmp_path / "now"), artifacts(tmp_path / "before", turn=turn)
    metrics = fit(base, now, tmp_path / "out", steps=1, earlier=[before])
    in_training = [{row["source_id"] for row in lines(each[0] / "conditions.jsonl") if row["split"] == "train"} for each in (now, before)]
    kept = in_training[0] & in_training[1]
    assert kept < in_training[1] and metrics["pairs_earlier"] == 2 * len(kept) and metrics["pairs_train"] == 20 + 2 * len(kept)


def test_the_share_of_the_second_judge_is_the_same_images_in_every_round(base, tmp_path):
    now, before = artifacts(tmp_path / "now"), artifacts(tmp_path / "before")
    alone = fit(base, now, tmp_path / "alone", steps=1, second_share=0.4)
    both = fit(base, now, tmp_path / "both", steps=1, second_share=0.4, earlier=[before])
    assert both["pairs_train"] == 2 * alone["pairs_train"] and both["second"]["pairs_train"] == 2 * alone["second"]["pairs_train"]


def test_labels_of_a_cell_that_is_gone_are_left_out(base, tmp_path):
    now, before = artifacts(tmp_path / "now"), artifacts(tmp_path / "before")
    rows = lines(before[2] / "pairs.jsonl")
    for row in rows:
        if row["task"] == "fill":
            row["dimension"] = "removal_quality"  # which fills are not judged on
    (before[2] / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics = fit(base, now, tmp_path / "out", steps=3, earlier=[before])
    assert metrics["pairs_earlier"] == sum(row["task"] == "remove" and row["split"] == "train" for row in rows) == 10
