"""What a registry's git repository says of its versions, read from plain files.

records/<name>/<number>.json    a version's record, never changed: `find`, `versions` and `lineage` read these alone
manifests/<digest>.json         an artifact's files: path, bytes, SHA-256 and MD5 of each; `get`, `diff` and `gc` read these
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

from infra.stores.base import ArtifactRef, Version
from infra.stores.content import StoredFile, digest_of
from models.errors import StoreError

Stamp = tuple[int, int, int]


class Records:
    """The records and manifests below `root`. Files of another process are seen at once; a file is parsed once."""

    def __init__(self, root: Path):
        self.root = root
        self._parsed: dict[Path, tuple[Stamp, Version, str]] = {}

    def newest_first(self, name: str) -> Iterator[Version]:
        for path in sorted((self.root / "records" / name).glob("*.json"), reverse=True):
            yield self._read(path)[0]

    def all(self, name: str | None = None) -> list[Version]:
        """All versions, oldest first; of one name or of all."""
        names = [name] if name is not None else sorted(p.name for p in (self.root / "records").glob("*"))
        return sorted((v for each in names for v in self.newest_first(each)), key=lambda v: v.created)

    def object_id(self, version: Version) -> str:
        """DVC's id of the list of a version's files."""
        return self._read(self.root / record_path(version.ref.name, version.number))[1]

    def manifest(self, digest: str) -> list[StoredFile]:
        """The files of an artifact. Raises StoreError for a manifest that is absent or does not add up to the digest."""
        path = self.root / manifest_path(digest)
        try:
            files = read_manifest(path.read_text())
        except (OSError, ValueError, TypeError) as error:
            raise StoreError(f"{path} is no list of files: {error}.", f"Restore it: git -C {self.root} checkout -- manifests.") from error
        if digest_of((file.path, file.sha256) for file in files) != digest:
            raise StoreError(f"{path} was altered: it makes another digest.", f"Restore it: git -C {self.root} checkout -- manifests.")
        return files

    def now(self) -> str:
        """The time, but after every record: a clock that steps back must not reorder history."""
        now = datetime.now(UTC)
        for folder in (self.root / "records").glob("*"):
            newest = max(folder.glob("*.json"), default=None)
            if newest is not None:
                now = max(now, datetime.fromisoformat(self._read(newest)[0].created) + timedelta(microseconds=1))
        return now.isoformat(timespec="microseconds")

    def _read(self, path: Path) -> tuple[Version, str]:
        info = path.stat()
        stamp = (info.st_mtime_ns, info.st_size, info.st_ino)
        known = self._parsed.get(path)
        if known is None or known[0] != stamp:
            known = self._parsed[path] = (stamp, *read_record(path))
        return known[1], known[2]


def manifest_path(digest: str) -> str:
    """Where an artifact's list of files lies in the registry."""
    return f"manifests/{digest}.json"


def manifest_text(files: Iterable[StoredFile]) -> str:
    """One line per file."""
    return "[\n" + ",\n".join(json.dumps(dataclasses.asdict(file)) for file in files) + "\n]\n"


def read_manifest(text: str | bytes) -> list[StoredFile]:
    return [StoredFile(**fields) for fields in json.loads(text)]


def record_path(name: str, number: int) -> str:
    """Where a version's record lies in the registry. Names sort as numbers do."""
    return f"records/{name}/{number:06d}.json"


def record_text(version: Version, object_id: str) -> str:
    """The record of a version whose bytes DVC keeps as `object_id`; NaN stays NaN. Raises TypeError for what JSON cannot hold."""
    return json.dumps(dataclasses.asdict(version) | {"object": object_id}, indent=2, sort_keys=True) + "\n"


def read_record(path: Path) -> tuple[Version, str]:
    """A version and DVC's id of its bytes. Raises StoreError for a file that is no record."""
    try:
        fields = json.loads(path.read_text())
        object_id = fields.pop("object")
        parents = tuple(ArtifactRef(**parent) for parent in fields.pop("parents"))
        return Version(ref=ArtifactRef(**fields.pop("ref")), parents=parents, **fields), object_id
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        remedy = f"Restore it: git -C {path.parents[2]} checkout -- records."
        raise StoreError(f"{path} is no version's record: {error}.", remedy) from error


def commit_message(version: Version) -> str:
    """Everything about a version that one may look for in `git log`."""
    config = json.dumps(version.config, sort_keys=True)
    parents = "".join(f"Parent: {parent.name} {parent.digest}\n" for parent in version.parents)
    return (
        f"{version.ref.name} {version.number}: {version.ref.digest[:12]}\n\n"
        f"Digest: {version.ref.digest}\nKey: {version.key}\nRun: {version.run_id}\nCode: {version.code_version}\n"
        f"{parents}Config digest: {hashlib.sha256(config.encode()).hexdigest()}\nConfig: {config}\n"
    )
