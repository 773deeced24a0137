"""What every artifact folder holds besides its payload: `metrics.json` and `pictures/`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from models.errors import UnknownVersion


def write_metrics(out: Path, metrics: dict[str, Any]) -> None:
    """Write `metrics.json` (sorted keys: equal figures give equal bytes)."""
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2, sort_keys=True) + "\n")


def read_metrics(folder: Path) -> dict[str, Any]:
    """Read an artifact's `metrics.json`. Raises UnknownVersion when the folder is no artifact."""
    path = folder / "metrics.json"
    if not path.exists():
        raise UnknownVersion(f"{folder} holds no metrics.json.", "It is not an artifact of this chain, or it is incomplete; make it again.")
    return json.loads(path.read_text())


def save_picture(out: Path, name: str, picture: Figure | Image.Image) -> Path:
    """Save a plot or a picture as `pictures/<name>.png` and return its path."""
    path = out / "pictures" / f"{name}.png"
    path.parent.mkdir(exist_ok=True)
    if isinstance(picture, Figure):
        picture.savefig(path, dpi=80, bbox_inches="tight", metadata={"Software": None})
    else:
        picture.save(path)
    return path
