"""How sure a gate's figure is: its interval, the number of cases behind it, and how many its margin needs.

    gates = with_estimates(gates, metrics)
    sample(policy, "mean_se", 0.05)                   # "; n 189, needed 37 for margin 0.05 at 80% power"

Most gates count or compare and need none: a leak, a broken file, the error of a graph are what they are.
"""

from __future__ import annotations

import dataclasses
import math

from ops.gate import Gate
from ops.gate_figures import Metrics, cell_name, lowest, number, rows, section
from ops.statistics import sample_size
from ops.win_rates import BASE

POWER = 0.8  # ours: the power that printed sample sizes give
# Gate -> the figures it was estimated from, and what stands before `lo` and `hi` there.
FIGURES = {
    "judge_accuracy": ("artifact", ""),
    "sealed_judge_accuracy": ("judge", ""),
    "win_rate": ("policy", "mean_"),
    "win_rate_lo": ("policy", "mean_"),
    "confirming_lo": ("policy", "confirming_mean_"),
    "second_judge_lo": ("second", ""),
    "not_below_production": ("rival", "mean_"),
    "task_lo": ("worst_task", ""),
    "cell_lo": ("worst_cell", ""),
    "production_cell_lo": ("worst_rival_cell", ""),
}


def with_estimates(gates: list[Gate], metrics: Metrics) -> list[Gate]:
    """The gates with interval and n. A figure that is absent or not finite gives none."""
    mode = metrics.get("best_mode")
    policy, rival = (section(section(metrics, name), mode) for name in ("policy", "against_production"))
    figures = {
        "artifact": metrics,
        "judge": section(metrics, "judge"),
        "policy": policy,
        "rival": rival,
        "second": section(section(section(metrics, "second_judge"), BASE), mode),
        "worst_task": lowest([row for row in rows(policy, "tasks") if number(row, "n")]),
        "worst_cell": lowest(rows(policy, "cells")),
        "worst_rival_cell": lowest(rows(rival, "cells")),
    }
    return [_estimated(gate, figures[FIGURES[gate.name][0]], FIGURES[gate.name][1]) if gate.name in FIGURES else gate for gate in gates]


def _estimated(gate: Gate, figures: Metrics, prefix: str) -> Gate:
    low, high, count = number(figures, f"{prefix}lo"), number(figures, f"{prefix}hi"), number(figures, "n")
    interval = (low, high) if low is not None and high is not None else None
    return dataclasses.replace(gate, interval=interval, n=int(count) if count is not None else None)


def sample(row: Metrics, se: str, margin: float, alpha: float = 0.025, power: float = POWER) -> str:
    """What to print beside a bound: how many were counted, and how many show `margin` with that power at this spread.

    Not beside a point estimate that has to reach a threshold: of a truth on the threshold half pass, however many are counted.
    """
    count, needed = number(row, "n"), _needed(row, se, margin, alpha, power)
    return f"; n {count:.0f}, needed {needed} for margin {margin:.2f} at {power:.0%} power" if count and needed else ""


def largest_sample(found: list[Metrics], margin: float, alpha: float = 0.025, *, all_pass: bool = False) -> str:
    """`sample` of the row that lacks most. Where all rows have to pass, each needs a power of .80^(1/rows) for .80 together."""
    power = POWER ** (1 / max(1, len(found))) if all_pass else POWER
    lacking = max(found, key=lambda row: (_needed(row, "se", margin, alpha, power) or 0) / (number(row, "n") or 1), default={})
    told = sample(lacking, "se", margin, alpha, power)
    where = cell_name(lacking) if "dimension" in lacking else lacking.get("task")
    return f"{told} ({where}, which lacks most)" if told else ""


def _needed(row: Metrics, se: str, margin: float, alpha: float, power: float) -> int | None:
    count, error = number(row, "n"), number(row, se)
    if not count or error is None or margin <= 0:
        return None
    origins = number(row, "origins")
    return sample_size(error * math.sqrt(count), margin, alpha=alpha, power=power, per_source=count / origins if origins else 1.0)
