"""What `onereward versions`, `show`, `diff` and `audit` print, and where `onereward edit` takes its networks from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from assets.settings import Settings
from assets.sources import ROOT
from infra.data import ensure_data, weights
from infra.signing import Keys
from infra.stores.base import ArtifactStore, Version
from infra.workspace import Workspace
from models.errors import ConfigError, UnknownVersion
from ops.approval import approval_for
from ops.audit import APPROVED, entry_digest, verify_chain
from ops.folders import read_metrics
from ops.gate import REQUIRED_GATES, SIGNATURE, Gate, evidence_for, verified
from ops.lineage import POLICY_PREFIX, RELEASE
from ops.promote import STAGES
from ops.verify import released


def version_lines(store: ArtifactStore, keys: Keys, name: str | None, *, verify: bool) -> Iterator[str]:
    """One line per version, oldest first, an approval's words behind a release.

    Raises UnknownVersion for a name that was never stored, DigestMismatch on `verify`.
    """
    versions = store.versions(name)
    if name and not versions:
        known = ", ".join(sorted({version.ref.name for version in store.versions()})) or "none yet"
        raise UnknownVersion(f"No version of {name!r} is stored.", f"Names are: {known}.")
    pointers: dict[tuple[str, str], list[str]] = {}
    for artifact in dict.fromkeys(version.ref.name for version in versions):
        for stage in STAGES:
            if ref := store.stage(artifact, stage):
                pointers.setdefault((artifact, ref.digest), []).append(stage)
        for label, ref in store.tags(artifact).items():
            pointers.setdefault((artifact, ref.digest), []).append(f"label {label}")
    approved = {move.digest for move in store.moves(RELEASE, APPROVED)}
    yield f"{'name':16} {'version':>7}  {'digest':12} {'size':>10}  {'made':19}  {'run':8}  stages"
    for version in versions:
        ref = version.ref
        if verify:
            store.get(ref)
        stages = ", ".join(pointers.get((ref.name, ref.digest), []))
        made = version.created[:19].replace("T", " ")
        line = (
            f"{ref.name:16} {version.number:>7}  {ref.digest[:12]} {ref.size / 1e6:>7.2f} MB  {made:19}  {version.run_id[:8]:8}  {stages}"
        )
        approval = approval_for(store, keys, ref) if ref.digest in approved else None
        yield line.rstrip() + (" verified" if verify else "") + (f"  [{approval}]" if approval else "")


def show_lines(store: ArtifactStore, keys: Keys, digest: str) -> Iterator[str]:
    """Everything recorded about a version: what it was made from, its gates, its approval, where it stands.

    Raises UnknownVersion, and DigestMismatch or SignatureRefused for what was altered.
    """
    version = store.version(digest)
    ref = version.ref
    stages = [stage for stage in STAGES if (there := store.stage(ref.name, stage)) and there.digest == ref.digest]
    yield f"{ref.name} v{version.number} {ref.digest}"
    yield f"made     {version.created[:19].replace('T', ' ')} by run {version.run_id or 'none'}, code {version.code_version or 'unknown'}"
    yield f"stages   {', '.join(stages) or 'none'}"
    yield from (f"parent   {parent.name} {parent.digest[:12]}" for parent in version.parents)
    if SIGNATURE in version.metadata:
        verified(store, keys, ref)
        yield "signed   by a trusted key, over exactly these bytes"
    if ref.name == RELEASE and (approval := approval_for(store, keys, ref)):
        yield str(approval)
    gated = [v.ref for v in store.lineage(ref.digest) if v.ref.name in REQUIRED_GATES] if ref.name == RELEASE else [ref]
    for each in gated:
        if evidence := evidence_for(store, keys, each):
            yield f"gates    of {each.name} {each.digest[:12]}, by code {evidence.code_version}:"
            yield from (f"  {_gate_line(gate)}" for gate in evidence.gates)
            yield from (f"  not verified: {line}" for line in evidence.not_verified)
    yield f"config   {json.dumps(version.config, sort_keys=True)}"
    yield f"figures  {json.dumps({name: value for name, value in version.metadata.items() if name != SIGNATURE}, sort_keys=True)}"


def _gate_line(gate: Gate) -> str:
    interval = f", interval {gate.interval[0]:.4g} to {gate.interval[1]:.4g}" if gate.interval else ""
    return f"{'passed' if gate.passed else 'NOT passed'} {gate}{interval}{f', n {gate.n}' if gate.n is not None else ''}"


def diff_lines(store: ArtifactStore, old: str, new: str) -> Iterator[str]:
    """What differs between two versions: parents, configuration, figures, files. Raises UnknownVersion."""
    versions = store.version(old), store.version(new)
    for version in versions:
        yield f"{'-+'[version is versions[1]]} {version.ref.name} v{version.number} {version.ref.digest[:12]}"
    for title, read in (("parent", _parents), ("config", lambda v: v.config), ("figure", _figures)):
        yield from (f"{title} {line}" for line in _changes(*map(read, versions)))
    for change in store.diff(versions[0].ref, versions[1].ref):
        yield f"file {change.path}: {change.kind}, {_bytes(change.before)} -> {_bytes(change.after)}"


def _bytes(size: int | None) -> str:
    return "none" if size is None else f"{size} bytes"


def _parents(version: Version) -> dict[str, Any]:
    return {parent.name: parent.digest[:12] for parent in version.parents}


def _figures(version: Version) -> dict[str, Any]:
    return {name: value for name, value in version.metadata.items() if name != SIGNATURE}


def _changes(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            yield f"{name}: {old.get(name, 'none')} -> {new.get(name, 'none')}"


def audit_lines(store: ArtifactStore, keys: Keys) -> Iterator[str]:
    """Every entry of the audit log, oldest first, then whether it holds. Raises AuditBroken after the entries were told."""
    moves = store.moves(RELEASE)
    standing: dict[str, int] = {}
    for move in moves:
        earlier = standing.get(move.stage)
        went = f"v{move.version} ({move.digest[:12]})" if earlier is None else f"v{earlier} -> v{move.version} ({move.digest[:12]})"
        standing[move.stage] = move.version
        proof = ", ".join(digest[:12] for digest in move.evidence) or "none"
        when = move.when[:19].replace("T", " ")
        yield f"{move.counter:>4}  {when}  {move.stage:11} {went}  {move.approver}: {move.reason}"
        yield f"      evidence {proof}; entry {entry_digest(move)[:12]}"
    verify_chain(RELEASE, moves, keys)
    yield f"the log holds: {len(moves)} entries" + (f", head {entry_digest(moves[-1])}" if moves else "")


def editor(settings: Settings, workspace: Workspace, source: str) -> tuple[Path, Path | None, dict[str, Any] | None]:
    """Pipeline folder, policy folder (None: the pipeline's own transformer), and the sampling that a release was measured with.

    `source`: `base`, a stage of the release, or the digest of a release or policy. The sampling is None for base and policy, and for a
    release of before it was kept. A release's signature is verified, and behind a stage the evidence and the audit log.

    Raises UnknownVersion, ConfigError for an artifact that edits nothing, SignatureRefused, AuditBroken, MissingWeights.
    """
    store, keys = workspace.store, workspace.keys
    if source == "base":
        return base_pipeline(settings), None, None
    if source in STAGES or (ref := store.version(source).ref).name == RELEASE:
        folder = released(store, keys, source)
        return folder / "model", None, read_metrics(folder).get("sampling")
    if not ref.name.startswith(POLICY_PREFIX):
        raise ConfigError(f"{source} is a version of {ref.name}, which edits nothing.", "Name a release or a policy.")
    return base_pipeline(settings), store.get(ref), None


def base_pipeline(settings: Settings) -> Path:
    """The base's folder, fetched first where it is part of the repository's data."""
    if settings.flux.startswith("data/"):
        ensure_data(ROOT)
    return weights(settings.flux, ROOT)
