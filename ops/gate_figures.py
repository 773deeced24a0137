"""Figures out of an artifact's metrics, as its gates read them: what is absent, of another type or not finite is no figure.

number(metrics, "mean_accuracy"), rows(metrics, "cells"), lowest(rows(metrics, "cells"))
"""

from __future__ import annotations

import math
from typing import Any

Metrics = dict[str, Any]


def number(figures: Metrics, name: str) -> float | None:
    """A finite number, or None."""
    value = figures.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def section(figures: Metrics, name: object) -> Metrics:
    """A table of figures under a name; empty where there is none."""
    value = figures.get(name) if isinstance(name, str) else None
    return value if isinstance(value, dict) else {}


def rows(figures: Metrics, name: str) -> list[Metrics]:
    """A list of tables of figures; empty where there is none."""
    value = figures.get(name)
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []


def lowest(found: list[Metrics]) -> Metrics:
    """The row with the lowest lower bound, one without a bound first; empty where there is no row."""
    return min(found, key=lambda row: either(number(row, "lo"), -math.inf), default={})


def cell_name(row: Metrics) -> str:
    """Task and dimension of a row."""
    return f"{row.get('task')}/{row.get('dimension')}" if row else "no cell"


def minus(value: float | None, other: float | None) -> float | None:
    """The difference, where there are both."""
    return None if value is None or other is None else value - other


def either(value: float | None, otherwise: float) -> float:
    """A figure, or what stands for none."""
    return otherwise if value is None else value


def broken(value: Any) -> int:
    """How many numbers in a JSON value are not finite."""
    if isinstance(value, dict):
        return sum(map(broken, value.values()))
    if isinstance(value, list):
        return sum(map(broken, value))
    return int(isinstance(value, float) and not math.isfinite(value))
