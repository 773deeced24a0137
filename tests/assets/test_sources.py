"""Which sources an asset's version depends on."""

from __future__ import annotations

from pathlib import Path

import pytest

from assets import sources
from assets.sources import ROOT, code_version, source_files


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small repository: assets/a.py uses ops.work, which uses models.net through a package."""
    for name, text in {
        "assets/a.py": "from ops.work import work\n",
        "ops/__init__.py": "",
        "ops/work.py": "def work():\n    from models.nets import net\n    return net\n",
        "ops/other.py": "OTHER = 1\n",
        "models/__init__.py": "",
        "models/nets/__init__.py": "from models.nets.core import net\n",
        "models/nets/core.py": "net = 1\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    return tmp_path


def version(repository: Path) -> str:
    sources._parsed.cache_clear()
    return code_version(repository / "assets" / "a.py")


def test_follows_imports_into_packages_and_functions(repository: Path) -> None:
    names = [path.relative_to(repository).as_posix() for path in source_files(repository / "assets" / "a.py")]
    assert "models/nets/core.py" in names and "ops/work.py" in names and "ops/other.py" not in names


def test_a_changed_network_is_another_version_and_a_comment_is_not(repository: Path) -> None:
    before = version(repository)
    core = repository / "models" / "nets" / "core.py"
    core.write_text("# why\nnet   =  1\n")
    assert version(repository) == before
    core.write_text("net = 2\n")
    assert version(repository) != before


def test_a_template_belongs_to_the_module_of_its_name(repository: Path) -> None:
    before = version(repository)
    (repository / "ops" / "other.md.j2").write_text("{{ other }}")
    assert version(repository) == before
    (repository / "models" / "nets" / "core.md.j2").write_text("{{ net }}")
    assert version(repository) != before


def test_an_unrelated_op_does_not_matter(repository: Path) -> None:
    before = version(repository)
    (repository / "ops" / "other.py").write_text("OTHER = 2\n")
    assert version(repository) == before


def test_a_real_stage_depends_on_its_op_and_the_taxonomys_code() -> None:
    names = {path.relative_to(ROOT).as_posix() for path in source_files(ROOT / "assets" / "source_images.py")}
    assert {"assets/source_images.py", "ops/source.py", "models/taxonomy/__init__.py"} <= names
    assert not any(name.startswith(("infra/", "pipelines/")) for name in names)
