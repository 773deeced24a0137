"""A file of measured rows that several processes add to: each row is written as soon as it is measured, and none is lost.

keep(Path("bench.json"), {"seed": 0, ...}, "seed")            # replaces the row of seed 0, or adds one
rows(Path("bench.json"))
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock

from infra.disk import replacing


def machine() -> dict[str, Any]:
    """What figures were taken on."""
    return {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}


def rows(path: Path) -> list[dict[str, Any]]:
    """What the file holds so far; nothing where there is none."""
    return json.loads(path.read_text())["rows"] if path.exists() else []


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time for whatever is made from the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(path.with_name(f".{path.name}.lock")):
        yield


def keep(path: Path, row: dict[str, Any], *names: str) -> None:
    """Add a row in the order of the values it has under `names`; one with the same values is replaced."""

    def key(other: dict[str, Any]) -> list[Any]:
        return [other[name] for name in names]

    with locked(path):
        found = sorted([row, *(other for other in rows(path) if key(other) != key(row))], key=key)
        with replacing(path) as draft:
            draft.write_text(json.dumps({"rows": found}, indent=1) + "\n")
