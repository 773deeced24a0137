"""How sure a gate's figure is: its interval and the number of cases behind it, where the artifact's metrics hold them.

    gates = with_estimates(gates, metrics)

Most gates count or compare and need none: a leak, a broken file, the error of a graph are what they are.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from ops.gate import Gate

Metrics = dict[str, Any]
# Gate -> the figures it was estimated from, and what stands before `lo` and `hi` there.
FIGURES = {
    "judge_accuracy": ("artifact", ""),
    "sealed_judge_accuracy": ("judge", ""),
    "win_rate": ("policy", "mean_"),
    "win_rate_lo": ("policy", "mean_"),
    "confirming_lo": ("policy", "confirming_mean_"),
    "not_below_production": ("rival", "mean_"),
    "task_lo": ("worst_task", ""),
    "cell_lo": ("worst_cell", ""),
    "production_cell_lo": ("worst_rival_cell", ""),
}


def with_estimates(gates: list[Gate], metrics: Metrics) -> list[Gate]:
    """The gates with interval and n. A figure that is absent or not finite gives none."""
    policy, rival = _of_best(metrics, "policy"), _of_best(metrics, "against_production")
    figures = {
        "artifact": metrics,
        "judge": _dict(metrics.get("judge")),
        "policy": policy,
        "rival": rival,
        "worst_task": _lowest(policy.get("tasks")),
        "worst_cell": _lowest(policy.get("cells")),
        "worst_rival_cell": _lowest(rival.get("cells")),
    }
    return [_estimated(gate, figures[FIGURES[gate.name][0]], FIGURES[gate.name][1]) if gate.name in FIGURES else gate for gate in gates]


def _estimated(gate: Gate, figures: Metrics, prefix: str) -> Gate:
    low, high, count = _finite(figures.get(f"{prefix}lo")), _finite(figures.get(f"{prefix}hi")), _finite(figures.get("n"))
    interval = (low, high) if low is not None and high is not None else None
    return dataclasses.replace(gate, interval=interval, n=int(count) if count is not None else None)


def _of_best(metrics: Metrics, name: str) -> Metrics:
    return _dict(_dict(metrics.get(name)).get(str(metrics.get("best_mode"))))


def _lowest(rows: Any) -> Metrics:
    """The row with the lowest lower bound, on which a gate over all rows rests."""
    found = [row for row in rows if isinstance(row, dict) and _finite(row.get("lo")) is not None] if isinstance(rows, list) else []
    return min(found, key=lambda row: row["lo"], default={})


def _dict(value: Any) -> Metrics:
    return value if isinstance(value, dict) else {}


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) else None
