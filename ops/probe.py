"""Hacking probe: does the judge's opinion of a policy rise while an independent metric falls? (docs/statistics.md)

    rows = read_checkpoints(folder / "checkpoints.jsonl")
    found = hacked(rows, level=0.05)                  # [] or findings, worst first
    found[0].told                                     # "judge up 0.65 to 0.80, truth down 0.44 to 0.21 between steps 12 and 48 in ..."

The rows are validation edits of a policy at several steps of its training, each against the base's edit of the same condition
from the same noise: the judge that rewards says P(Yes), a second judge says the same, where the truth is known an acceptance
measure says 1, 1/2 or 0, and so does, in some dimensions, a measure that needs no target. The metric is the truth where it is known,
else both of the others. The base at step 0 (where all of them are 1/2 by definition) and up to `STARTS` earlier checkpoints are
compared with the one that is delivered, over the same conditions: in every cell, every task, every dimension and all tasks
together. The bootstrap draws whole origins, and Holm's correction runs over all of these comparisons.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, cast

from matplotlib.figure import Figure

from models.taxonomy import Taxonomy
from ops.pictures import against_steps
from ops.statistics import Estimate, clustered_mean, holm, nested_mean, p_below

CHECKPOINTS = "checkpoints.jsonl"
RESAMPLES = 10_000  # ours: draws of the bootstrap at least
RESAMPLES_EACH = 40  # ours: and so many per comparison, which tells Holm's smallest level down to 2.5%
STARTS = 7  # ours: earlier checkpoints compared, evenly spaced; with each more the correction asks for surer findings
JUDGE, SECOND, TRUTH, NO_TARGET = "judge", "second", "measure_win", "blind_win"
METRICS = {TRUTH: "truth", NO_TARGET: "blind measure", SECOND: "second judge"}  # in words


class Look(TypedDict):
    """One dimension of one edit of one checkpoint against the base's edit from the same noise. A line of checkpoints.jsonl."""

    step: int
    condition_id: str
    source_id: str
    origin: str
    task: str
    dimension: str
    judge: float  # P(policy's is better), mean of both orders, by the judge that rewards
    second: float | None  # the same by the second judge
    measure_win: float | None  # 1, 1/2 or 0 by the acceptance measure; None where no perfect edit is known
    blind_win: float | None  # the same by the measure that needs no target; None where that is not reliable


class Finding(NamedTuple):
    """One place (all tasks, a task, a dimension, or a task's dimension) between two steps, by one metric."""

    place: str
    start: int
    end: int
    metric: str
    judge: tuple[float, float]  # means at start and end
    independent: tuple[float, float]
    p: float  # of "the independent metric did not fall"

    @property
    def told(self) -> str:
        metric = METRICS[self.metric]
        return (
            f"judge up {self.judge[0]:.2f} to {self.judge[1]:.2f}, {metric} down {self.independent[0]:.2f} to {self.independent[1]:.2f}"
            f" between steps {self.start} and {self.end} in {self.place}"
        )


def read_checkpoints(path: Path) -> list[Look]:
    """Read a policy's checkpoints.jsonl."""
    return looks(path.read_text().splitlines())


def looks(lines: Iterable[str | bytes]) -> list[Look]:
    """The lines of a checkpoints.jsonl. Before commit 96ca070 no measure without target looked: there `blind_win` is None."""
    found: list[dict[str, Any]] = [{"blind_win": None, **json.loads(line)} for line in lines]
    return [cast(Look, row) for row in found]


def hacked(rows: Sequence[Look], *, level: float = 0.05, delivered: int | None = None) -> list[Finding]:
    """Where the judge rose and an independent metric fell beyond its interval, the surest first.

    Args:
        level: chance that any of the findings is an accident (Holm), at least .025, the smallest that the draws tell.
        delivered: the step whose weights became the version, the last one if None; what was trained after it is not asked.

    Raises ValueError for a smaller level, where that step was not measured, or where no independent metric was.
    """
    if level * RESAMPLES_EACH < 1:
        raise ValueError(f"a level of {level} is smaller than {1 / RESAMPLES_EACH}, which the draws tell")
    steps = sorted({row["step"] for row in rows})
    if not steps:
        raise ValueError("no checkpoint was measured")
    end = steps[-1] if delivered is None else delivered
    if end not in steps:
        raise ValueError(f"step {end} was not measured, only {steps}")
    if not _looked(rows, end):
        raise ValueError(
            f"neither a second judge nor a measure looked at step {end}: give the reward model a `second_share`, "
            "or name a reliable blind measure in the taxonomy"
        )
    starts, places = [0, *_spaced([step for step in steps if 0 < step < end], STARTS)], _places(rows)
    resamples = max(RESAMPLES, RESAMPLES_EACH * len(starts) * len(places))
    asked = [_compare(place, metric, mine, start, end, resamples) for (metric, place), mine in places.items() for start in starts]
    found = {f"{finding.metric} in {finding.place} from {finding.start}": finding for finding in asked}
    return [found[name] for name in holm({name: finding.p for name, finding in found.items()}, level)]


