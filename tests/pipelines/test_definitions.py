"""What Dagster sees: exactly these assets, gates that block, jobs and automation that respect them."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path

import dagster as dg
import pytest
from dagster import validate_run_config

from assets.chain import STAGES
from assets.settings import Settings
from assets.sources import ROOT
from models.errors import ConfigError
from ops.curate import CurateConfig
from pipelines.config import load_settings
from pipelines.definitions import definitions, defs
from pipelines.jobs import ALL_MODES, purgeable

CHAIN = [
    "source_images",
    "curated_dataset",
    "candidates",
    "preferences",
    "preference_pairs",
    "reward_model",
    "policy",
    "evaluation",
    "onnx",
    "engine",
    "release",
]
GATED = ["curated_dataset", "preference_pairs", "reward_model", "policy", "evaluation", "onnx", "engine"]


def names(job: str) -> set[str]:
    return {key.to_user_string() for key in defs.resolve_job_def(job).asset_layer.executable_asset_keys}


def test_the_exact_set_of_assets() -> None:
    assert {key.to_user_string() for key in defs.resolve_asset_graph().get_all_asset_keys()} == set(CHAIN)


def test_every_preset_gives_definitions_that_load() -> None:
    for preset in ("mini", "flux-fill"):
        dg.Definitions.validate_loadable(definitions(load_settings(preset)))


def test_a_section_that_is_no_stage_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("extends: mini\nimages: {n_scenes: 7}\n")
    with pytest.raises(ConfigError, match="images"):
        definitions(load_settings(str(path)))


@pytest.mark.parametrize("section", ["source_images: {n_scenes: -1}", "source_images: {scenes: 1}", "gates: {min_win_rate: 2}"])
def test_a_bad_value_names_its_section(tmp_path: Path, section: str) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(f"extends: mini\n{section}\n")
    with pytest.raises(ConfigError, match=section.split(":")[0]):
        definitions(load_settings(str(path)))


def test_the_launchpad_shows_the_presets_values(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("extends: mini\nsource_images: {n_scenes: 7}\n")
    stage = next(stage for stage in STAGES if stage.name == "source_images")
    run_config = stage.run_config(load_settings(str(path)))()
    assert run_config.n_scenes == 7
    assert run_config.min_size == stage.config().min_size


def test_every_asset_is_described_owned_fresh_and_points_to_its_code() -> None:
    graph = defs.resolve_asset_graph()
    for name in CHAIN:
        node = graph.get(dg.AssetKey(name))
        assert node.description and node.kinds and node.group_name != "default" and node.code_version
        assert list(node.owners) == ["team:editing"]
        assert node.freshness_policy is not None
        files = [Path(reference.file_path) for reference in node.metadata["dagster/code_references"].code_references]
        assert files[0] == ROOT / "assets" / f"{name}.py" and all(file.exists() for file in files)


def test_the_heavy_ones_wait_for_the_gpu() -> None:
    graph = defs.resolve_asset_graph()
    assert {name for name in CHAIN if graph.get(dg.AssetKey(name)).pools == {"gpu"}} == {
        "candidates",
        "reward_model",
        "policy",
        "evaluation",
        "engine",
    }


@pytest.mark.parametrize(
    ("field", "known"),
    [("labelled_by", "edge_agreement"), ("accepted_by", "ssim_agreement"), ("measured_by", "seam_step"), ("confirmed_by", "object_gone")],
)
def test_a_measure_that_is_not_there_is_known_before_anything_runs(tmp_path: Path, field: str, known: str) -> None:
    shipped = ROOT / "models" / "taxonomy" / "taxonomy.yaml"
    assert f"{field}: {known}" in shipped.read_text()
    (tmp_path / "taxonomy.yaml").write_text(shipped.read_text().replace(f"{field}: {known}", f"{field}: {known}s"))
    path = tmp_path / "own.yaml"
    path.write_text(f"extends: mini\ntaxonomy: {tmp_path / 'taxonomy.yaml'}\n")
    with pytest.raises(ConfigError, match=rf"{field} the unknown '{known}s'.* Use one of .*{known}"):
        definitions(load_settings(str(path)))


def test_gates_block_and_automation_respects_them() -> None:
    graph = defs.resolve_asset_graph()
    blocking = {key.asset_key.to_user_string() for key in graph.asset_check_keys if graph.get(key).blocking}
    assert blocking == set(GATED)
    for name in CHAIN:
        label = str(graph.get(dg.AssetKey(name)).automation_condition)
        assert "all_deps_blocking_checks_passed" in label


def test_jobs_hold_what_they_promise() -> None:
    assert names("whole_chain") == set(CHAIN)
    assert names("preferences_onward") == set(CHAIN[3:])
    assert names("policy_onward") == set(CHAIN[6:])


def weekly(settings: Settings, day: int) -> tuple[str, dg.RunRequest]:
    """The job and the request of the tick on a day of January 2026."""
    schedule = definitions(settings).resolve_schedule_def("weekly_retraining")
    at = datetime(2026, 1, day, 3, tzinfo=UTC)
    with dg.instance_for_test() as instance, dg.build_schedule_context(instance=instance, scheduled_execution_time=at) as context:
        (request,) = schedule.evaluate_tick(context).run_requests
    assert schedule.cron_schedule == "0 3 * * 1" and ALL_MODES.items() <= request.tags.items()
    return schedule.job_name, request


def test_the_weekly_schedule_fills_both_policies_and_seals_other_sources_each_week() -> None:
    rounds = []
    for day in (5, 12):
        job, request = weekly(load_settings("mini"), day)
        assert job == "whole_chain" and set(request.run_config["ops"]) == {"curated_dataset"}
        rounds.append(CurateConfig(**request.run_config["ops"]["curated_dataset"]["config"]).rotation)
    assert rounds[1] == rounds[0] + 1
    assert validate_run_config(defs.resolve_job_def("whole_chain"), request.run_config)


def test_where_people_label_the_weekly_schedule_leaves_their_candidates_as_they_are() -> None:
    settings = load_settings("mini").model_copy(update={"stages": {"preferences": {"scripted": False}}})
    job, request = weekly(settings, 5)
    assert job == "preferences_onward" and not request.run_config


def test_no_selection_is_a_string() -> None:
    """Under the ANTLR runtime that DVC pins, parsing one crashes; objects are never parsed."""
    pattern = re.compile(r"(selection|target|asset_selection)\s*=\s*f?[\"']|from_string\(|--select\b")
    found = [path.name for floor in ("assets", "pipelines") for path in (ROOT / floor).glob("*.py") if pattern.search(path.read_text())]
    assert found == ["doctor.py"]  # which explains it


def test_the_purge_keeps_what_the_latest_versions_came_from(instance: dg.DagsterInstance) -> None:
    @dg.asset(name="source_images")
    def made() -> None: ...

    first, second = (dg.materialize([made], instance=instance).run_id for _ in range(2))
    latest = instance.get_latest_materialization_event(dg.AssetKey("source_images"))
    assert latest is not None and latest.run_id == second
    assert purgeable(instance, before=1e12) == [first]
    assert purgeable(instance, before=0) == []


def test_the_purge_keeps_the_latest_verdict_of_a_gate(instance: dg.DagsterInstance) -> None:
    """Of a check that was run again without its asset."""

    @dg.asset(name="curated_dataset")
    def made() -> None: ...

    @dg.asset_check(asset=made, name="gate", blocking=True)
    def gate() -> dg.AssetCheckResult:
        return dg.AssetCheckResult(passed=True)

    first = dg.materialize([made, gate], instance=instance).run_id
    again = [dg.materialize([made, gate], instance=instance, selection=dg.AssetSelection.checks(gate)).run_id for _ in range(2)]
    latest = instance.get_latest_asset_check_evaluation_record(gate.check_key)
    assert latest is not None and latest.run_id == again[1]
    assert first not in again and purgeable(instance, before=1e12) == [again[0]]
