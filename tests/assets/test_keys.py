"""What else a stage's result depends on is part of its key: weights named in its configuration, the user's files, builders."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from assets import common
from assets import engine as engine_asset
from assets import onnx as onnx_asset
from assets.common import Stage, Work, work_key
from assets.curated_dataset import curated_dataset
from assets.engine import engine
from assets.evaluation import evaluation
from assets.onnx import onnx
from assets.policy import policy
from assets.reward_model import reward_model
from assets.settings import Settings
from assets.source_images import source_images
from infra.progress import Progress
from infra.stores.base import ArtifactRef
from infra.workspace import Workspace
from models.config import OpConfig
from models.errors import MissingWeights
from models.taxonomy import Taxonomy
from ops.build_engine import Backend, EngineConfig
from ops.curate import CurateConfig
from ops.evaluate import EvaluateConfig
from ops.export_onnx import OnnxConfig
from ops.fit_reward import FitRewardConfig
from ops.folders import write_metrics
from ops.policy_config import TrainPolicyConfig
from ops.source import SourceConfig

MEASURING = ("pillow", "scikit-image", "scipy", "rapidocr", "matplotlib")


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    for kind in ("flux", "judge"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "weights").write_bytes(b"base")
    (tmp_path / "home").mkdir()
    return Workspace(tmp_path / "home")


def key(workspace: Workspace, stage: Stage, config: OpConfig, threads: int = 1, refs: dict[str, ArtifactRef] | None = None) -> str:
    base = workspace.home.parent
    return work_key(
        Work(
            stage=stage,
            config=config,
            settings=Settings(preset="test", flux=str(base / "flux"), judge=str(base / "judge"), threads=threads),
            workspace=workspace,
            store=workspace.store,
            taxonomy=Taxonomy.load(),
            progress=Progress(),
            refs=refs or {},
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


@pytest.mark.parametrize(
    ("stage", "config", "library"),
    [
        *((evaluation, EvaluateConfig(), library) for library in MEASURING),
        *((policy, TrainPolicyConfig(), library) for library in MEASURING),
        (reward_model, FitRewardConfig(), "scipy"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_libraries_that_measure_count(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, stage: Stage, config: OpConfig, library: str
) -> None:
    installed, first = importlib.metadata.version, key(workspace, stage, config)
    assert key(workspace, stage, config) == first
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "99.0" if name == library else installed(name))
    assert key(workspace, stage, config) != first


@pytest.mark.parametrize(("stage", "config"), [(evaluation, EvaluateConfig()), (policy, TrainPolicyConfig())], ids=["evaluation", "policy"])
@pytest.mark.parametrize("runtime", ["onnxruntime", "cv2"])
def test_what_reads_the_words_counts_whichever_distribution_it_comes_in(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, runtime: str, stage: Stage, config: OpConfig
) -> None:
    first = key(workspace, stage, config)
    monkeypatch.setattr(common, runtime, SimpleNamespace(__version__="99.0"))
    assert key(workspace, stage, config) != first


def test_the_policy_that_is_exported_counts(workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule that names the winner may change while policies and evaluation stay."""
    refs = {}
    for name in ("policy-static", "policy-ema", "evaluation"):
        (tmp_path / name).mkdir()
        write_metrics(tmp_path / name, {"name": name, "best_mode": "ema"})
        refs[name] = workspace.store.put(name, tmp_path / name)
    first = key(workspace, onnx, OnnxConfig(), refs=refs)
    assert key(workspace, onnx, OnnxConfig(), refs=refs) == first
    monkeypatch.setattr(onnx_asset, "winner", lambda work: "policy-static")
    assert key(workspace, onnx, OnnxConfig(), refs=refs) != first
