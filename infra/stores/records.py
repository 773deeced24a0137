"""A version's record: the JSON file that `find`, `versions` and `lineage` read, and the commit message that `git log` shows."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

from infra.stores.base import ArtifactRef, Version
from models.errors import StoreError


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
