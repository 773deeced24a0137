"""Watching a policy: what is recorded of a checkpoint, and which one is chosen, by the second judge and never by the truth."""

import json

import pytest
import torch

from infra.progress import Progress
from models.adapters import Shadow
from models.flux_fill.loading import load_pipeline
from models.flux_fill.sampler import Sampler
from models.judge import Judge
from models.records import Condition, read_rows
from models.shards import ShardReader
from models.taxonomy import Taxonomy
from ops import policy_watch
from ops.policy_watch import Watch, choose, summary
from ops.probe import CHECKPOINTS, Look, over_optimised
from ops.train_policy import Trainer
from tests.ops.test_train_policy import QUICK, _train, make_parts

TAXONOMY = Taxonomy.load()


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return make_parts(tmp_path_factory.mktemp("parts"))


def look(step: int, *, judge: float, second: float | None, won: float | None, condition: str = "c", blind: float | None = None) -> Look:
    cell = {"task": "remove", "dimension": "removal_quality"}
    said = {"judge": judge, "second": second, "measure_win": won, "blind_win": blind}
    return Look(step=step, condition_id=condition, source_id="s", origin=condition, **cell, **said)


def watch_of(parts, second: bool, conditions: int = 4) -> tuple[Watch, torch.nn.Module]:
    flux, judge, curated = parts
    pipe = load_pipeline(flux)
    rows = [row for row in read_rows(curated / "conditions.jsonl", Condition) if row.split == "validation"][:conditions]
    watch = Watch(
        Sampler(pipe),
        Shadow(dict(pipe.transformer.named_parameters())),
        Judge.load(judge, TAXONOMY),
        Judge.load(judge, TAXONOMY) if second else None,
        ShardReader(curated),
        rows,
        TAXONOMY,
        settings={"steps": 2, "true_cfg": 1.0, "guidance_scale": 1.0},
        negative_prompt="",
        batch_size=2,
        pasted=True,
        enough=0.55,
    )
    return watch, pipe.transformer


def test_the_base_itself_is_neither_better_nor_worse(parts):
    watch, network = watch_of(parts, second=True)
    with torch.no_grad():
        watch.look(network, 5, Progress(), "watch")
    assert {row["step"] for row in watch.rows} == {5}
    assert len(watch.rows) == sum(len(TAXONOMY.task(c.task).dimensions) for c in watch.conditions)
    assert all(row["judge"] == pytest.approx(0.5, abs=1e-4) and row["second"] == pytest.approx(0.5, abs=1e-4) for row in watch.rows)
    assert all(row["measure_win"] in (0.5, None) for row in watch.rows)


def test_a_changed_network_is_compared_with_what_training_started_from(parts):
    watch, network = watch_of(parts, second=False)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3)
        watch.look(network, 1, Progress(), "watch")
    assert any(abs(row["judge"] - 0.5) > 1e-6 for row in watch.rows) and all(row["second"] is None for row in watch.rows)


def test_reliable_measures_look_without_a_target(parts):
    """The scenes of these parts have no target: nothing but these measures and the judges can see them."""
    watch, network = watch_of(parts, second=False, conditions=20)
    with torch.no_grad():
        watch.look(network, 1, Progress(), "watch")
        for parameter in network.parameters():
            parameter.add_(0.3)
        watch.look(network, 2, Progress(), "watch")
    seen = {(row["task"], row["dimension"]) for row in watch.rows if row["blind_win"] is not None}
    assert seen == {cell for cell in TAXONOMY.cells if cell[1] in ("consistency", "legibility", "removal_quality")}
    assert {row["blind_win"] for row in watch.rows if row["step"] == 1} == {0.5, None}
    assert {row["blind_win"] for row in watch.rows if row["step"] == 2} >= {0.0, 1.0}
    assert all(row["measure_win"] is None for row in watch.rows)


def test_a_checkpoint_at_which_the_judge_rose_and_a_measure_fell_is_not_delivered_however_the_second_judge_likes_it():
    """The truth is not asked: it says the opposite here."""
    rows = []
    for step, (judge, second, blind) in {2: (0.6, 0.52, 0.9), 4: (0.9, 0.6, 0.1)}.items():
        rows += [look(step, judge=judge, second=second, won=1 - blind, condition=str(i), blind=float(i < 40 * blind)) for i in range(40)]
    unseen = [{**row, "blind_win": None} for row in rows]
    assert [over_optimised(rows, step) for step in (2, 4)] == [False, True]
    assert not any(over_optimised(unseen, step) for step in (2, 4))
    assert choose(rows, 0.6, [4]) == 2 and choose(rows, 0.6, []) == 4
    assert choose([{**row, "second": None} for row in rows], 0.6, [4]) == 2  # nor without a second judge
    assert choose(rows, 0.6, [2, 4]) == 4  # there is no other


