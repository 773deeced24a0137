"""A home ready for Dagster: `.onereward/` (ONEREWARD_HOME moves it) with DAGSTER_HOME inside it, and the process' environment."""

from __future__ import annotations

import os
from pathlib import Path

from assets.settings import Settings
from infra.workspace import HOME_VARIABLE, STORE_VARIABLE, Workspace
from pipelines.config import PRESET_VARIABLE, load_settings, preset_path


def enter(preset: str | None, home: Path | None) -> tuple[Settings, Workspace]:
    """Choose preset and home for this process and its children, and write what Dagster needs there.

    Both go into the environment as absolute paths: Dagster's processes may work in another folder. Threads are set there too,
    so call this before torch is imported. Raises ConfigError.
    """
    settings = load_settings(preset)
    os.environ[STORE_VARIABLE] = os.environ.get(STORE_VARIABLE) or settings.store
    workspace = Workspace.from_env(home)
    os.environ[HOME_VARIABLE] = str(workspace.home)
    os.environ["DAGSTER_HOME"] = str(workspace.dagster_home)
    if name := preset or os.environ.get(PRESET_VARIABLE):
        os.environ[PRESET_VARIABLE] = str(preset_path(name).resolve()) if name.endswith((".yaml", ".yml")) else name
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[variable] = str(settings.threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("DVC_NO_ANALYTICS", "1")
    return settings, workspace
