"""Rates, intervals and tables as the pages write them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ops.evaluate import EvaluateConfig

NONE = "–"


def rate(value: float | None, digits: int = 2) -> str:
    """Without the leading zero, as rates are written here; counts as they are."""
    if value is None:
        return NONE
    if isinstance(value, int):
        return str(value)
    return f"{value:.{digits}f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.{digits}f}"


def interval(row: dict[str, Any] | None, name: str = "win_rate", lo: str = "lo", hi: str = "hi") -> str:
    """A rate with its interval."""
    if row is None or row[name] is None:
        return NONE
    return f"{rate(row[name])} ({rate(row[lo])} to {rate(row[hi])})"


def table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [columns, ["---"] * len(columns), *lines])


def sampling(preset: Mapping[str, Any]) -> str:
    """How the evaluation of a recorded preset samples edits, in words."""
    how = EvaluateConfig(**preset["stages"].get("evaluation", {}))
    guided = f"`true_cfg` {how.true_cfg:g}, negative prompt {how.negative_prompt!r}" if how.true_cfg > 1 else "no guidance"
    return f"{how.steps} steps, {guided}"
