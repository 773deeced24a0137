"""A failed gate stops the run it belongs to, every later run, and automation."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from assets.chain import POLICY
from assets.refs import materialised
from infra.workspace import Workspace
from ops.gate import evidence_for
from ops.policy_config import TrainPolicyConfig
from ops.train_policy import train_policy
from pipelines.config import load_settings
from pipelines.definitions import definitions
from pipelines.jobs import ALL_MODES
from tests.pipelines.conftest import Finished
from tests.pipelines.test_interruptions import opened

BELOW_POLICY = {"evaluation", "onnx", "engine", "release"}
ROWS = {"source_images": {"n_scenes": 24, "crops_per_photo": 0}, "curated_dataset": {"clusters": 2, "subset": 24}}


def materialize(defs: dg.Definitions, instance: dg.DagsterInstance, *names: str) -> dg.ExecuteInProcessResult:
    keys = [dg.AssetKey(name) for name in names]
    job = defs.resolve_implicit_global_asset_job_def()
    tags = ALL_MODES if POLICY.name in names else None
    return job.execute_in_process(instance=instance, asset_selection=keys, tags=tags, raise_on_error=False)


def requested_after(defs: dg.Definitions, instance: dg.DagsterInstance, *names: str) -> tuple[set[str], bool]:
    """What automation would make once `names` have been materialised, and whether that run succeeded."""
    before = dg.evaluate_automation_conditions(defs=defs, instance=instance)
    success = materialize(defs, instance, *names).success
    after = dg.evaluate_automation_conditions(defs=defs, instance=instance, cursor=before.cursor)
    graph = defs.resolve_asset_graph()
    return {key.to_user_string() for key in graph.get_all_asset_keys() if after.get_num_requested(key)}, success


def test_a_failed_gate_stops_this_run_and_the_next(home: Path, toy: Callable[..., Path], instance: dg.DagsterInstance) -> None:
    strict = definitions(load_settings(str(toy(**ROWS, gates={"min_per_split": 1000}))))
    result = materialize(strict, instance, "source_images", "curated_dataset", "candidates")
    evaluation = result.get_asset_check_evaluations()[0]
    assert not result.success and not evaluation.passed
    assert "split_size" in evaluation.description and evaluation.metadata["split_size threshold"].value == 1000
    assert result.asset_materializations_for_node("candidates") == []

    workspace = Workspace.from_env(home)
    curated = workspace.store.versions("curated_dataset")[-1].ref
    evidence = evidence_for(workspace.store, workspace.keys, curated)
    assert evidence is not None and [gate.name for gate in evidence.gates if not gate.passed] == ["split_size"]

    again = materialize(strict, instance, "candidates")
    failure = next(event.step_failure_data.error for event in again.all_events if event.is_step_failure)
    assert not again.success and "A gate refused curated_dataset" in str(failure)


@pytest.mark.parametrize(("least", "goes_on"), [(1, {"candidates", "preferences", "preference_pairs"}), (1000, set())])
def test_automation_goes_on_only_where_the_gate_passed(
    home: Path, toy: Callable[..., Path], instance: dg.DagsterInstance, least: int, goes_on: set[str]
) -> None:
    """It asks for everything down to the next gate in one run, and for nothing below a gate that said no."""
    defs = definitions(load_settings(str(toy(**ROWS, gates={"min_per_split": least}))))
    assert requested_after(defs, instance, "source_images", "curated_dataset") == (goes_on, bool(goes_on))


@pytest.mark.chain
@pytest.mark.parametrize(("unmoved", "goes_on"), [({"ema"}, BELOW_POLICY), ({"static", "ema"}, set())])
def test_automation_goes_on_with_one_healthy_policy(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unmoved: set[str], goes_on: set[str]
) -> None:
    def train(config: TrainPolicyConfig, base: Path, judge: Path, curated: Path, out: Path, *rest: Any, mode: str, **named: Any) -> Any:
        metrics = train_policy(config, base, judge, curated, out, *rest, mode=mode, **named)
        if mode in unmoved:
            shutil.copytree(base / "transformer", out / "transformer", dirs_exist_ok=True)
        return metrics

    monkeypatch.setattr("assets.policy.train_policy", train)
    with opened(finished, tmp_path) as chain:
        sections = {**chain.settings.stages, "policy": {**chain.settings.stages["policy"], "seed": 1}}
        defs = definitions(chain.settings.model_copy(update={"stages": sections}))
        assert requested_after(defs, chain.instance, "policy") == (goes_on, bool(goes_on))
        gates = [evidence_for(chain.store, Workspace(chain.home).keys, ref) for ref in materialised(chain.instance, "policy").values()]
        assert {gate.name.removeprefix("policy-") for gate in gates if gate and not gate.passed} == unmoved


@pytest.mark.chain
def test_automation_stops_where_the_evaluation_refuses(finished: Finished, tmp_path: Path) -> None:
    with opened(finished, tmp_path) as chain:
        strict = {**chain.settings.gates, "min_win_rate": 1.0}
        defs = definitions(chain.settings.model_copy(update={"gates": strict}))
        assert requested_after(defs, chain.instance, "evaluation") == (set(), False)


def test_thresholds_come_from_the_preset(home: Path, toy: Callable[..., Path], instance: dg.DagsterInstance) -> None:
    defs = definitions(load_settings(str(toy(**ROWS, gates={"min_per_split": 2}))))
    result = materialize(defs, instance, "source_images", "curated_dataset")
    evaluation = result.get_asset_check_evaluations()[0]
    assert evaluation.passed and evaluation.metadata["split_leak"].value == 0
    assert evaluation.metadata["split_size threshold"].value == 2
