"""Ablations at toy size: arms are measured once, an impossible one is recorded, and the page holds what the records hold."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import cast

import pytest
import torch

from benchmarks import ablation_world
from benchmarks.ablation_arms import ARMS
from benchmarks.ablation_world import World
from benchmarks.ablations import chosen, collect, restore, run
from benchmarks.perfect_judge import PerfectlyJudged
from benchmarks.pointwise import PointwiseJudge
from benchmarks.taste import DIMENSION, TASTES, counted, tastes
from infra.progress import Progress
from infra.stores.base import directory_digest
from models.errors import ConfigError
from models.judge import pair_loss
from models.mini.measures import MEASURES, measure
from models.records import Pair, read_rows
from models.taxonomy import Taxonomy
from ops.evaluate import EvaluateConfig
from ops.win_rates import Item
from tests.models.tiny_judge import save_tiny_judge, tiny_queries
from tests.pipelines.toy import write_toy

SEED = 3
MEASURED = [
    "judge/default",
    "judge/pointwise",
    "judge/source_and_mask",
    "policy/static",
    "policy/stop_6_7",
    "policy/only_structure",
    "policy/base_judge",
    "policy/perfect_judge",
    "taste/as_shipped",
    "taste/vivid",
    "taste/muted",
]


def test_arms_are_measured_once_and_collected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rewarding, evaluating = [], []  # judge's folder and the digest of the model; judge's folder and what one dimension is labelled by
    train, evaluate = ablation_world.train_policy, ablation_world.evaluate

    def trained(*shown):
        rewarding.append((shown[2], directory_digest(shown[2] / "model")[0]))
        return train(*shown)

    def evaluated(*shown, **named):
        evaluating.append((shown[3], named["taxonomy"].dimension(DIMENSION).labelled_by))
        return evaluate(*shown, **named)

    monkeypatch.setattr(ablation_world, "train_policy", trained)
    monkeypatch.setattr(ablation_world, "evaluate", evaluated)
    fitted, fit = [], ablation_world.fit_reward  # the pairs of each judge
    monkeypatch.setattr(
        ablation_world, "fit_reward", lambda *shown: fitted.append(read_rows(shown[4] / "pairs.jsonl", Pair)) or fit(*shown)
    )
    asked, log_odds = [], PerfectlyJudged.log_odds
    monkeypatch.setattr(PerfectlyJudged, "log_odds", lambda self, *shown: asked.append(self.deviations) or log_odds(self, *shown))
    preset, work = str(write_toy(tmp_path, reward_model={"steps": 2, "max_validation_pairs": 4})), tmp_path / "work"
    said: list[str] = []
    run(preset, [SEED], MEASURED, work, Progress(said.append))
    (work / str(SEED) / "arms" / "policy" / "ema.draft.json").write_text("")
    record = collect(preset, work, tmp_path / "ablations.json", tmp_path / "ablations.md")
    assert json.loads((tmp_path / "ablations.json").read_text()) == record
    rows = {row["arm"]: row for row in record["rows"]}
    assert list(rows) == MEASURED
    assert "ConfigError" in rows["policy/stop_6_7"]["error"]  # the toy takes three steps
    default, pointwise = (rows[f"judge/{name}"]["figures"] for name in ("default", "pointwise"))
    assert default["n"] == pointwise["n"] == sum(cell["n"] for cell in default["cells"]) > 0
    assert default["n"] >= default["n_one_step"] > 0 and pointwise["order_consistency"] == 1
    assert set(rows["policy/static"]["figures"]["rewarded"]) == {task.name for task in Taxonomy.load().active}
    assert set(map(tuple, rows["policy/only_structure"]["figures"]["rewarded"].values())) == {("structure",)}
    tasks = [[row["task"] for row in rows[f"policy/{name}"]["figures"]["tasks"]] for name in ("static", "only_structure")]
    assert tasks[0] == tasks[1]  # whatever was rewarded, everything is evaluated
    world = World(work / str(SEED), preset, SEED, Progress())
    judges = dict(zip([name for name in MEASURED if not name.startswith("judge") and "error" not in rows[name]], rewarding, strict=True))
    assert judges["policy/base_judge"][1] == directory_digest(world.base_judge)[0]
    on_default = {"policy/static", "policy/only_structure", "policy/perfect_judge", "taste/as_shipped"}
    assert {name for name, (folder, _) in judges.items() if folder == world.reward_model} == on_default
    assert len({folder for folder, _ in judges.values()}) == 1 + len(judges.keys() - on_default)
    shipped = Taxonomy.load().dimension(DIMENSION).labelled_by
    assert evaluating == [(world.reward_model, "vivid" if name.startswith("taste") else shipped) for name in judges]
    assert rows["policy/base_judge"]["figures"]["rewarded"] == rows["policy/static"]["figures"]["rewarded"]
    assert asked and all(set(spread) == set(Taxonomy.load().cells) and min(spread.values()) > 0 for spread in asked)
    assert_tastes_are_opposite(rows, *fitted)
    page = (tmp_path / "ablations.md").read_text()
    assert all((f"`{arm}`" in page) == (arm in MEASURED) for arm in ARMS) and rows["policy/stop_6_7"]["error"] in page
    assert f"{default['mean_accuracy']:.3f}".removeprefix("0") in page
    assert {path.name for path in (tmp_path / "ablations").iterdir()} == {"judge.png", "policy.png", "taste.png"}
    assert not list((work / str(SEED)).glob("draft-*"))

    said.clear()
    run(preset, [SEED], MEASURED, work, Progress(said.append))
    assert len(said) == len(MEASURED) and all("measured already" in line for line in said)

    elsewhere = tmp_path / "elsewhere"  # another machine goes on with what is committed
    assert restore(preset, tmp_path / "ablations.json", elsewhere) == len(MEASURED) - 1  # what failed is tried again
    assert collect(preset, elsewhere, tmp_path / "again.json", tmp_path / "again.md")["rows"] == [
        row for row in record["rows"] if "figures" in row
    ]
    assert restore("mini", tmp_path / "ablations.json", tmp_path / "other") == 0  # of another preset
    assert restore(preset, tmp_path / "none.json", elsewhere) == 0

    with pytest.raises(ConfigError, match="another preset"):
        run("mini", [SEED], MEASURED, work, Progress())


def assert_tastes_are_opposite(rows: dict[str, dict], default: list[Pair], vivid: list[Pair], muted: list[Pair]) -> None:
    """One dimension's labels are a taste and its opposite, all else is as ever, and nothing of it is left behind."""

    def answers(pairs: list[Pair], *, of_taste: bool) -> set[tuple[str, str, str]]:
        return {(pair.dimension, pair.winner, pair.loser) for pair in pairs if (pair.dimension == DIMENSION) == of_taste}

    liked, disliked = answers(vivid, of_taste=True), answers(muted, of_taste=True)
    assert liked and liked == {(dimension, loser, winner) for dimension, winner, loser in disliked}
    assert answers(default, of_taste=False) == answers(vivid, of_taste=False) == answers(muted, of_taste=False)
    assert not set(TASTES) & set(MEASURES)
    sealed = [pair for pair in vivid if pair.split == "test" and pair.dimension == DIMENSION]
    for name in ("as_shipped", "vivid", "muted"):
        figures = rows[f"taste/{name}"]["figures"]
        assert {row["task"] for row in figures["tasks"]} == {task.name for task in Taxonomy.load().active if DIMENSION in task.dimensions}
        assert figures["n"] == sum(row["n"] for row in figures["tasks"]) > 0
        assert figures["more_vivid"] == pytest.approx(fmean(row["more_vivid"] for row in figures["tasks"]))
    assert rows["taste/vivid"]["figures"]["judge"]["n"] == rows["taste/muted"]["figures"]["base_judge"]["n"] == len(sealed)
    shipped = rows["policy/static"]["figures"]
    assert rows["taste/as_shipped"]["figures"]["accepted"]["mean_win_rate"] == shipped["mean_win_rate"]


