"""The toy preset with its tiny base weights, written to a folder.

preset = write_toy(tmp_path)                      # path for --preset or ONEREWARD_PRESET
preset = write_toy(tmp_path, gates={"min_win_rate": 1.0})
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tests.models.tiny import save_tiny_flux
from tests.models.tiny_judge import save_tiny_judge

TOY = Path(__file__).with_name("toy.yaml")


def write_toy(folder: Path, weights: Path | None = None, **sections: Any) -> Path:
    """Write `toy.yaml` and, unless `weights` of an earlier call are given, its base weights into `folder`; a section is merged in."""
    preset = yaml.safe_load(TOY.read_text())
    weights = weights or folder
    if not (weights / "flux").exists():
        save_tiny_flux(weights / "flux")
        save_tiny_judge(weights / "judge")
    preset["models"] = {"flux": str(weights / "flux"), "judge": str(weights / "judge")}
    for name, value in sections.items():
        preset[name] = {**preset.get(name, {}), **value} if isinstance(value, dict) else value
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump(preset))
    return path
