"""The house's order, read from the sources: who may import whom, what knows Dagster, where tasks and dimensions are named."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from models.taxonomy import Taxonomy

ROOT = Path(__file__).resolve().parents[1]
FLOORS = {"models": 0, "infra": 1, "ops": 2, "assets": 3, "pipelines": 4}
DAGSTER_FROM = FLOORS["assets"]
# Words that also mean something else in code (an ONNX axis, a pydantic or numpy argument); all other names are unmistakable.
AMBIGUOUS = {"text", "fill", "remove", "extend"}
LINES = 450  # the design says about 400


def sources(*floors: str) -> list[Path]:
    return sorted(path for floor in floors for path in (ROOT / floor).rglob("*.py"))


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module, node.lineno


def violations(path: Path, source: str) -> list[str]:
    """Imports in a file that go up a floor, leave the floors, or bring Dagster below the assets."""
    floor = path.parts[0]
    found = []
    for module, line in imports(ast.parse(source)):
        top = module.split(".")[0]
        if FLOORS.get(top, -1) > FLOORS[floor] or top in ("tests", "benchmarks"):
            found.append(f"{path}:{line} imports {module}")
        if top.startswith("dagster") and FLOORS[floor] < DAGSTER_FROM:
            found.append(f"{path}:{line} brings Dagster below the assets")
    return found


def test_nobody_imports_a_floor_above() -> None:
    found = [entry for path in sources(*FLOORS) for entry in violations(path.relative_to(ROOT), path.read_text())]
    assert found == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("models/x.py", "from ops.curate import curate"),
        ("ops/x.py", "import dagster as dg"),
        ("assets/x.py", "def f():\n    import pipelines.cli"),
    ],
)
def test_a_violation_would_be_seen(path: str, source: str) -> None:
    assert len(violations(Path(path), source)) == 1


def test_relative_imports_are_not_used() -> None:
    relative = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sources(*FLOORS)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.level > 0
    ]
    assert relative == []


def test_tasks_and_dimensions_are_named_in_the_taxonomy_alone() -> None:
    taxonomy = Taxonomy.load()
    names = ({task.name for task in taxonomy.tasks} | {dimension.name for dimension in taxonomy.dimensions}) - AMBIGUOUS
    assert len(names) >= 6
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.value}"
        for path in sources(*FLOORS)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value in names
    ]
    assert found == []


def test_every_package_folder_is_a_package() -> None:
    folders = {path.parent for path in [*sources(*FLOORS), *(ROOT / "tests").rglob("*.py")]}
    assert [str(folder.relative_to(ROOT)) for folder in folders if not (folder / "__init__.py").exists()] == []


def test_files_stay_readable() -> None:
    long = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources(*FLOORS)}
    assert {name: lines for name, lines in long.items() if lines > LINES} == {}
