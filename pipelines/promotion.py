"""What moves production and what tells of it, once for the command line and for Dagster's jobs: each gives lines to print."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from assets import promotion
from assets.settings import Settings
from infra.stores.base import StageMove
from infra.workspace import Workspace
from ops import approval
from ops.audit import ROTATED, append, verify_chain
from ops.lineage import RELEASE

Warn = Callable[[str], None]


def promote_lines(
    settings: Settings, workspace: Workspace, digest: str, stage: str, *, approver: str, reason: str, warn: Warn
) -> Iterator[str]:
    """Move a stage to a release. Raises GateRefused, ConfigError, UnknownVersion, AuditBroken, SignatureRefused."""
    ref = workspace.store.version(digest).ref
    move = promotion.promote(settings, workspace, ref, stage, approver=approver, reason=reason, warn=warn)
    said = approval.approval_for(workspace.store, workspace.keys, ref)
    yield _moved(move) + (f" [{said}]" if said else "")


def rollback_lines(settings: Settings, workspace: Workspace, stage: str, *, approver: str, reason: str, warn: Warn) -> Iterator[str]:
    """Move a stage back to the release it held before. Raises UnknownVersion, DigestMismatch, SignatureRefused, AuditBroken."""
    yield _moved(promotion.rollback(settings, workspace, stage, approver=approver, reason=reason, warn=warn)) + " again"


def approve_lines(
    settings: Settings,
    workspace: Workspace,
    digest: str,
    *,
    approver: str,
    reason: str,
    licence_acknowledged: bool,
    parity: Path | None,
    overrides: Sequence[str],
) -> Iterator[str]:
    """Record an approval of a release. Raises ConfigError, UnknownVersion, AuditBroken, SignatureRefused."""
    ref = workspace.store.version(digest).ref
    yield str(
        approval.approve(
            workspace.store,
            workspace.keys,
            ref,
            approver=approver,
            reason=reason,
            licence=settings.base_licence if licence_acknowledged else "",
            parity=parity,
            overrides=overrides,
            tmp=workspace.tmp,
        )
    )


def rotate_lines(workspace: Workspace, *, approver: str, reason: str) -> Iterator[str]:
    """Replace the signing key; the old public key stays trusted until its file is removed. Raises AuditBroken, SignatureRefused."""
    store, keys = workspace.store, workspace.keys
    moves = store.moves(RELEASE)
    verify_chain(RELEASE, moves, keys)
    old, new = keys.rotate()
    if moves:  # the newest entry vouches for those before it: from here on the new key vouches for all of them
        append(store, keys, store.version(moves[-1].digest).ref, ROTATED, approver=approver, reason=f"signing key replaced: {reason}")
    yield f"signing with {new}"
    yield f"still trusted: {old}; remove {keys.folder / 'trusted' / old}.pub once nothing it signed is in use"


def _moved(move: StageMove) -> str:
    return f"{move.name} v{move.version} ({move.digest[:8]}) is {move.stage}"
