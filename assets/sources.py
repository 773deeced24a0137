"""What an asset's result depends on in this repository: `code_version` hashes the sources its op is made of.

The hash runs over the syntax trees of the asset's module and of every module of `ops/` and `models/` it imports, directly or
not, and over the templates of those modules' names beside them. Comments and layout are no part of a tree, so correcting a
comment does not retrain a policy.
`assets/common.py`, `infra/` and Dagster move bytes and are left out.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FLOORS = ("ops", "models")


def _module_files(dotted: str) -> Iterator[Path]:
    """The file of a module and the `__init__.py` files on the way to it; nothing outside ROOT's floors."""
    parts = dotted.split(".")
    if parts[0] not in FLOORS:
        return
    for depth in range(1, len(parts) + 1):
        path = ROOT.joinpath(*parts[:depth])
        for candidate in (path / "__init__.py", path.with_suffix(".py")):
            if candidate.is_file():
                yield candidate


def _imported(tree: ast.AST) -> Iterator[Path]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _module_files(alias.name)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield from _module_files(node.module)
            for alias in node.names:
                yield from _module_files(f"{node.module}.{alias.name}")


@cache
def _parsed(path: Path) -> tuple[str, frozenset[Path]]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    digest = hashlib.sha256(ast.unparse(tree).encode())
    for template in sorted(path.parent.glob(f"{path.stem}.*.j2")):
        digest.update(template.read_bytes())
    return digest.hexdigest(), frozenset(_imported(tree))


def source_files(module: Path) -> list[Path]:
    """`module` and every in-repository source below it, sorted."""
    seen: set[Path] = set()
    waiting = [module.resolve()]
    while waiting:
        path = waiting.pop()
        if path not in seen:
            seen.add(path)
            waiting.extend(_parsed(path)[1] - seen)
    return sorted(seen)


def code_version(module: Path) -> str:
    """SHA-256 (16 hex digits) over the sources of an asset's module."""
    lines = [f"{path.name} {_parsed(path)[0]}\n" for path in source_files(module)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]
