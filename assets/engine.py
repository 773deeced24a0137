"""Stage 10: a TensorRT engine from the ONNX graph."""

from __future__ import annotations

from typing import Any

import dagster as dg

from assets.common import Made, Work, stage
from assets.display import table
from ops.build_engine import EngineConfig, build_engine, find_backend
from ops.folders import read_metrics


def _builder(work: Work) -> dict[str, str]:
    """Another TensorRT builds another engine, and only a GPU can execute it: one built elsewhere is not reused as if it had run here."""
    backend = find_backend()
    return {"builder": f"{backend.name} {backend.module.__version__}", "gpu": str(backend.gpu)}


def _tables(work: Work, made: Made) -> dict[str, Any]:
    """For which GPUs and sizes it was built, and whether it ever ran."""
    built = read_metrics(made.folder)
    engine = {
        "builder": f"{built['builder']} {built['builder_version']}",
        "MB": built["bytes"] / 1e6,
        "compute capabilities": ", ".join(map(str, built["architectures"])),
        "state": "verified" if built["verified"] else "unverified",
        "why": built["reason"],
    }
    sizes = [
        {"axis": axis.replace("_", " "), "smallest": low, "usual": usual, "largest": high}
        for axis, (low, usual, high) in built["profile"].items()
    ]
    return {"engine": dg.MetadataValue.md(table([engine])), "sizes": dg.MetadataValue.md(table(sizes))}


@stage(
    config=EngineConfig,
    parents=("onnx",),
    group="export",
    kinds={"tensorrt"},
    gpu=True,
    depends=_builder,
    finish=_tables,
)
def engine(work: Work) -> dict[str, Any]:
    """Built for the architectures in the preset; `unverified` wherever it was never executed."""
    return build_engine(work.config, work.inputs["onnx"], work.out, work.progress)
