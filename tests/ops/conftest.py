"""What several op tests start from: tracing the transformer takes ten seconds, so it is exported once per session."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from infra.progress import Progress
from ops.export_onnx import OnnxConfig, export_onnx
from ops.folders import save_picture
from tests.models.tiny import save_tiny_flux, tiny_transformer


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole pipeline folder with random weights."""
    return save_tiny_flux(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def tiny_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy artifact's `transformer/`, with other weights than the base's, and its picture."""
    folder = tmp_path_factory.mktemp("policy")
    tiny_transformer(seed=1).save_pretrained(folder / "transformer")
    save_picture(folder, "before_after", Image.new("RGB", (8, 8)))
    return folder


@pytest.fixture(scope="session")
def exported_onnx(tiny_base: Path, tiny_policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `onnx` artifact of `tiny_policy`."""
    out = tmp_path_factory.mktemp("onnx")
    export_onnx(OnnxConfig(), tiny_base, tiny_policy, out, Progress())
    return out
