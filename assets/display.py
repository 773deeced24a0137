"""What Dagster's UI shows of an artifact: its figures as numbers, its cells as tables, its small pictures inline.

Metadata is stored twice in the event log, so a picture goes in only up to 50 KB, made smaller where that helps.
"""

from __future__ import annotations

import base64
import io
import math
from pathlib import Path
from typing import Any

import dagster as dg
from PIL import Image

from ops.folders import read_metrics

INLINE_BYTES = 50_000
PICTURES = 8
ROWS = 60
PER_TASK = ("examples-", "grid-")  # pictures of which there is one per task: behind those that sum up


def describe(folder: Path) -> dict[str, Any]:
    """Metadata of an artifact's folder: flat figures, tables and pictures."""
    shown: dict[str, Any] = {}
    for name, value in _flat(read_metrics(folder)):
        if isinstance(value, list):
            shown[name] = dg.MetadataValue.md(table(value))
        else:
            shown[name] = value
    paths = sorted((folder / "pictures").glob("*.png"), key=lambda path: (path.stem.startswith(PER_TASK), path.stem))
    for path in paths[:PICTURES]:
        shown[f"picture {path.stem}"] = picture(path)
    return shown


def _flat(metrics: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Figures by dotted name; lists of rows stay lists; what Dagster cannot show (None, other lists) becomes text."""
    rows: list[tuple[str, Any]] = []
    for name, value in metrics.items():
        if isinstance(value, dict):
            rows.extend(_flat(value, f"{prefix}{name}."))
        elif value is not None and value != []:
            rows.append((prefix + name, value if _showable(value) else str(value)))
    return rows


def _showable(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(row, dict) for row in value)
    return isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value))


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as a markdown table; floats with four digits."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for row in rows[:ROWS]:
        cells = (row.get(name, "") for name in columns)
        lines.append("| " + " | ".join(f"{cell:.4g}" if isinstance(cell, float) else _text(cell) for cell in cells) + " |")
    if len(rows) > ROWS:
        lines.append(f"\n{len(rows) - ROWS} more in metrics.json")
    return "\n".join(lines)


def _text(cell: Any) -> str:
    """A cell that stays one: users' file names may hold what ends it."""
    return " ".join(str(cell).split()).replace("|", r"\|")


def picture(path: Path) -> dg.MetadataValue:
    """A picture inline as markdown: as it is, or else as WebP, made smaller until it fits."""
    payload, kind = path.read_bytes(), "png"
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    while len(payload) * 4 / 3 > INLINE_BYTES:
        if kind == "webp":
            image = image.resize((max(1, image.width * 3 // 4), max(1, image.height * 3 // 4)), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", quality=80)
        payload, kind = buffer.getvalue(), "webp"
    return dg.MetadataValue.md(f"![{path.stem}](data:image/{kind};base64,{base64.b64encode(payload).decode()})")
