"""Moving production under a preset: the op, then the pointer file and the webhook. For the release asset, the command line, the jobs."""

from __future__ import annotations

from collections.abc import Callable

from assets.settings import Settings, terms, thresholds
from infra.stores.base import ArtifactRef, StageMove
from infra.workspace import Workspace
from models.errors import OneRewardError, StoreError
from ops import promote as op
from ops.announce import announce
from ops.lineage import RELEASE

PRODUCTION = op.STAGES[-1]


def promote(
    settings: Settings,
    workspace: Workspace,
    ref: ArtifactRef,
    stage: str,
    *,
    approver: str,
    reason: str,
    warn: Callable[[str], None],
) -> StageMove:
    """See ops.promote.promote; the preset gives thresholds and terms."""
    move = op.promote(
        workspace.store,
        workspace.keys,
        ref,
        stage,
        thresholds=thresholds(settings),
        terms=terms(settings),
        approver=approver,
        reason=reason,
    )
    _tell(settings, workspace, move, warn)
    return move


def rollback(settings: Settings, workspace: Workspace, stage: str, *, approver: str, reason: str, warn: Callable[[str], None]) -> StageMove:
    """See ops.promote.rollback."""
    move = op.rollback(workspace.store, workspace.keys, RELEASE, stage, approver=approver, reason=reason)
    _tell(settings, workspace, move, warn)
    return move


def _tell(settings: Settings, workspace: Workspace, move: StageMove, warn: Callable[[str], None]) -> None:
    if move.stage != PRODUCTION:
        return
    try:
        announce(workspace.store, workspace.keys, workspace.home, webhook=settings.webhook, warn=warn)
    except OneRewardError as error:
        remedy = f"Then `onereward promote {move.digest[:12]} {PRODUCTION}` moves nothing and writes it; do not repeat a rollback."
        told = f"{PRODUCTION} has moved to v{move.version}, but was not announced: {error.what}"
        raise StoreError(told, f"{error.remedy} {remedy}") from error
