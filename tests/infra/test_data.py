"""`data.dvc` satisfies a clone offline; base weights are found or their absence is explained."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from dvc.repo import Repo

from infra.data import ensure_data, weights, weights_digest
from infra.stores.base import directory_digest
from models.errors import BrokenWeights, MissingWeights

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A clone whose `data.dvc` points to bytes in a remote beside it, without `data/`."""
    root = tmp_path / "clone"
    (root / "data").mkdir(parents=True)
    (root / "data" / "weights.bin").write_bytes(b"weights")
    with Repo.init(str(root), no_scm=True) as repo:
        with repo.config.edit() as config:
            config["remote"]["seed"] = {"url": str(tmp_path / "store")}
            config["core"]["remote"] = "seed"
        repo.add(str(root / "data"))
        repo.push()
    shutil.rmtree(root / "data")
    shutil.rmtree(root / ".dvc" / "cache")
    return root


def test_what_is_shipped_is_small() -> None:
    shipped = ROOT / "data-store"
    assert 0 < sum(path.stat().st_size for path in shipped.rglob("*") if path.is_file()) <= 25_000_000


def test_data_comes_from_the_remote_and_stays(repository: Path) -> None:
    assert (ensure_data(repository) / "weights.bin").read_bytes() == b"weights"
    with Repo(str(repository)) as repo:
        assert repo.status() == {}
    (repository.parent / "store").rename(repository.parent / "gone")
    assert (ensure_data(repository) / "weights.bin").exists()


def test_a_file_that_is_missing_is_fetched_again(repository: Path) -> None:
    ensure_data(repository)
    (repository / "data" / "weights.bin").unlink()
    assert (ensure_data(repository) / "weights.bin").read_bytes() == b"weights"


def test_several_may_fetch_at_once(repository: Path) -> None:
    fetch = [sys.executable, "-c", f"from pathlib import Path; from infra.data import ensure_data; ensure_data(Path({str(repository)!r}))"]
    fetching = [subprocess.Popen(fetch, cwd=ROOT) for _ in range(3)]
    assert [process.wait() for process in fetching] == [0, 0, 0]
    assert (repository / "data" / "weights.bin").read_bytes() == b"weights"


def test_a_missing_remote_is_named(repository: Path) -> None:
    shutil.rmtree(repository.parent / "store")
    with pytest.raises(MissingWeights, match=r"data/ cannot be made"):
        ensure_data(repository)


def test_a_missing_pointer_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingWeights, match=r"data\.dvc is missing"):
        ensure_data(tmp_path)


def test_weights_are_a_folder_below_the_repository_or_anywhere(tmp_path: Path) -> None:
    (tmp_path / "flux").mkdir()
    assert weights("flux", tmp_path) == weights(str(tmp_path / "flux"), tmp_path / "elsewhere") == tmp_path / "flux"
    with pytest.raises(MissingWeights, match="judge"):
        weights("judge", tmp_path)


def test_the_digest_is_remembered_until_a_file_changes(tmp_path: Path) -> None:
    folder, cache = tmp_path / "flux", tmp_path / "digests.json"
    folder.mkdir()
    (folder / "a.bin").write_bytes(b"1")
    first = weights_digest(folder, cache)
    assert first == directory_digest(folder)[0] == weights_digest(folder, cache)
    (folder / "a.bin").write_bytes(b"22")
    assert weights_digest(folder, cache) == directory_digest(folder)[0] != first


@pytest.mark.parametrize("left", ["", '{"ab": "c', "[]"])
def test_a_cut_memory_of_digests_is_written_anew(tmp_path: Path, left: str) -> None:
    folder, cache = tmp_path / "flux", tmp_path / "digests.json"
    folder.mkdir()
    (folder / "a.bin").write_bytes(b"1")
    cache.write_text(left)
    assert weights_digest(folder, cache) == directory_digest(folder)[0]
    assert list(json.loads(cache.read_text()).values()) == [directory_digest(folder)[0]]
    assert {path.name for path in tmp_path.iterdir()} == {"flux", "digests.json"}


@pytest.mark.parametrize("name", ["pytorch_model.bin", "unet.pt", "model.ckpt"])
def test_a_pickle_among_weights_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "weights" / "sub").mkdir(parents=True)
    (tmp_path / "weights" / "sub" / name).write_bytes(b"")
    with pytest.raises(BrokenWeights, match=f"{name} is a pickle"):
        weights("weights", tmp_path)
