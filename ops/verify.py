"""Is production what the evidence says? Every digest again from the bytes, every signature, and the audit log.

    for line in verify_lines(store, keys, home): print(line)       # production and everything it was made from
    folder = released(store, keys, "production")                   # for a consumer: a release's folder, verified

Raises an error that names the first thing that does not hold.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from infra.signing import Keys
from infra.stores.base import ArtifactStore, StageMove, Version
from models.errors import ConfigError, StoreError, UnknownVersion
from ops.announce import POINTER, pointer_of
from ops.approval import approval_for
from ops.audit import verify_chain
from ops.gate import EVIDENCE_PREFIX, REQUIRED_GATES, evidence_for, verified
from ops.lineage import RELEASE
from ops.promote import STAGES


def released(store: ArtifactStore, keys: Keys, source: str) -> Path:
    """The folder of the release with a digest, its signature verified, or of the one a stage points to: then the move is in an
    unbroken audit log too, and the evidence behind it is signed and unaltered.

    Raises UnknownVersion where no release is there, ConfigError for another artifact, AuditBroken, DigestMismatch, SignatureRefused.
    """
    if source in STAGES:
        return _verify_move(store, keys, _standing(store, keys, source))
    ref = store.version(source).ref
    if ref.name != RELEASE:
        raise ConfigError(f"{source} is a version of {ref.name}, which is no release.", "`onereward versions release` lists them.")
    return verified(store, keys, ref)


def verify_lines(store: ArtifactStore, keys: Keys, home: Path, digest: str | None = None) -> Iterator[str]:
    """Walk from a version, production without a digest, to the source images; a line for everything that holds.

    Raises UnknownVersion, AuditBroken, DigestMismatch, SignatureRefused, and StoreError for a pointer file that lags behind.
    """
    if digest is None:
        move = _standing(store, keys, STAGES[-1])
        yield f"ok  audit log of {RELEASE}: {len(store.moves(RELEASE))} entries, newest and head signed"
        _check_pointer(store, home, move)
        yield f"ok  {POINTER}"
        _verify_move(store, keys, move)
        yield f"ok  evidence behind the move to {STAGES[-1]}: {len(move.evidence)} signed records"
        digest = move.digest
    for version in store.lineage(digest):
        yield f"ok  {_verify_version(store, keys, version)}"


def _standing(store: ArtifactStore, keys: Keys, stage: str) -> StageMove:
    moves = store.moves(RELEASE)
    verify_chain(RELEASE, moves, keys)
    standing = [move for move in moves if move.stage == stage]
    if not standing:
        remedy = "Use --from base, or promote a release first (`onereward versions release`)."
        raise UnknownVersion(f"No release is in {stage}.", remedy)
    return standing[-1]


def _verify_move(store: ArtifactStore, keys: Keys, move: StageMove) -> Path:
    for digest in move.evidence:
        verified(store, keys, store.version(digest).ref)
    refs = [version.ref for version in store.versions(move.name) if version.ref.digest == move.digest]
    if not refs:
        raise UnknownVersion(f"The store no longer holds {move.name} {move.digest[:12]}.", "Restore the registry from a backup.")
    return verified(store, keys, refs[-1])


def _verify_version(store: ArtifactStore, keys: Keys, version: Version) -> str:
    ref = version.ref
    shown = f"{ref.name} v{version.number} {ref.digest[:12]}: bytes"
    if ref.name == RELEASE or ref.name.startswith(EVIDENCE_PREFIX):
        verified(store, keys, ref)
        approval = approval_for(store, keys, ref) if ref.name == RELEASE else None
        return f"{shown}, signature" + (f"; {approval}" if approval else "")
    store.get(ref)
    if ref.name not in REQUIRED_GATES:
        return shown
    evidence = evidence_for(store, keys, ref)
    if evidence is None:
        return f"{shown}; no gate was measured"
    refused = [gate.name for gate in evidence.gates if not gate.passed]
    return f"{shown}, evidence; " + (f"did NOT pass {', '.join(refused)}" if refused else f"{len(evidence.gates)} gates passed")


def _check_pointer(store: ArtifactStore, home: Path, move: StageMove) -> None:
    try:
        said = json.loads((home / POINTER).read_text())
    except (OSError, ValueError):
        said = None
    if said != json.loads(json.dumps(pointer_of(store, move))):
        remedy = f"`onereward promote {move.digest[:12]} {STAGES[-1]}` moves nothing and writes it again."
        raise StoreError(f"{home / POINTER} does not say what production is, v{move.version} by entry {move.counter}.", remedy)