def test_edits_are_counted_by_the_taste_on_tested_scenes() -> None:
    def item(policy: str, number: int, **changes: object) -> Item:
        chroma = 0.3 if policy == "policy" and number != 2 else 0.2
        row = {"split": "test", "condition_id": f"c{number}", "origin": f"o{number}", "task": "fill", "seed": 0, "policy": policy}
        judged = {"base": {name: [0.5, 0.5] for name in (DIMENSION, "structure")}} if policy == "policy" else {}
        measures = {"measures": {DIMENSION: 1.0, "structure": 1.0}, "confirming_measures": {DIMENSION: chroma, "structure": -chroma}}
        return cast(Item, {**row, "judge": judged, **measures, **changes})

    unmeasured: dict[str, object] = {"measures": {}, "confirming_measures": {}}
    changes = [{}, {"task": "text"}, {"task": "text"}, {"split": "validation"}, unmeasured]
    items = [item(policy, number, **change) for number, change in enumerate(changes) for policy in ("base", "policy")]
    figures = counted(items, EvaluateConfig(resamples=100))
    assert figures["tasks"] == [{"task": "fill", "n": 1, "more_vivid": 1.0}, {"task": "text", "n": 2, "more_vivid": 0.75}]
    assert (figures["more_vivid"], figures["n"]) == (0.875, 3) and figures["lo"] < 0.875 < figures["hi"]
    assert counted(items[-2:], EvaluateConfig())["more_vivid"] is None


