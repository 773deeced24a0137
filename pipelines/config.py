"""Presets: YAML files that say which weights, which sizes and which thresholds a chain runs with.

    load_settings("mini")                # pipelines/presets/mini.yaml
    load_settings("my/preset.yaml")      # a file of the same form; `extends: mini` starts from another preset
    load_settings()                      # what ONEREWARD_PRESET names, else mini

A section per stage holds that stage's op configuration; `models`, `gates` and a few scalars (assets/settings.py) go beside them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pydantic
import yaml

from assets.settings import Settings, reasons
from models.errors import ConfigError

PRESETS = Path(__file__).with_name("presets")
PRESET_VARIABLE = "ONEREWARD_PRESET"
DEFAULT = "mini"


def preset_path(name: str) -> Path:
    """The file of a preset given by name or by path. Raises ConfigError listing the names."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else PRESETS / f"{name}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(preset.stem for preset in PRESETS.glob("*.yaml")))
        raise ConfigError(f"There is no preset {name!r}.", f"Use one of {names}, or the path of a YAML file.")
    return path


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} is not readable YAML: {error}.", "Correct the file.") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} is not a preset: it holds no sections.", f"Compare it with {PRESETS / DEFAULT}.yaml.")
    parent = raw.pop("extends", None)
    return _merge(_read(preset_path(parent)), raw) if parent else raw


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Sections are merged key by key; anything else is replaced."""
    merged = dict(base)
    for name, value in over.items():
        merged[name] = {**base[name], **value} if isinstance(value, dict) and isinstance(base.get(name), dict) else value
    return merged


def load_settings(preset: str | None = None) -> Settings:
    """The resolved preset. Raises ConfigError naming the file and the field."""
    name = preset or os.environ.get(PRESET_VARIABLE) or DEFAULT
    path = preset_path(name)
    raw = _read(path)
    models = raw.pop("models", None) or {}
    own = {key: raw.pop(key) for key in list(raw) if key in Settings.model_fields}
    sections = {key: raw[key] or {} for key in raw}
    try:
        return Settings(preset=path.stem, **models, **own, stages=sections)
    except pydantic.ValidationError as error:
        raise ConfigError(f"{path} is not a usable preset: {reasons(error)}.", f"Compare it with {PRESETS / DEFAULT}.yaml.") from error
