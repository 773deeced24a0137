"""Five sabotages of the chain on the shipped mini weights: each ends at its gate, which says why, and production stays where it is.

    python -m pytest tests/pipelines/test_sabotage.py -s

The control, an honest run of small.yaml, ends promoted. Every sabotage goes on in a copy of its home, Dagster's history included, under
the same thresholds: one step is tampered with behind the chain's back and its stage gets another configuration, so that it is made
anew while what lies before it is reused. Then a separate run of everything below the gate, and automation, are refused too.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import torch
from diffusers import FluxTransformer2DModel

from assets.chain import STAGES
from assets.checks import EVIDENCE
from assets.settings import Settings
from infra.workspace import HOME_VARIABLE, Workspace
from models.records import Condition, Pair, read_rows, write_rows
from ops.train_policy import MODES, Trainer
from pipelines.chain_run import Outcome, run_chain
from pipelines.config import load_settings
from pipelines.definitions import definitions
from pipelines.jobs import ALL_MODES

pytestmark = [pytest.mark.chain, pytest.mark.timeout(1800)]
SMALL = str(Path(__file__).with_name("small.yaml"))
Metrics = dict[str, Any]


@dataclass(frozen=True)
class Chain:
    """A home with its Dagster instance."""

    home: Path
    instance: dg.DagsterInstance

    def run(self, **changed: Any) -> Outcome:
        """The whole chain; `policy={"iterations": 1}` changes that section."""
        return run_chain(preset(**changed), self.instance)

    def metrics(self, name: str) -> Metrics:
        """What the newest version of an artifact measured."""
        store = Workspace.from_env(self.home).store
        return dict(json.loads((store.get(store.versions(name)[-1].ref) / "metrics.json").read_text()))


def preset(**changed: Any) -> Settings:
    settings = load_settings(SMALL)
    return settings.model_copy(
        update={"stages": settings.stages | {stage: settings.stages.get(stage, {}) | section for stage, section in changed.items()}}
    )


def production(home: Path) -> tuple[Any, ...]:
    """Everything that is known of releases, and which one is in production."""
    store = Workspace.from_env(home).store
    return store.stage("release", "production"), store.moves("release"), store.versions("release")


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home of the honest run, which every gate let pass."""
    home = tmp_path_factory.mktemp("control") / "home"
    (home / "dagster").mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patched, dg.instance_for_test(temp_dir=str(home / "dagster")) as instance:
        patched.setenv(HOME_VARIABLE, str(home))
        outcome = Chain(home, instance).run()
    show("control", outcome)
    assert outcome.ending == "promoted", outcome.message
    assert all(row["passed"] for row in outcome.gates)
    return home


@pytest.fixture
def chain(control: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Chain]:
    """A copy of the control's home; afterwards its production is what it was."""
    home = tmp_path / "home"
    shutil.copytree(control, home, symlinks=True)
    monkeypatch.setenv(HOME_VARIABLE, str(home))
    with dg.instance_for_test(temp_dir=str(home / "dagster")) as instance:
        yield Chain(home, instance)
    assert production(control)[0] is not None
    assert production(home) == production(control)


def show(name: str, outcome: Outcome) -> None:
    """The figures, for whoever runs with -s."""
    print(f"\n{name}: {outcome.ending}, {outcome.message}\n  seconds {outcome.seconds}")
    for row in outcome.gates:
        print(f"  {row['artifact']} {row['name']} {row['measure']} against {row['threshold']}: {'passed' if row['passed'] else 'FAILED'}")


def tamper(monkeypatch: pytest.MonkeyPatch, chain: Chain, op: str, change: Callable[[Path], None]) -> None:
    """Let `change` loose on the output folder of an op, named as the asset imports it, after every call."""
    module, name = op.rsplit(".", 1)
    original = getattr(__import__(module, fromlist=[name]), name)

    def wrapped(*arguments: Any, **named: Any) -> Metrics:
        metrics: Metrics = original(*arguments, **named)
        change(next(each for each in arguments if isinstance(each, Path) and each.parent == chain.home / "tmp"))
        return metrics

    monkeypatch.setattr(op, wrapped)


def refused(chain: Chain, stage: str, **changed: Any) -> tuple[Outcome, dict[tuple[str, str], float | None]]:
    """Run the chain with `stage`'s section changed: its gate refuses, a later run and automation do not walk past it.

    Returns the outcome and what the failed gates measured, by artifact and gate.
    """
    settings = preset(**changed)
    defs = definitions(settings)
    before = dg.evaluate_automation_conditions(defs=defs, instance=chain.instance)
    outcome = run_chain(settings, chain.instance)
    show(stage, outcome)
    assert outcome.ending == "refused" and outcome.message.startswith(f"{stage}: "), outcome.message
    names = [each.name for each in STAGES]
    above = STAGES[: names.index(stage) + 1]
    assert set(outcome.artifacts) == {name for each in above for name in each.artifacts}
    made = {name for each in above if each.name in changed or each.name == stage for name in each.artifacts}
    assert made.isdisjoint(outcome.reused) and set(outcome.artifacts) - made >= set(outcome.reused)

    after = dg.evaluate_automation_conditions(defs=defs, instance=chain.instance, cursor=before.cursor)
    assert after.total_requested == 0
    again = defs.resolve_implicit_global_asset_job_def().execute_in_process(
        instance=chain.instance, asset_selection=[dg.AssetKey(name) for name in names[len(above) :]], raise_on_error=False
    )
    said = [str(event.step_failure_data.error) for event in again.all_events if event.is_step_failure]
    assert any(f"A gate refused {stage}" in each for each in said), said
    assert not again.success and not again.get_asset_materialization_events()
    return outcome, {(row["artifact"], row["name"]): row["measure"] for row in outcome.gates if not row["passed"]}


