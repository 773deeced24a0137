"""Approvals: what people answer for before a release goes to production, as signed records.

    approve(store, keys, release, approver="kim", reason="...", licence="", parity=None, overrides=["engine/engine_verified"], tmp=tmp)

An approval is an artifact `approval-release` whose parent is the release, signed as gate reports are, and an entry of the audit
log; without the entry it is nothing. The newest one counts. A preset's terms (`require_approval`) hold a release in staging
until there is one that names its approver, acknowledges the licence of a base that is not for commercial use, and holds an
engine parity report: what the engine answered on its GPU against the network it was built from. An override is an approval
that names a gate as `artifact/gate`; it lets pass a figure that was too low, never evidence that is absent, altered or unsigned.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.disk import writing
from infra.signing import Keys
from infra.stores.base import ArtifactRef, ArtifactStore
from models.errors import ConfigError, GateRefused
from ops.audit import APPROVED, append
from ops.gate import REQUIRED_GATES, SIGNATURE, Evidence, verified

APPROVAL = "approval-release"
NOT_COMMERCIAL = re.compile(r"non-?commercial|(^|[^a-z])nc([^a-z]|$)", re.IGNORECASE)  # as licences are named on the hub
MAX_ENGINE_ERROR = 0.05  # ours: relative error of the engine's answer; float16 and TF32 kernels stay below


@dataclass(frozen=True)
class Terms:
    """What a preset asks for before production, besides the gates."""

    require_approval: bool = False
    licence: str = ""  # of the base, as the hub names it

    @property
    def acknowledgement(self) -> bool:
        """Whether somebody must acknowledge the licence."""
        return bool(NOT_COMMERCIAL.search(self.licence))


@dataclass(frozen=True)
class Approval:
    """A recorded approval of one release."""

    ref: ArtifactRef  # of the record
    digest: str  # of the release
    approver: str
    reason: str
    licence: str  # that was acknowledged; empty where none was
    parity: dict[str, Any] | None
    overrides: tuple[str, ...]  # `artifact/gate`

    def __str__(self) -> str:
        parts = [f"licence {self.licence} acknowledged"] if self.licence else []
        parts += [f"engine parity {self.parity['relative_error']:.2g} on {self.parity['device']}"] if self.parity else []
        parts += [f"OVERRIDE of {', '.join(self.overrides)}"] if self.overrides else []
        return f"approved by {self.approver}: {self.reason}" + (f" ({'; '.join(parts)})" if parts else "")


def approve(
    store: ArtifactStore,
    keys: Keys,
    ref: ArtifactRef,
    *,
    approver: str,
    reason: str,
    licence: str,
    parity: Path | None,
    overrides: Sequence[str],
    tmp: Path,
) -> Approval:
    """Record an approval of a release and enter it into the audit log.

    Args:
        licence: the base's licence, where the approver acknowledges it; else "".
        parity: JSON file with the release's `engine` digest, the `relative_error` measured and the `device`.
        overrides: gates that may have failed, as `artifact/gate`.

    Raises ConfigError for a nameless approver, an empty reason, a gate that does not exist or a parity report about another engine.
    """
    if not approver.strip() or not reason.strip():
        raise ConfigError("An approval needs an approver and a reason.", "Name both.")
    if ref.name != "release":
        raise ConfigError(f"{ref.name} {ref.digest[:12]} is no release.", "Approve a release: `onereward versions release` lists them.")
    known = {f"{name}/{gate}" for name, gates in REQUIRED_GATES.items() for gate in gates}
    if unknown := [gate for gate in overrides if gate not in known]:
        raise ConfigError(f"There is no gate {unknown[0]!r}.", "Name it as artifact/gate, as `onereward show` lists them.")
    report = _read_parity(store, ref, parity) if parity else None
    said = {
        "digest": ref.digest,
        "approver": approver,
        "reason": reason,
        "licence": licence,
        "parity": report,
        "overrides": sorted(set(overrides)),
    }
    with writing(tmp), tempfile.TemporaryDirectory(dir=tmp) as temporary:
        folder = Path(temporary)
        (folder / "approval.json").write_text(json.dumps(said, indent=2, sort_keys=True, allow_nan=False) + "\n")
        metadata = {SIGNATURE: keys.sign_folder(folder)}
        count = len(store.versions(APPROVAL))  # the same words again are another approval
        stored = store.put(APPROVAL, folder, key=f"{ref.digest}:{count}", parents=[ref], metadata=metadata)
    approval = Approval(stored, ref.digest, approver, reason, licence, report, tuple(sorted(set(overrides))))
    append(store, keys, ref, APPROVED, approver=approver, reason=str(approval), evidence=[stored.digest])
    return approval


def approval_for(store: ArtifactStore, keys: Keys, ref: ArtifactRef) -> Approval | None:
    """The newest approval of a release in the audit log, its bytes and its signature verified, or None.

    Raises DigestMismatch, SignatureRefused, and GateRefused for one that cannot be read.
    """
    entries = [move for move in store.moves(ref.name, APPROVED) if move.digest == ref.digest]
    if not entries:
        return None
    record = store.version(entries[-1].evidence[0]).ref
    try:
        said = json.loads((verified(store, keys, record) / "approval.json").read_text())
        approval = Approval(ref=record, **{**said, "overrides": tuple(said["overrides"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GateRefused(f"The approval {record.digest[:12]} cannot be read: {error}.", "Approve the release again.") from error
    if approval.digest != ref.digest or record.name != APPROVAL:
        raise GateRefused(f"The approval {record.digest[:12]} is of another release.", "Approve this one.")
    return approval


def check_terms(terms: Terms, ref: ArtifactRef, evidence: Sequence[Evidence], approval: Approval | None) -> None:
    """Raises GateRefused naming what the preset still asks for before production."""
    if not terms.require_approval:
        return
    said = f"onereward approve {ref.digest[:12]} --approver <name> --reason <why>"
    said += " --licence-acknowledged" if terms.acknowledgement else ""
    missing = []
    if approval is None:
        missing.append("an approval by a named person")
    if terms.acknowledgement and (approval is None or approval.licence != terms.licence):
        missing.append(f"an acknowledgement of the base's licence, {terms.licence}")
    ran = any(gate.name == "engine_verified" and gate.measure == 1 for each in evidence for gate in each.gates)
    if not ran and (approval is None or approval.parity is None):
        missing.append("an engine parity report")
        said += " --parity <file>"
    if missing:
        what = f"Release {ref.digest[:12]} stays in staging: its preset asks for {', '.join(missing)}."
        raise GateRefused(what, f"Record it: `{said}`.")


def _read_parity(store: ArtifactStore, ref: ArtifactRef, path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text())
        engine, relative, device = str(raw["engine"]), float(raw["relative_error"]), str(raw["device"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is no engine parity report: {error!r}.", "A JSON object with engine, relative_error, device.") from error
    if engine not in {parent.digest for parent in store.version(ref.digest).parents if parent.name == "engine"}:
        raise ConfigError(f"{path} is about engine {engine[:12]}, which this release does not hold.", "Measure its own engine.")
    if not math.isfinite(relative) or relative > MAX_ENGINE_ERROR:
        what = f"{path} says that the engine is off by {relative:.3g}; at most {MAX_ENGINE_ERROR} is asked."
        raise ConfigError(what, "Do not release this engine.")
    return {"engine": engine, "relative_error": relative, "device": device}
