"""What a version is, and what every artifact store can do.

An artifact is a directory. Its digest is the SHA-256 over its sorted (relative path, file SHA-256) lines; its record
names the digests of everything it was made from. Stages (`candidate`, `staging`, `production`) are pointers to digests.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any, Literal

from infra.progress import Progress
from infra.stores.content import digest_of, hash_files, metered
from models.errors import StoreError, UnknownVersion

NAME = re.compile(r"[a-z0-9][a-z0-9_-]*[a-z0-9]")  # a subset of what GTO and lakeFS allow, safe as a file name


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


# Entries of the audit log that stand in the place of a move and move no stage (ops/audit.py).
NOTES = ("approved", "rotated", "undelivered")


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
    paths = [path for path in folder.rglob("*") if path.is_file()]
    total = sum(path.stat().st_size for path in paths)
    with metered(None, "hash", total) as meter:
        hashes = hash_files(paths, meter)
    return digest_of((path.relative_to(folder).as_posix(), sha256) for path, sha256 in zip(paths, hashes, strict=True)), total


def file_changes(before: Mapping[str, tuple[str, int]], after: Mapping[str, tuple[str, int]]) -> list[FileChange]:
    """How two sets of files, path -> (hash, bytes), differ, by path."""
    changes = []
    for path in sorted(before.keys() | after.keys()):
        if path not in before:
            changes.append(FileChange(path, "added", None, after[path][1]))
        elif path not in after:
            changes.append(FileChange(path, "removed", before[path][1], None))
        elif before[path] != after[path]:
            changes.append(FileChange(path, "changed", before[path][1], after[path][1]))
    return changes


def check_name(name: str) -> None:
    """Raises StoreError for what cannot name an artifact or a stage."""
    if not NAME.fullmatch(name):
        raise StoreError(f"{name!r} cannot name an artifact or a stage.", "Use a-z, 0-9, - and _; begin and end with a letter or digit.")


class ArtifactStore(ABC):
    """Versioned directories and stage pointers. Implementations: DVC (dvc.py) and lakeFS (lakefs.py)."""

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

    def find(self, name: str, key: str) -> Version | None:
        """The newest version of `name` made with that key, or None."""
        return next((v for v in reversed(self.versions(name)) if v.key == key), None) if key else None

    @abstractmethod
    def versions(self, name: str | None = None) -> list[Version]:
        """All versions, oldest first; of one name or of all."""

    def version(self, digest: str) -> Version:
        """The newest record of a digest (a unique prefix of 8 or more hex digits will do). Raises UnknownVersion."""
        return only(self.versions(), digest)

    def lineage(self, digest: str) -> list[Version]:
        """The version and everything it was made from, children before parents, each once. Raises UnknownVersion."""
        versions = self.versions()
        first = only(versions, digest)
        known = {(first.ref.name, first.number): first}
        edges: dict[tuple[str, int], list[tuple[str, int]]] = {}
        open_ = list(known)
        while open_:
            node = open_.pop()
            # A parent existed before its child: looking no later keeps the graph free of cycles when bytes are stored again.
            earlier = [v for v in versions if v.created < known[node].created]
            parents = [newest(earlier, p.name, p.digest) for p in known[node].parents]
            edges[node] = [(p.ref.name, p.number) for p in parents]
            for parent, label in zip(parents, edges[node], strict=True):
                if label not in known:
                    known[label] = parent
                    open_.append(label)
        return [known[node] for node in reversed(list(TopologicalSorter(edges).static_order()))]

    def stage(self, name: str, stage: str) -> ArtifactRef | None:
        """What a stage points to now, or None."""
        moves = self.moves(name, stage)
        return self._version(name, moves[-1].digest).ref if moves else None

    @abstractmethod
    def assign(
        self, ref: ArtifactRef, stage: str, *, approver: str, reason: str, evidence: Sequence[str] = (), seal: Seal | None = None
    ) -> StageMove:
        """Point a stage at a version: the next move of the name, its counter one higher than that of any stage.

        Only ops/audit.py calls this, after the evidence was checked; its `seal` chains and signs the move. What `seal` raises leaves
        every stage as it was.
        """

    @abstractmethod
    def tag(self, ref: ArtifactRef, label: str) -> None:
        """Give a version a label that never moves. The same again changes nothing.

        Raises StoreError for a label that another version of the name has, or that cannot be one; UnknownVersion.
        """

    @abstractmethod
    def tags(self, name: str) -> dict[str, ArtifactRef]:
        """Label -> the version of `name` that has it."""

    @abstractmethod
    def moves(self, name: str, stage: str | None = None) -> list[StageMove]:
        """Every stage move, oldest first."""

    def _version(self, name: str, digest: str) -> Version:
        """The newest record of (name, digest). Raises UnknownVersion."""
        return newest(self.versions(name), name, digest)


def newest(versions: list[Version], name: str, digest: str) -> Version:
    """The last of `versions` with that name and digest. Raises UnknownVersion."""
    for version in reversed(versions):
        if (version.ref.name, version.ref.digest) == (name, digest):
            return version
    raise UnknownVersion(f"The store holds no {name} with digest {digest[:12]}.", "`onereward versions` lists what it holds.")


def only(versions: list[Version], digest: str) -> Version:
    """The last of `versions` whose digest begins so. Raises UnknownVersion when none does, or several, or it is shorter than 8."""
    found = [v for v in versions if v.ref.digest.startswith(digest)] if len(digest) >= 8 else []
    if len({v.ref.digest for v in found}) > 1:
        raise UnknownVersion(f"{digest!r} begins more than one digest.", "Give more of its digits.")
    if not found:
        raise UnknownVersion(f"The store holds no version {digest!r}.", "`onereward versions` lists them; give 8 digits or more.")
    return found[-1]


def refuse_other(taken: ArtifactRef, ref: ArtifactRef, label: str) -> None:
    """Raises StoreError where `taken`, the version that has the label, is another than `ref`."""
    if taken.digest != ref.digest:
        raise StoreError(f"The label {label} of {ref.name} is {taken.digest[:12]}'s already.", "Labels never move: choose another.")