def test_a_source_in_two_splits_ends_at_split_leak(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    leaked: list[str] = []

    def leak(out: Path) -> None:
        rows = read_rows(out / "conditions.jsonl", Condition)
        trained = next(row for row in rows if row.split == "train")
        tested = next(row for row in rows if row.split == "test")
        leaked.append(trained.source_id)
        write_rows(
            out / "conditions.jsonl", [row.model_copy(update={"source_id": trained.source_id}) if row is tested else row for row in rows]
        )

    tamper(monkeypatch, chain, "assets.curated_dataset.curate", leak)
    outcome, failed = refused(chain, "curated_dataset", curated_dataset={"seed": 1})
    assert failed == {("curated_dataset", "split_leak"): 1}
    assert "split_leak: measured 1, threshold 0" in outcome.message and leaked[0] in outcome.message


def test_a_judge_of_shuffled_labels_ends_at_judge_accuracy(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    """The honest judge passed on as many pairs; the two intervals are apart, so neither verdict is luck."""

    def shuffle(out: Path) -> None:
        rows, coin = read_rows(out / "pairs.jsonl", Pair), random.Random(0)
        swapped = [row.model_copy(update={"winner": row.loser, "loser": row.winner}) for row in rows]
        write_rows(out / "pairs.jsonl", [coin.choice(both) for both in zip(rows, swapped, strict=True)])

    honest = chain.metrics("reward_model")
    tamper(monkeypatch, chain, "assets.preference_pairs.make_pairs", shuffle)
    outcome, failed = refused(chain, "reward_model", preference_pairs={"drop_contradictions": False})
    told = chain.metrics("reward_model")
    assert ("reward_model", "judge_accuracy") in failed  # it may contradict itself too, which judge_order sees
    assert "judge_accuracy: measured" in outcome.message
    assert [told[n] for n in ("pairs_train", "pairs_validation")] == [honest[n] for n in ("pairs_train", "pairs_validation")]
    assert told["hi"] < honest["lo"], (told["mean_accuracy"], honest["mean_accuracy"])


def random_weights(like: FluxTransformer2DModel) -> FluxTransformer2DModel:
    torch.manual_seed(0)
    made: FluxTransformer2DModel = FluxTransformer2DModel.from_config(like.config)
    return made


def deliver_random_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every training ends in a network that has learned nothing, and health is measured on that."""
    original = Trainer.finish

    def finish(trainer: Trainer, *arguments: Any) -> Metrics:
        for name, value in random_weights(trainer.policy).named_parameters():
            trainer.best.values[name].copy_(value.detach())
        return original(trainer, *arguments)

    monkeypatch.setattr(Trainer, "finish", finish)


def test_random_weights_in_both_modes_end_at_the_policy_gate(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    deliver_random_weights(monkeypatch)
    outcome, failed = refused(chain, "policy", policy={"iterations": 1})
    assert failed.keys() == {(f"policy-{mode}", "policy_preserved") for mode in MODES}
    for mode in MODES:
        assert f"policy-{mode} did not pass policy_preserved" in outcome.message
        assert (failed[f"policy-{mode}", "policy_preserved"] or 0) > 5  # dB


def test_random_weights_in_one_mode_leave_the_chain_to_the_other(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mode that is not in production is trained again by itself; its random weights are measured, refused and left out."""
    healthy = chain.metrics("release")["mode"]
    ruined = next(mode for mode in MODES if mode != healthy)
    deliver_random_weights(monkeypatch)
    result = (
        definitions(preset(policy={"iterations": 1}))
        .resolve_implicit_global_asset_job_def()
        .execute_in_process(
            instance=chain.instance,
            asset_selection=[dg.AssetKey("policy"), dg.AssetKey("evaluation")],
            tags=dict.fromkeys(ALL_MODES, ruined),
            raise_on_error=False,
        )
    )
    checks = {check.asset_key.path[-1]: check for check in result.get_asset_check_evaluations()}
    rows = checks["policy"].metadata[EVIDENCE].data
    assert {(row["artifact"], row["name"]) for row in rows if not row["passed"]} == {(f"policy-{ruined}", "policy_preserved")}
    assert checks["policy"].passed and checks["evaluation"].passed and result.success
    figures = chain.metrics("evaluation")
    assert figures["best_mode"] == healthy and figures["policy"].keys() == {healthy}


def test_weights_swapped_after_health_was_measured_end_at_the_evaluation(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    """The policy gate reads what training measured and passes; the evaluation measures again."""

    def swap(out: Path) -> None:
        random_weights(FluxTransformer2DModel.from_pretrained(out / "transformer")).save_pretrained(out / "transformer")

    tamper(monkeypatch, chain, "assets.policy.train_policy", swap)
    few = {"max_per_task": 8, "max_per_task_choose": 2}  # enough to lose everything by
    outcome, failed = refused(chain, "evaluation", policy={"iterations": 1}, evaluation=few)
    assert all(row["passed"] for row in outcome.gates if row["artifact"].startswith("policy-"))
    assert {artifact for artifact, _ in failed} == {"evaluation"}
    gates = {name for _, name in failed}
    assert gates >= {"win_rate", "win_rate_lo", "task_lo", "evaluation_preserved", "not_below_production"}
    assert all(f"{name}: measured" in outcome.message for name in gates)


def test_a_cut_onnx_file_ends_at_onnx_valid(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(out: Path) -> None:
        path = out / "transformer.onnx"
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    tamper(monkeypatch, chain, "assets.onnx.export_onnx", cut)
    outcome, failed = refused(chain, "onnx", onnx={"seed": 1})
    assert failed == {("onnx", "onnx_valid"): 0}
    assert "transformer.onnx is not a usable ONNX file" in outcome.message
