"""Definitions, presets, commands; and a released pipeline for Python code.

from pipelines import load_released
pipe = load_released("production")                       # a verified FluxFillCFGPipeline, on the default device
settings = {"height": 64, "width": 64, "true_cfg": 3.0}  # and so on, as the release's card names them
pipe(prompt="a red circle", image=image, mask_image=mask, **settings).images[0]
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from models.flux_fill.pipeline import FluxFillCFGPipeline


def load_released(source: str = "production", home: Path | None = None) -> FluxFillCFGPipeline:
    """The pipeline of the release a stage points to, or of the release with a digest (8 digits or more).

    Its signature is verified before a weight is read, and behind a stage the evidence and the audit log. `home` is where versions
    are kept; else ONEREWARD_HOME, else .onereward. Raises UnknownVersion, ConfigError, SignatureRefused, AuditBroken, DigestMismatch,
    MissingWeights, BrokenWeights.
    """
    from infra.workspace import Workspace
    from models.device import default_device
    from models.flux_fill.loading import load_pipeline
    from ops.verify import released

    workspace = Workspace.from_env(home)
    pipe = load_pipeline(released(workspace.store, workspace.keys, source) / "model")
    pipe.to(default_device())
    return pipe
