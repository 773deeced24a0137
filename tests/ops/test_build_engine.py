"""Engines: real ones built by TensorRT-RTX on the CPU, builds that cannot be, and how an executed engine is measured."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pydantic
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from infra.progress import Progress
from models.errors import ExportError
from ops.build_engine import RTX, Backend, EngineConfig, build_engine, execute, find_backend, measure
from ops.export_onnx import open_session
from ops.folders import read_metrics

rtx = pytest.importorskip(RTX)
CPU = Backend(rtx, RTX, gpu=None)
SMALL = {"image_tokens": [4, 16, 64], "text_tokens": [1, 8, 16]}


def test_builds_a_real_engine_and_says_that_it_never_ran(exported_onnx: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    metrics = build_engine(EngineConfig(architectures=[80, 89], **SMALL), exported_onnx, tmp_path, Progress(lines.append), CPU)
    engine = (tmp_path / "transformer.engine").read_bytes()
    assert metrics["bytes"] == len(engine) > 100_000  # the weights are in it
    assert (metrics["architectures"], metrics["builder"], metrics["builder_version"]) == ([80, 89], RTX, rtx.__version__)
    assert metrics["verified"] is False and metrics["relative_error"] is None and "never executed" in metrics["reason"]
    assert "unverified" in lines[-1]
    assert read_metrics(tmp_path) == metrics


def test_a_gpu_that_the_engine_was_not_built_for_verifies_nothing(exported_onnx: Path, tmp_path: Path) -> None:
    metrics = build_engine(EngineConfig(architectures=[86], **SMALL), exported_onnx, tmp_path, Progress(), Backend(rtx, RTX, gpu=90))
    assert metrics["verified"] is False and "this GPU has 90" in metrics["reason"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="refused only where no driver is")
def test_an_engine_that_cannot_be_deserialized_is_an_error(exported_onnx: Path, tmp_path: Path) -> None:
    build_engine(EngineConfig(architectures=[86], **SMALL), exported_onnx, tmp_path, Progress(), CPU)
    with pytest.raises(ExportError, match=r"does not deserialize here: .*"):
        execute(rtx, (tmp_path / "transformer.engine").read_bytes(), {})


@pytest.mark.parametrize("architecture", [90, 1])
def test_an_architecture_that_the_builder_lacks_is_named(exported_onnx: Path, tmp_path: Path, architecture: int) -> None:
    with pytest.raises(ExportError, match=f"compute capability {architecture}.*SM80"):
        build_engine(EngineConfig(architectures=[80, architecture], **SMALL), exported_onnx, tmp_path, Progress(), CPU)
    assert not list(tmp_path.iterdir())


def test_a_failed_build_reports_the_builder_log(tmp_path: Path) -> None:
    """A graph that fits one batch only, so that no engine can cover a range."""
    info = helper.make_tensor_value_info
    nodes = [helper.make_node("Reshape", ["hidden_states", "shape"], ["velocity"])]
    given, made = info("hidden_states", TensorProto.FLOAT, ["batch", 4]), info("velocity", TensorProto.FLOAT, [3, 4])
    graph = helper.make_graph(nodes, "fixed", [given], [made], [numpy_helper.from_array(np.array([3, 4]), "shape")])
    (tmp_path / "engine").mkdir()
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "transformer.onnx")
    with pytest.raises(ExportError, match=r"built no engine from .*transformer.onnx: .*[Rr]eshape"):
        build_engine(EngineConfig(batch=[1, 2, 8]), tmp_path, tmp_path / "engine", Progress(), CPU)
    assert not list((tmp_path / "engine").iterdir())


def test_a_cut_file_is_named(exported_onnx: Path, tmp_path: Path) -> None:
    whole = (exported_onnx / "transformer.onnx").read_bytes()
    (tmp_path / "onnx").mkdir()
    (tmp_path / "engine").mkdir()
    (tmp_path / "onnx" / "transformer.onnx").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ExportError, match=r"cannot read .*transformer.onnx: .*Failed to parse"):
        build_engine(EngineConfig(), tmp_path / "onnx", tmp_path / "engine", Progress(), CPU)
    assert not list((tmp_path / "engine").iterdir())


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"transformer.onnx does not exist"):
        build_engine(EngineConfig(), tmp_path, tmp_path, Progress(), CPU)


def test_without_tensorrt_the_extras_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, RTX, None)
    with pytest.raises(ExportError, match=r"extra `cpu`.*extra `gpu`"):
        find_backend()


def test_classic_tensorrt_is_taken_only_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    classic = SimpleNamespace()
    monkeypatch.setitem(sys.modules, "tensorrt", classic)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_backend() == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert find_backend() == Backend(classic, "tensorrt", gpu=90)


@pytest.mark.parametrize("wrong", [{"batch": [2, 1, 4]}, {"image_tokens": [16]}, {"text_tokens": [0, 1, 2]}, {"architectures": []}])
def test_ranges_that_are_none_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(pydantic.ValidationError):
        EngineConfig(**wrong)


class OrtRuntime:
    """TensorRT's runtime interface over ONNX Runtime and host memory: no machine that builds this project has a GPU.

    The "engine" is the path of an ONNX file; `scale` falsifies its answers.
    """

    def __init__(self, scale: float = 1.0, runs: bool = True):
        self.scale, self.runs, self.shapes = scale, runs, {}

    def __call__(self, logger: Any) -> OrtRuntime:
        return self

    def deserialize_cuda_engine(self, path: Path) -> OrtRuntime:
        self.session = open_session(path)
        self.names = ["velocity", *(entry.name for entry in self.session.get_inputs())]  # the output is not always last
        self.num_io_tensors = len(self.names)
        return self

    def create_execution_context(self) -> OrtRuntime:
        return self

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> None:
        self.shapes[name] = shape

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (*self.shapes["hidden_states"][:2], 64)

    def execute_v2(self, pointers: list[int]) -> bool:
        def view(name: str) -> np.ndarray:
            address = ctypes.cast(pointers[self.names.index(name)], ctypes.POINTER(ctypes.c_float))
            shape = self.get_tensor_shape(name) if name == "velocity" else self.shapes[name]
            return np.ctypeslib.as_array(address, shape)

        view("velocity")[:] = self.scale * self.session.run(None, {name: view(name) for name in self.names[1:]})[0]
        return self.runs


def test_an_executed_engine_is_compared_with_onnx_runtime(exported_onnx: Path) -> None:
    path = exported_onnx / "transformer.onnx"

    def stand_in(**how: Any) -> SimpleNamespace:
        return SimpleNamespace(Runtime=OrtRuntime(**how), ILogger=rtx.ILogger)

    assert measure(stand_in(), path, path, EngineConfig(**SMALL), "cpu") == 0
    assert measure(stand_in(scale=1.5), path, path, EngineConfig(**SMALL), "cpu") == pytest.approx(0.5)
    with pytest.raises(ExportError, match="does not run here"):
        measure(stand_in(runs=False), path, path, EngineConfig(**SMALL), "cpu")
