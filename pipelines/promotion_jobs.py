"""The commands of docs/promotion.md as Dagster jobs: what moves production, and what tells of it, started from the UI.

    dagster job execute -m pipelines.definitions -j promote -c promote.yaml
    # ops: {promote_op: {config: {digest: 5d43578860e0, stage: staging, approver: kim, reason: better on every task}}}

Every job says who asked and why. Secrets are no part of a config: keys and tokens come from the environment of the process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dagster as dg
from pydantic import Field

from assets.settings import Settings
from infra.workspace import Workspace
from ops.verify import verify_lines
from pipelines.promotion import approve_lines, promote_lines, rollback_lines
from pipelines.versions import audit_lines, diff_lines, show_lines, version_lines

Lines = Callable[[Settings, Workspace, Any, Callable[[str], None]], Iterator[str]]


class Asked(dg.Config):
    """Who asked for it and why."""

    approver: str = Field(min_length=1, description="Who answers for it.")
    reason: str = Field(min_length=1, description="Why.")


class StageConfig(Asked):
    stage: str = Field("production", description="candidate, staging or production.")


class PromoteConfig(StageConfig):
    digest: str = Field(description="Of a release, 8 digits or more.")


class ApproveConfig(Asked):
    digest: str = Field(description="Of a release, 8 digits or more.")
    licence_acknowledged: bool = Field(False, description="The preset's `base_licence` was read and allows this use.")
    parity: str = Field("", description="Path of an engine parity report.")
    overrides: list[str] = Field([], description="Gates that may have failed, as artifact/gate.")


class OneConfig(Asked):
    digest: str = Field("", description="Of a version, 8 digits or more.")


class NameConfig(Asked):
    name: str = Field("", description="An artifact's name; all without one.")


class DiffConfig(Asked):
    old: str = Field(description="Digest, 8 digits or more.")
    new: str = Field(description="Digest, 8 digits or more.")


def _promote(settings: Settings, workspace: Workspace, config: PromoteConfig, warn: Callable[[str], None]) -> Iterator[str]:
    return promote_lines(settings, workspace, config.digest, config.stage, approver=config.approver, reason=config.reason, warn=warn)


def _approve(settings: Settings, workspace: Workspace, config: ApproveConfig, warn: Callable[[str], None]) -> Iterator[str]:
    return approve_lines(
        settings,
        workspace,
        config.digest,
        approver=config.approver,
        reason=config.reason,
        licence_acknowledged=config.licence_acknowledged,
        parity=Path(config.parity) if config.parity else None,
        overrides=config.overrides,
    )


JOBS: dict[str, tuple[type[Asked], Lines, str]] = {
    "promote": (PromoteConfig, _promote, "Move a stage to a release, on evidence."),
    "rollback": (
        StageConfig,
        lambda settings, place, asked, warn: rollback_lines(
            settings, place, asked.stage, approver=asked.approver, reason=asked.reason, warn=warn
        ),
        "Move a stage back to the release it pointed to before.",
    ),
    "approve": (ApproveConfig, _approve, "Record that a person answers for a release."),
    "versions": (
        NameConfig,
        lambda _, place, asked, warn: version_lines(place.store, place.keys, asked.name or None, verify=False),
        "Every stored version and where it stands.",
    ),
    "show": (OneConfig, lambda _, place, asked, warn: show_lines(place.store, place.keys, asked.digest), "Everything about a version."),
    "diff": (DiffConfig, lambda _, place, asked, warn: diff_lines(place.store, asked.old, asked.new), "What differs between two versions."),
    "audit": (Asked, lambda _, place, asked, warn: audit_lines(place.store, place.keys), "The audit log, and whether it holds."),
    "verify": (
        OneConfig,
        lambda _, place, asked, warn: verify_lines(place.store, place.keys, place.home, asked.digest or None),
        "Every digest, signature and audit entry from production to the source images.",
    ),
}


def promotion_jobs(settings: Settings) -> list[dg.JobDefinition]:
    """A job for every command, under a preset."""
    return [_job(settings, name, *entry) for name, entry in JOBS.items()]


def _job(settings: Settings, name: str, config: type[Asked], lines: Lines, description: str) -> dg.JobDefinition:
    def compute(context: dg.OpExecutionContext, config: Any) -> None:
        context.log.info(f"{name}, asked for by {config.approver}: {config.reason}")
        said = []
        for line in lines(settings, Workspace.from_env(), config, context.log.warning):
            context.log.info(line)
            said.append(line)
        context.add_output_metadata({"lines": dg.MetadataValue.text("\n".join(said))})

    compute.__annotations__ = {"context": dg.OpExecutionContext, "config": config, "return": None}
    step = dg.op(name=f"{name}_op", description=description)(compute)

    @dg.job(name=name, description=description)
    def job() -> None:
        step()

    return job
