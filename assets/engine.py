"""Stage 10: a TensorRT engine from the ONNX graph."""

from __future__ import annotations

from typing import Any

from assets.common import Work, stage
from ops.build_engine import EngineConfig, build_engine


@stage(config=EngineConfig, parents=("onnx",), group="export", kinds={"tensorrt"}, gpu=True)
def engine(work: Work) -> dict[str, Any]:
    """Built for the architectures in the preset; `unverified` wherever it was never executed."""
    return build_engine(work.config, work.inputs["onnx"], work.out, work.progress)
