"""A home ready for Dagster: `.onereward/` (ONEREWARD_HOME moves it) with DAGSTER_HOME inside it, and the process' environment."""

from __future__ import annotations

import os
from pathlib import Path

from assets.settings import Settings
from infra.workspace import HOME_VARIABLE, Workspace
from pipelines.config import PRESET_VARIABLE, load_settings, preset_path


def enter(preset: str | None, home: Path | None) -> tuple[Settings, Workspace]:
    """Choose preset and home for this process and its children, and write what Dagster needs there.

    Threads are set in the environment, so call this before torch is imported. Raises ConfigError.
    """
    settings = load_settings(preset)
    if preset:
        os.environ[PRESET_VARIABLE] = str(preset_path(preset).resolve()) if preset.endswith((".yaml", ".yml")) else preset
    if home:
        os.environ[HOME_VARIABLE] = str(home.resolve())
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[variable] = str(settings.threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("DVC_NO_ANALYTICS", "1")
    workspace = Workspace.from_env()
    os.environ["DAGSTER_HOME"] = str(workspace.dagster_home)
    return settings, workspace
