"""What a version is, and what every artifact store can do.

An artifact is a directory. Its digest is the SHA-256 over its sorted (relative path, file SHA-256) lines; its record
names the digests of everything it was made from. Stages (`candidate`, `staging`, `production`) are pointers to digests.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from infra.progress import Progress


@dataclass(frozen=True)
class ArtifactRef:
    """What assets exchange: never tensors, never pickles."""

    name: str  # e.g. "policy-static"
    digest: str  # sha256 hex of the directory's content
    uri: str  # where the store keeps it, e.g. "dvc://<registry>?name=..&digest=.."
    size: int  # bytes


@dataclass(frozen=True)
class Version:
    """One stored artifact with its record."""

    ref: ArtifactRef
    number: int  # 1, 2, ... within the name
    key: str  # digest of (code version, config, parents): equal keys mean the work is already done
    parents: tuple[ArtifactRef, ...]
    run_id: str
    created: str  # ISO 8601, UTC
    code_version: str
    config: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StageMove:
    """One move of a stage pointer, as the audit trail keeps it."""

    name: str
    stage: str
    digest: str
    version: int
    counter: int  # the stage's highest counter wins
    when: str  # ISO 8601, UTC
    approver: str
    reason: str
    evidence: tuple[str, ...]  # digests of the gate reports
    previous: str = ""  # digest of the move before it, of any stage (ops/audit.py); empty for the first
    signature: str = ""  # over everything above


# Given every move of the name so far and the new one, while nobody else can move: what is to be kept in its place.
Seal = Callable[[Sequence[StageMove], StageMove], StageMove]


@dataclass(frozen=True)
class FileChange:
    """One file in which two artifacts differ."""

    path: str  # relative, with forward slashes
    kind: Literal["added", "removed", "changed"]
    before: int | None  # bytes; None when added
    after: int | None  # bytes; None when removed


@dataclass(frozen=True)
class GcReport:
    """What a collection removed or, on a dry run, would remove."""

    paths: tuple[str, ...]  # relative to the store
    bytes: int
    dry_run: bool


def directory_digest(folder: Path) -> tuple[str, int]:
    """Content digest (sha256 hex) and size in bytes of a directory, independent of file times and order on disk."""
    total = 0
    lines = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            lines.append(f"{path.relative_to(folder).as_posix()} {hashlib.file_digest(file, 'sha256').hexdigest()}\n")
        total += path.stat().st_size
    return hashlib.sha256("".join(lines).encode()).hexdigest(), total


class ArtifactStore(ABC):
    """Versioned directories and stage pointers. Implementations: DVC (infra/stores/dvc.py)."""

    @abstractmethod
    def put(
        self,
        name: str,
        folder: Path,
        *,
        key: str = "",
        parents: Sequence[ArtifactRef] = (),
        run_id: str = "",
        code_version: str = "",
        config: dict[str, Any] | None = None,
        metadata: dict[str, Any] | None = None,
        progress: Progress | None = None,
    ) -> ArtifactRef:
        """Store a directory as a new version, atomically. Idempotent: the same content and key is stored once.

        Files are streamed: memory does not grow with their size. Cut short and repeated, it does not copy again what it had copied.
        Raises DiskFull or StoreError, UnknownVersion for a parent that is not stored, and then leaves the versions as they were.
        """

    @abstractmethod
    def get(self, ref: ArtifactRef, progress: Progress | None = None) -> Path:
        """A local folder with the artifact's bytes, verified against its digest; treat it as read-only.

        Raises UnknownVersion or DigestMismatch.
        """

    @abstractmethod
    def diff(self, a: ArtifactRef, b: ArtifactRef) -> list[FileChange]:
        """How the files of `b` differ from those of `a`, by path. No file's bytes are fetched. Raises UnknownVersion."""

    @abstractmethod
    def gc(self, dry_run: bool = True, live: Collection[str] = ()) -> GcReport:
        """Remove what no version and no stage refers to: leftovers of work that was cut short.

        live: ids of the runs under way; what they have begun stays, as does what a `put` under way has stored.
        """

    @abstractmethod
    def find(self, name: str, key: str) -> Version | None:
        """The newest version of `name` made with that key, or None."""

    @abstractmethod
    def versions(self, name: str | None = None) -> list[Version]:
        """All versions, oldest first; of one name or of all."""

    @abstractmethod
    def version(self, digest: str) -> Version:
        """The newest record of a digest (a unique prefix of 8 or more hex digits will do). Raises UnknownVersion."""

    @abstractmethod
    def lineage(self, digest: str) -> list[Version]:
        """The version and everything it was made from, children before parents, each once. Raises UnknownVersion."""

    @abstractmethod
    def stage(self, name: str, stage: str) -> ArtifactRef | None:
        """What a stage points to now, or None."""

    @abstractmethod
    def assign(
        self, ref: ArtifactRef, stage: str, *, approver: str, reason: str, evidence: Sequence[str] = (), seal: Seal | None = None
    ) -> StageMove:
        """Point a stage at a version: the next move of the name, its counter one higher than that of any stage.

        Only ops/audit.py calls this, after the evidence was checked; its `seal` chains and signs the move. What `seal` raises leaves
        every stage as it was.
        """

    @abstractmethod
    def moves(self, name: str, stage: str | None = None) -> list[StageMove]:
        """Every stage move, oldest first."""
