"""Build a TensorRT engine from an exported policy, and run it where a GPU allows.

One code path, two modules with the same interface: classic `tensorrt` builds for the GPU it finds; without it,
TensorRT-RTX (`tensorrt_rtx_bindings`) builds on the CPU for the compute capabilities named in the config. An engine that
was never executed is `verified: false`, whoever names it.

    metrics = build_engine(EngineConfig(), onnx=Path("onnx"), out=Path("engine"), progress=Progress(print))
"""

from __future__ import annotations

import importlib
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
import torch
from torch import Tensor

from infra.progress import Progress
from models.config import OpConfig
from models.errors import ExportError
from ops import export_onnx
from ops.export_onnx import BATCH, IMAGE, OUTPUT, TEXT, open_session, relative_error, run_session
from ops.folders import write_metrics

FILE = "transformer.engine"
CLASSIC, RTX = "tensorrt", "tensorrt_rtx_bindings"


class EngineConfig(OpConfig):
    """For which GPUs and sizes the engine is built."""

    architectures: list[int] = pydantic.Field(
        [80, 86, 89, 120],
        min_length=1,
        description="Compute capabilities that TensorRT-RTX builds for (ours; it has no Hopper). Classic TensorRT builds for its own GPU.",
    )
    batch: list[int] = pydantic.Field([1, 2, 8], description="Smallest, usual and largest batch (ours).")
    image_tokens: list[int] = pydantic.Field(
        [4, 16, 256], description="Smallest, usual and largest number of image tokens, one per 16 x 16 pixels (ours)."
    )
    text_tokens: list[int] = pydantic.Field([1, 32, 512], description="Smallest, usual and largest number of text tokens (ours).")
    seed: int = pydantic.Field(0, description="Seed of the inputs that an executed engine is compared on (ours).")

    @pydantic.field_validator("batch", "image_tokens", "text_tokens")
    @classmethod
    def _range(cls, sizes: list[int]) -> list[int]:
        if len(sizes) != 3 or sizes[0] < 1 or sizes != sorted(sizes):
            raise ValueError(f"{sizes} is not smallest, usual, largest")
        return sizes

    def sizes(self) -> dict[str, list[int]]:
        """Ranges by the names that the ONNX file gives its axes."""
        return {BATCH: self.batch, IMAGE: self.image_tokens, TEXT: self.text_tokens}


@dataclass(frozen=True)
class Backend:
    """A TensorRT module and what it can do here."""

    module: Any  # `tensorrt` or `tensorrt_rtx_bindings`
    name: str
    gpu: int | None  # compute capability of the GPU in this machine, e.g. 89, or None without one


def find_backend() -> Backend:
    """Classic TensorRT where it and a GPU are present, else TensorRT-RTX. Raises ExportError when there is neither."""
    gpu = None
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        gpu = 10 * major + minor
    for name in (CLASSIC, RTX) if gpu else (RTX,):
        try:
            return Backend(importlib.import_module(name), name, gpu)
        except (ImportError, OSError):  # OSError: the bindings are there, their shared libraries are not
            continue
    raise ExportError(
        "Neither TensorRT nor TensorRT-RTX can be imported.",
        "Install the extra `cpu` (TensorRT-RTX, builds without a GPU), or on a data-center GPU the extra `gpu` (classic TensorRT).",
    )


def _logger(module: Any) -> Any:
    class Errors(module.ILogger):
        """Keeps the last errors, which TensorRT reports nowhere else."""

        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.lines: deque[str] = deque(maxlen=5)

        def log(self, severity: Any, message: str) -> None:
            if severity in (module.ILogger.Severity.ERROR, module.ILogger.Severity.INTERNAL_ERROR):
                self.lines.append(message)

    return Errors()


def _profile(builder: Any, network: Any, config: EngineConfig) -> Any:
    profile, sizes = builder.create_optimization_profile(), config.sizes()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        names = [tensor.get_dimension_name(axis) for axis in range(len(tensor.shape))]
        unknown = {name for name, size in zip(names, tensor.shape, strict=True) if size < 0} - sizes.keys()
        if unknown:
            raise ExportError(
                f"The ONNX input {tensor.name} varies along {sorted(map(str, unknown))}.", "Export it with ops/export_onnx.py."
            )
        profile.set_shape(
            tensor.name,
            *(tuple(sizes[name][i] if size < 0 else size for name, size in zip(names, tensor.shape, strict=True)) for i in range(3)),
        )
    return profile


def _target(backend: Backend, settings: Any, config: EngineConfig) -> list[int]:
    """Set what the engine is built for. Returns the compute capabilities."""
    if backend.name == CLASSIC:
        assert backend.gpu is not None
        return [backend.gpu]
    settings.num_compute_capabilities = len(config.architectures)  # first: setting one beyond it returns False
    known = backend.module.ComputeCapability.__members__
    for index, architecture in enumerate(config.architectures):
        name = f"SM{architecture}"
        if name not in known or not settings.set_compute_capability(known[name], index):
            raise ExportError(
                f"{backend.name} does not build for compute capability {architecture}.", f"Choose `architectures` among {', '.join(known)}."
            )
    return list(config.architectures)