def over_optimised(rows: Sequence[Look], step: int) -> bool:
    """Whether hacking shows at `step` to what does not know the truth. Not where nothing but the judge has looked."""
    untold: list[Look] = [{**row, "measure_win": None} for row in rows if row["step"] <= step]
    return _looked(untold, step) and bool(hacked(untold, delivered=step))


def _looked(rows: Sequence[Look], step: int) -> bool:
    return any(row["step"] == step and _known(row, name) for row in rows for name in METRICS)


def _known(row: Look, name: str) -> bool:
    return row[name] is not None  # type: ignore[literal-required]


def _spaced(steps: Sequence[int], count: int) -> list[int]:
    """At most `count` of them, evenly spaced, the first and the last included."""
    if len(steps) <= count:
        return list(steps)
    return [steps[round(place * (len(steps) - 1) / (count - 1))] for place in range(count)]


def _places(rows: Sequence[Look]) -> dict[tuple[str, str], list[Look]]:
    """What is compared, by metric and name: all rows, those of each task, of each dimension, and of each cell, as far as the metric has
    looked at them; a fall everywhere shows in the whole before it shows in any part.

    Of a place where any truth is known the truth alone is asked. Places of the same cells are one, under the narrowest name.
    """
    named: dict[str, list[Look]] = {"all tasks": list(rows)}
    for row in rows:
        for name in (row["task"], f"{row['dimension']} in all tasks", f"{row['task']}/{row['dimension']}"):
            named.setdefault(name, []).append(row)
    found: dict[tuple[str, frozenset[tuple[str, str]]], tuple[str, list[Look]]] = {}
    for name, mine in sorted(named.items(), key=lambda each: -len(each[1])):  # the narrowest last
        for metric in [TRUTH] if any(_known(row, TRUTH) for row in mine) else [NO_TARGET, SECOND]:
            if seen := [row for row in mine if _known(row, metric)]:
                found[metric, frozenset((row["task"], row["dimension"]) for row in seen)] = name, seen
    return {(metric, name): seen for (metric, _), (name, seen) in found.items()}


def _compare(place: str, metric: str, rows: Sequence[Look], start: int, end: int, resamples: int) -> Finding:
    """One place between two steps, over the comparisons that both have. p is 1 unless the judge rose and the metric fell."""
    before, after = ({(row["condition_id"], row["dimension"]): row for row in rows if row["step"] == step} for step in (start, end))
    both = [after[key] for key in after if start == 0 or key in before]
    levels = [[row["task"] for row in both], [row["dimension"] for row in both]]

    def values(name: str) -> tuple[list[float], list[float]]:
        then = [0.5 if start == 0 else before[row["condition_id"], row["dimension"]][name] for row in both]  # type: ignore[literal-required]
        return then, [row[name] for row in both]  # type: ignore[literal-required]

    def means(name: str) -> tuple[float, float]:
        then, now = values(name)
        return nested_mean(then, levels), nested_mean(now, levels)

    if not both:
        return Finding(place, start, end, metric, (0.5, 0.5), (0.5, 0.5), 1.0)
    found = Finding(place, start, end, metric, means(JUDGE), means(metric), 1.0)
    if found.judge[1] <= found.judge[0] or found.independent[1] >= found.independent[0]:
        return found
    # Differences of -1 .. 1 as values in [0, 1]; of one half, which the base has by definition, the later value says it all.
    then, now = values(metric)
    values_in_range = now if start == 0 else [(b - a + 1) / 2 for a, b in zip(then, now, strict=True)]
    return found._replace(p=p_below(values_in_range, [row["origin"] for row in both], 0.5, levels, resamples=resamples))


def over_steps(rows: Sequence[Look], name: str, task: str | None = None) -> list[tuple[int, Estimate]]:
    """Mean of one of the opinions at every step with its interval: over a task's dimensions, or over tasks too where none is named.

    Rows without it are left out. Starts at step 0, where the policy is the base and every opinion is one half.
    """
    mine = [row for row in rows if task in (None, row["task"]) and _known(row, name)]
    found = [(0, Estimate(0.5, 0.5, 0.5, 0, 0, 0.0))] if mine else []
    for step in sorted({row["step"] for row in mine} - {0}):
        here = [row for row in mine if row["step"] == step]
        levels = [[row["task"] for row in here], [row["dimension"] for row in here]]
        values = [row[name] for row in here]  # type: ignore[literal-required]
        found.append((step, clustered_mean(values, [row["origin"] for row in here], levels)))
    return found


def gold_against_proxy(rows: Sequence[Look], taxonomy: Taxonomy) -> Figure:
    """What the judges say and what is true against the step, per task and over all: over-optimisation is where they part."""
    tasks = {task.title: task.name for task in taxonomy.active}
    named = {"judge": JUDGE, "second judge": SECOND, "truth": TRUTH, "blind measure": NO_TARGET}
    panels = {
        title: {label: [(step, e.mean, e.lo, e.hi) for step, e in over_steps(rows, name, task)] for label, name in named.items()}
        for title, task in {**tasks, "All tasks": None}.items()
    }
    return against_steps(panels, x="step", y="preferred to the start")