def test_blind_evidence_cannot_count_a_taste(tmp_path: Path) -> None:
    world = World(tmp_path / "work", str(write_toy(tmp_path, evaluation={"evidence": "blind"})), SEED, Progress())
    with pytest.raises(ConfigError, match="taste"):
        ARMS["taste/vivid"].measure(world)


def test_a_taste_is_the_chroma_of_what_was_made() -> None:
    target, mask = torch.zeros(3, 8, 8), torch.zeros(1, 8, 8)
    mask[:, :4] = 1
    red, grey = torch.zeros(3, 8, 8), torch.full((3, 8, 8), 0.8)
    red[0, :2] = 0.6  # half of what was made
    red[0, 4:] = 1.0  # outside
    with tastes():
        assert measure("vivid", red, target, mask, {}, "") == pytest.approx(0.3)
        assert measure("muted", red, target, mask, {}, "") == pytest.approx(-0.3)
        assert measure("vivid", grey, target, mask, {}, "") == 0
    with pytest.raises(ConfigError, match="vivid"):
        measure("vivid", red, target, mask, {}, "")


def test_arms_are_chosen_by_patterns() -> None:
    assert chosen(["*"]) == list(ARMS)
    assert chosen(["policy/cap*", "judge/no_prompt"]) == ["judge/no_prompt", "policy/cap_0.5", "policy/cap_0.55", "policy/cap_0.9"]


def test_the_pointwise_judge_is_a_bradley_terry_model(tmp_path: Path) -> None:
    taxonomy = Taxonomy.load()
    judge, queries = PointwiseJudge.load(save_tiny_judge(tmp_path), taxonomy), tiny_queries(taxonomy)[:3]
    first, second, third = (judge.encode(torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(seed))) for seed in range(3))
    with torch.no_grad():
        odds, back = judge.compare(first, second, queries), judge.compare(second, first, queries)
        assert torch.equal(odds, -back) and odds.abs().min() > 0
        assert torch.allclose(odds + judge.compare(second, third, queries), judge.compare(first, third, queries), atol=1e-5)  # one scale
        scores = judge.score(first, queries), judge.score(second, queries)
        assert torch.allclose(pair_loss(odds, back), -(scores[0] - scores[1]).sigmoid().log().mean(), atol=1e-6)
