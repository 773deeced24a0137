"""Presets: names, files, inheritance, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from assets.settings import thresholds
from models.errors import ConfigError
from models.taxonomy import Taxonomy
from ops.curate import CurateConfig
from ops.evaluate import EvaluateConfig
from ops.export_onnx import OnnxConfig
from ops.fit_reward import FitRewardConfig
from ops.gate import GateConfig
from ops.policy_config import TrainPolicyConfig
from ops.statistics import sample_size
from pipelines.config import load_settings


def write(folder: Path, text: str) -> str:
    path = folder / "own.yaml"
    path.write_text(text)
    return str(path)


def test_shipped_presets_load_and_only_mini_promotes_by_itself() -> None:
    assert load_settings("mini").auto_promote and not load_settings("flux-fill").auto_promote


def test_full_size_resolves_to_the_papers_values() -> None:
    settings = load_settings("flux-fill")
    policy = TrainPolicyConfig(**settings.stages["policy"])
    assert (policy.batch_size, policy.learning_rate) == (8, 1e-5)
    judge = FitRewardConfig(**settings.stages["reward_model"])
    assert (judge.batch_size, judge.learning_rate) == (16, 1e-6)
    evaluation = EvaluateConfig(**settings.stages["evaluation"])
    demos = (evaluation.steps, evaluation.true_cfg, evaluation.guidance_scale, evaluation.negative_prompt)
    assert demos == (50, 4.0, 1.0, "nsfw")


@pytest.mark.parametrize("preset", ["mini", "bench", "ablations", "flux-fill"])
def test_checkpoints_are_compared_with_the_guidance_of_the_evaluation(preset: str) -> None:
    stages = load_settings(preset).stages
    policy, evaluation = TrainPolicyConfig(**stages["policy"]), EvaluateConfig(**stages["evaluation"])
    assert (policy.watch_true_cfg, policy.guidance_scale) == (evaluation.true_cfg, evaluation.guidance_scale)
    assert policy.negative_prompt == evaluation.negative_prompt


def test_full_size_tests_enough_for_its_own_gates() -> None:
    """At the largest spread of a cell that a default run has had, all 17 of which have to pass (docs/statistics.md)."""
    settings = load_settings("flux-fill")
    evaluation, lowest = EvaluateConfig(**settings.stages["evaluation"]), thresholds(settings).min_cell_lo
    assert lowest is not None and evaluation.max_per_task <= CurateConfig(**settings.stages["curated_dataset"]).test_per_task
    assert evaluation.max_per_task >= sample_size(0.487, 0.5 - lowest, power=0.8 ** (1 / len(Taxonomy.load().cells)))


def test_only_a_preset_of_blind_evidence_does_without_ground_truth(tmp_path: Path) -> None:
    assert thresholds(load_settings("mini")).require_ground_truth and not thresholds(load_settings("flux-fill")).require_ground_truth
    own = write(tmp_path, "extends: mini\nevaluation: {evidence: blind}\n")
    assert not thresholds(load_settings(own)).require_ground_truth
    strict = write(tmp_path, "extends: flux-fill\ngates: {require_ground_truth: true}\n")
    assert thresholds(load_settings(strict)).require_ground_truth


def test_half_precision_has_a_tolerance_of_its_own() -> None:
    settings = load_settings("flux-fill")
    assert OnnxConfig(**settings.stages["onnx"]).dtype == "float16"
    assert thresholds(settings).max_onnx_error > GateConfig().max_onnx_error


def test_the_environment_chooses_and_an_argument_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEREWARD_PRESET", "flux-fill")
    assert load_settings().preset == "flux-fill"
    assert load_settings("mini").preset == "mini"


def test_a_file_extends_a_preset_section_by_section(tmp_path: Path) -> None:
    mini = load_settings("mini")
    own = load_settings(write(tmp_path, "extends: mini\nsource_images: {n_scenes: 7}\ngates: {min_win_rate: 0.9}\n"))
    assert own.flux == mini.flux and own.auto_promote == mini.auto_promote
    assert own.stages["source_images"] == {**mini.stages.get("source_images", {}), "n_scenes": 7}
    assert own.gates == {**mini.gates, "min_win_rate": 0.9}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("threads: 0\nmodels: {flux: a, judge: b}\n", "threads"),
        ("models: {flux: a}\n", "judge"),
        ("models: {flux: a, judge: b, rival: c}\n", "rival"),
        ("- a\n- b\n", "own.yaml"),
        ("models: [", "own.yaml"),
    ],
)
def test_a_bad_file_is_named_with_the_field(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        load_settings(write(tmp_path, text))


def test_an_unknown_name_lists_the_presets() -> None:
    with pytest.raises(ConfigError, match="flux-fill, mini"):
        load_settings("maxi")


@pytest.mark.parametrize("url", ["ftp://host/hook", "https://kim:planted-8d1f@host/hook", "host/hook"])
def test_a_webhook_holds_no_credentials(tmp_path: Path, url: str) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(f"extends: mini\nwebhook: {url}\n")
    with pytest.raises(ConfigError, match="webhook") as raised:
        load_settings(str(path))
    assert "planted" not in str(raised.value)
