"""What a preset says, validated: the assets are built from it (pipelines/config.py reads it from YAML)."""

from __future__ import annotations

from typing import Any, TypeVar

import pydantic

from models.config import OpConfig
from models.errors import ConfigError
from ops.approval import Terms
from ops.gate import GateConfig

Config = TypeVar("Config", bound=OpConfig)


class Settings(OpConfig):
    """A resolved preset. `stages` holds one section per stage: the fields of that stage's op configuration."""

    preset: str = pydantic.Field(description="Its name (ours).")
    flux: str = pydantic.Field(
        description="Base pipeline, which a policy starts from and has as its first reference unless its section names another `start`: "
        "a folder in diffusers' layout, or `hub:<id>[@revision]` (paper: FLUX Fill)."
    )
    judge: str = pydantic.Field(description="Base judge: a folder in the hub's layout, or `hub:<id>[@revision]` (paper: Qwen2.5-VL).")
    store: str = pydantic.Field(
        "dvc", description="Where versions are kept: `dvc`, `dvc+s3://bucket/prefix`, `dvc+/folder` or `lakefs://repository` (ours)."
    )
    clip: str = pydantic.Field(
        "", description="CLIP checkpoint that blind evidence takes: a folder, or `hub:<id>[@revision]`. Empty: none (ours)."
    )
    second_judge: str = pydantic.Field(
        "",
        description="Edit judge asked beside the fitted one (Qwen2-VL or -2.5-VL): a folder, or `hub:<id>[@revision]`. Empty: none (ours).",
    )
    second_judge_template: str = pydantic.Field(
        "models/judge/second.yaml", description="How it is asked, a file of that one's form; relative to the repository (ours)."
    )
    taxonomy: str | None = pydantic.Field(
        None, description="Another taxonomy file; relative to the repository. None: the one shipped (ours)."
    )
    threads: int = pydantic.Field(2, ge=1, description="Threads of torch and OpenMP in the run's process (ours).")
    auto_promote: bool = pydantic.Field(False, description="May a release move itself to production once every gate passed (ours)?")
    require_approval: bool = pydantic.Field(
        False,
        description="Does a release stop in staging until approver, licence acknowledgement and engine parity are recorded (ours)?",
    )
    base_licence: str = pydantic.Field(
        "", description="Licence of the base, as the hub names it; a non-commercial one is acknowledged by name (ours)."
    )
    webhook: str | None = pydantic.Field(
        None,
        pattern=r"^https?://[^@\s]+$",
        description="Where every move of production is posted, signed with ONEREWARD_WEBHOOK_SECRET; no user or password in it (ours).",
    )
    retrain_after_labels: int = pydantic.Field(200, ge=1, description="New labels after which the sensor starts retraining (ours).")
    keep_events_days: int = pydantic.Field(30, ge=1, description="The purge job deletes event logs of older finished runs (ours).")
    fresh_days: int = pydantic.Field(8, ge=1, description="An asset older than so many days is overdue; retraining is weekly (ours).")
    gates: dict[str, Any] = pydantic.Field({}, description="Thresholds of the gates, by field of ops.gate.GateConfig (ours).")
    stages: dict[str, dict[str, Any]] = pydantic.Field({}, description="Sections of the stages, by name (ours).")


def resolve(settings: Settings, stage: str, config: type[Config]) -> Config:
    """A stage's configuration under a preset. Raises ConfigError for values that are not valid."""
    return _valid(settings, stage, config, settings.stages.get(stage, {}))


def _valid(settings: Settings, section: str, config: type[Config], values: dict[str, Any]) -> Config:
    try:
        return config(**values)
    except pydantic.ValidationError as error:
        raise ConfigError(
            f"Section {section!r} of preset {settings.preset!r} is not valid: {reasons(error)}.", "Correct the preset."
        ) from error


def thresholds(settings: Settings) -> GateConfig:
    """The gates' thresholds under a preset, by the evidence that its evaluation reads and the second judge it names.

    Raises ConfigError for values that are not valid.
    """
    truth = settings.stages.get("evaluation", {}).get("evidence") != "blind"
    asked = {"require_ground_truth": truth, "require_second_judge": bool(settings.second_judge)}
    return _valid(settings, "gates", GateConfig, asked | settings.gates)


def terms(settings: Settings) -> Terms:
    """What a preset asks for before production, besides the gates."""
    return Terms(settings.require_approval, settings.base_licence)


def reasons(error: pydantic.ValidationError) -> str:
    """What is wrong with a configuration, field by field, on one line."""
    return "; ".join(f"{'.'.join(map(str, each['loc'])) or 'values'}: {each['msg']}" for each in error.errors())