def test_what_was_found_over_optimised_stays_left_out_after_an_interruption(parts, tmp_path, monkeypatch):
    """The probe's verdict is scripted: it finds every checkpoint but the first."""
    monkeypatch.setattr(policy_watch, "over_optimised", lambda rows, step: step > 1)
    config = QUICK.model_copy(update={"iterations": 3, "checkpoint_every": 1})
    stopped = Trainer(config, *parts, TAXONOMY, "static")
    for step in range(2):
        stopped.iterate(step)
        stopped.checkpoint(tmp_path / "checkpoints", step + 1, Progress())
    resumed = Trainer(config, *parts, TAXONOMY, "static")
    assert resumed.resume(tmp_path / "checkpoints") == 2 and resumed.watch.over_optimised == [2]
    metrics = _train(parts, tmp_path / "policy", config)
    assert metrics["over_optimised"] == [2, 3] and metrics["best_step"] == 1


def test_the_second_judge_chooses_and_neither_the_first_nor_the_truth(parts):
    watch, _ = watch_of(parts, second=True)
    said = {2: (0.6, 0.6, 0.0), 4: (0.9, 0.5, 1.0), 6: (0.99, 0.4, 1.0)}
    for step, (judge, second, won) in said.items():
        watch.rows += [look(step, judge=judge, second=second, won=won), look(step, judge=judge, second=0.55, won=won, condition="d")]
    assert watch.best == 2
    assert not watch.stale(0) and not watch.stale(3) and watch.stale(2)
    assert [point["measure_win"] for point in summary(watch.rows)] == [0.0, 1.0, 1.0]


def test_a_cell_won_by_far_does_not_make_up_for_a_lost_one(parts):
    watch, _ = watch_of(parts, second=True)
    for step, cells in {
        2: {"structure": 0.99, "aesthetics": 0.4},
        4: {"structure": 0.56, "aesthetics": 0.5},
        6: {"structure": 0.6},
    }.items():
        watch.rows += [look(step, judge=0.5, second=said, won=None) | {"dimension": name} for name, said in cells.items()]
    watch.rows.append(look(6, judge=0.5, second=0.5, won=None) | {"dimension": "aesthetics"})
    assert watch.best == 4  # by the means it would be 2; 6 is as good, and later


def test_checkpoints_are_seen_with_the_guidance_of_use_and_trained_without(parts, tmp_path):
    """Guidance while watching changes what is seen of a checkpoint, and no weight."""
    seen, weights = [], []
    for guidance in (1.0, 4.0):
        out = tmp_path / str(guidance)
        _train(parts, out, QUICK.model_copy(update={"iterations": 2, "watch_true_cfg": guidance}))
        seen.append([json.loads(line)["judge"] for line in (out / CHECKPOINTS).read_text().splitlines()])
        weights.append((out / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    assert len(seen[0]) == len(seen[1]) and seen[0] != seen[1]


def test_without_a_second_judge_the_last_checkpoint_is_delivered(parts):
    watch, _ = watch_of(parts, second=False)
    watch.rows += [look(2, judge=0.9, second=None, won=None), look(4, judge=0.1, second=None, won=None)]
    assert watch.best == 4 and not watch.stale(1)
    assert summary(watch.rows)[0] == {"step": 2, "judge": 1.0, "second": None, "measure_win": None}


def test_a_run_stops_when_nothing_gets_better_and_delivers_the_best(parts, tmp_path, monkeypatch):
    """What the second judge says is scripted: it likes step 2 best."""
    liked = {1: 4, 2: 5, 3: 3, 4: 6}  # of ten comparisons
    kept: dict[int, dict[str, torch.Tensor]] = {}

    def scripted(self, policy, step, progress, label):
        kept[step] = {name: value.detach().clone() for name, value in policy.state_dict().items()}
        self.second = self.judge
        self.rows += [look(step, judge=0.9, second=0.9 if i < liked[step] else 0.1, won=None, condition=str(i)) for i in range(10)]

    monkeypatch.setattr(Watch, "look", scripted)
    config = QUICK.model_copy(update={"checkpoint_every": 1, "patience": 1})
    metrics = _train(parts, tmp_path / "policy", config)
    best = metrics["best_step"]
    assert best == 2 and metrics["steps"] == 3  # one checkpoint that is no better ends the run
    stored = load_pipeline(parts[0]).transformer.from_pretrained(tmp_path / "policy" / "transformer").state_dict()
    assert all(torch.equal(stored[name], kept[best][name]) for name in stored)
    rows = [json.loads(line) for line in (tmp_path / "policy" / "checkpoints.jsonl").read_text().splitlines()]
    assert {row["step"] for row in rows} == {1, 2, 3}
