"""Stage 9: the better policy's transformer as ONNX."""

from __future__ import annotations

from typing import Any

import onnxruntime

from assets.common import Work, stage
from assets.winner import winner
from ops.export_onnx import OnnxConfig, export_onnx


def _exported(work: Work) -> dict[str, str]:
    """The policy that is exported, and ONNX Runtime, in which parity is measured; it comes as one of two distributions."""
    return {"policy": work.refs[winner(work)].digest, "onnxruntime": onnxruntime.__version__}


@stage(
    config=OnnxConfig,
    parents=("policy", "evaluation"),
    group="export",
    kinds={"onnx"},
    models=("flux",),
    libraries=("onnx", "onnxscript"),
    depends=_exported,
)
def onnx(work: Work) -> dict[str, Any]:
    """The transformer with dynamic batch and lengths, and its parity with torch in ONNX Runtime."""
    return export_onnx(work.config, work.flux, work.inputs[winner(work)], work.out, work.progress)