def _build(backend: Backend, path: Path, config: EngineConfig) -> tuple[Any, list[int]]:
    module, logger = backend.module, _logger(backend.module)
    builder = module.Builder(logger)
    network = builder.create_network(1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = module.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        errors = "; ".join(parser.get_error(index).desc() for index in range(parser.num_errors))
        raise ExportError(
            f"{backend.name} cannot read {path}: {errors}.",
            "The file is cut, or it has an operator that this version lacks; export the policy again.",
        )
    settings = builder.create_builder_config()
    settings.add_optimization_profile(_profile(builder, network, config))
    architectures = _target(backend, settings, config)
    serialized = builder.build_serialized_network(network, settings)
    if serialized is None:  # no exception: the reason is in the log alone
        raise ExportError(
            f"{backend.name} {module.__version__} built no engine from {path}: {'; '.join(logger.lines) or 'no reason was logged'}.",
            "Check `architectures` and the size ranges, and that no other process fills the memory.",
        )
    return serialized, architectures


def execute(module: Any, serialized: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Deserialize an engine and run it once on the inputs' device. Returns the velocity [B, N, 64] in the graph's dtype.

    Raises ExportError with TensorRT's own reason when the engine is refused or does not run.
    """
    logger = _logger(module)
    engine = module.Runtime(logger).deserialize_cuda_engine(serialized)
    if engine is None:
        raise ExportError(f"The engine does not deserialize here: {'; '.join(logger.lines)}.", "Build it on this machine, for this GPU.")
    context = engine.create_execution_context()
    tensors = dict(inputs)
    for name, value in inputs.items():
        context.set_input_shape(name, tuple(value.shape))
    example = inputs["hidden_states"]
    tensors[OUTPUT] = torch.empty(tuple(context.get_tensor_shape(OUTPUT)), dtype=example.dtype, device=example.device)
    order = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    if not context.execute_v2([tensors[name].data_ptr() for name in order]):
        raise ExportError(f"The engine does not run here: {'; '.join(logger.lines)}.", "Free GPU memory, or lower the largest sizes.")
    return tensors[OUTPUT]


def measure(module: Any, serialized: Any, path: Path, config: EngineConfig, device: str) -> float:
    """Relative error of an executed engine against ONNX Runtime (CPU) on its own ONNX file, at the usual sizes."""
    session, sizes = open_session(path), config.sizes()
    generator = torch.Generator().manual_seed(config.seed)
    inputs = {}
    for entry in session.get_inputs():
        dtype = torch.float16 if entry.type == "tensor(float16)" else torch.float32
        shape = [sizes[size][1] if isinstance(size, str) else size for size in entry.shape]
        inputs[entry.name] = torch.rand(shape, generator=generator).to(dtype)
    answer = execute(module, serialized, {name: value.to(device) for name, value in inputs.items()})
    return relative_error(answer.cpu().float(), run_session(session, inputs))


def build_engine(config: EngineConfig, onnx: Path, out: Path, progress: Progress, backend: Backend | None = None) -> dict[str, Any]:
    """Write `out/transformer.engine` from the `onnx` artifact. `backend` is found by `find_backend` when not given.

    Returns `bytes`, `architectures`, `builder`, `builder_version`, `verified` (true only when the engine ran here and its
    `relative_error` to ONNX Runtime was measured) and `reason`. Raises ExportError.
    """
    backend = backend or find_backend()
    path = onnx / export_onnx.FILE
    if not path.is_file():
        raise ExportError(f"{path} does not exist.", "Export the policy again.")
    progress.say(f"engine: building with {backend.name} {backend.module.__version__}")
    serialized, architectures = _build(backend, path, config)
    (out / FILE).write_bytes(serialized)
    error = None
    if backend.gpu is None:
        reason = "built without a GPU; it was never executed"
    elif backend.gpu not in architectures:
        reason = f"built for compute capabilities {architectures}; this GPU has {backend.gpu}, so it was never executed"
    else:
        error = measure(backend.module, serialized, path, config, "cuda")
        reason = f"executed on compute capability {backend.gpu}"
    metrics = {
        "bytes": (out / FILE).stat().st_size,
        "architectures": architectures,
        "builder": backend.name,
        "builder_version": backend.module.__version__,
        "profile": config.sizes(),
        "verified": error is not None,
        "relative_error": error,
        "reason": reason,
    }
    state = f"relative error {error:.2e}" if error is not None else "unverified"
    progress.say(f"engine: {metrics['bytes'] / 1e6:.1f} MB for compute capabilities {architectures}, {state} ({reason})")
    write_metrics(out, metrics)
    return metrics
