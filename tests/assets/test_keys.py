"""What else a stage's result depends on is part of its key: weights named in its configuration, the user's files, builders."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from assets import engine as engine_asset
from assets.common import Stage, Work, work_key
from assets.curated_dataset import curated_dataset
from assets.engine import engine
from assets.settings import Settings
from assets.source_images import source_images
from infra.progress import Progress
from infra.workspace import Workspace
from models.config import OpConfig
from models.errors import MissingWeights
from models.taxonomy import Taxonomy
from ops.build_engine import Backend, EngineConfig
from ops.curate import CurateConfig
from ops.source import SourceConfig


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    (tmp_path / "flux").mkdir()
    (tmp_path / "flux" / "weights").write_bytes(b"base")
    (tmp_path / "home").mkdir()
    return Workspace(tmp_path / "home")


def key(workspace: Workspace, stage: Stage, config: OpConfig, threads: int = 1) -> str:
    return work_key(
        Work(
            stage=stage,
            config=config,
            settings=Settings(preset="test", flux=str(workspace.home.parent / "flux"), judge="none", threads=threads),
            workspace=workspace,
            store=workspace.store,
            taxonomy=Taxonomy.load(),
            progress=Progress(),
            refs={},
            out=workspace.home,
            scratch=workspace.home,
            run_id="run",
        )
    )


def test_a_clip_embedder_counts_by_its_bytes(workspace: Workspace, tmp_path: Path) -> None:
    clip = tmp_path / "clip"
    clip.mkdir()
    (clip / "model.safetensors").write_bytes(b"1")
    config = CurateConfig(embedder=str(clip))
    first = key(workspace, curated_dataset, config)
    assert key(workspace, curated_dataset, config) == first
    (clip / "model.safetensors").write_bytes(b"22")
    assert key(workspace, curated_dataset, config) != first
    with pytest.raises(MissingWeights, match="nowhere"):
        key(workspace, curated_dataset, CurateConfig(embedder=str(tmp_path / "nowhere")))


def test_the_bases_own_embedder_counts_with_the_base(workspace: Workspace, tmp_path: Path) -> None:
    first = key(workspace, curated_dataset, CurateConfig())
    (tmp_path / "flux" / "weights").write_bytes(b"another base")
    assert key(workspace, curated_dataset, CurateConfig()) != first


def test_the_users_pictures_and_manifest_count(workspace: Workspace, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.new("RGB", (64, 64), "red").save(folder / "a.png")
    (folder / "m.jsonl").write_text('{"image": "a.png"}\n')
    for path in (folder, folder / "m.jsonl"):
        config = SourceConfig(path=str(path))
        first = key(workspace, source_images, config)
        assert key(workspace, source_images, config) == first
        Image.new("RGB", (64, 64), "blue" if path == folder else "lime").save(folder / "a.png")
        assert key(workspace, source_images, config) != first


def test_an_engine_counts_by_builder_and_gpu(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """One built without a GPU is unverified; on a machine that can execute it, it is built and measured anew."""

    def with_backend(name: str, version: str, gpu: int | None) -> str:
        backend = Backend(SimpleNamespace(__version__=version), name, gpu)
        monkeypatch.setattr(engine_asset, "find_backend", lambda: backend)
        return key(workspace, engine, EngineConfig())

    first = with_backend("tensorrt_rtx_bindings", "1.7", None)
    assert with_backend("tensorrt_rtx_bindings", "1.7", None) == first
    others = {with_backend("tensorrt_rtx_bindings", "1.8", None), with_backend("tensorrt_rtx_bindings", "1.7", 89)}
    assert len(others | {with_backend("tensorrt", "1.7", 89), first}) == 4


def test_threads_are_no_part_of_a_key(workspace: Workspace) -> None:
    assert key(workspace, source_images, SourceConfig(), threads=1) == key(workspace, source_images, SourceConfig(), threads=2)
