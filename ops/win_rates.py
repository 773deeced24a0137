"""From the records of an evaluation to its figures: nothing here looks at an image, so anyone can recompute every number.

    items = read_items(folder / "items.jsonl")
    recompute(items, Taxonomy.load(), split="test", choose_split="validation", tie_tolerance=0.02)

`win_rate` counts by the evidence that the evaluation was asked for, ties half: under `ground_truth`, on procedural scenes, by the
acceptance measures, with which nobody labelled; under `blind`, on every picture, by measures that need no target. `confirming_win_rate`
is by measures of other formulas, those of the annotator under `ground_truth` (docs/measures.md). Measures differ in scale by orders of
magnitude, so two of them tie when they differ by at most `tie_tolerance` times the larger size. A task's rate is the unweighted mean over
its dimensions, the mean the unweighted mean over tasks. `judge_win_rate` counts where the judge's P(better), averaged over both orders,
is above one half; `judge_on_edits` is its accuracy on these comparisons, counted as on sealed pairs (ops/judge_accuracy.py), where the
confirming measures name a winner. Pictures that were not measured (photographs have no ground truth) are reported apart, and so is how
near edits come to the pixels that were under the mask (`withheld`: one good answer among many, so no gate reads it). `seen` is the share of
edits that show what scenes' requests ask for, `facts` the difference between two policies (models/mini/seen.py); `not_evaluated` names
the tasks of which no condition was tested. Intervals: bootstrap over origins, the photographs and scenes that source images are cut from.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict

from matplotlib.figure import Figure

from models.mini.seen import FACTS
from models.taxonomy import Taxonomy
from ops.pictures import rates
from ops.statistics import Estimate, clustered_mean, nested_mean, outcome, p_below

BASE, PRODUCTION = "base", "production"
ITEMS, PAIRS = "items.jsonl", "judge-pairs.jsonl"  # records of an evaluation: a line per edit, a line per sealed pair
DRAWS = 2000  # ours: of a cell's p-value at least; Holm asks for one of .05 over the number of cells, and fewer draws tell none so small
TIE_TOLERANCE = 0.02  # ours: measures that differ by this share or less are a tie
SCENE = "scene"  # the kind of condition whose perfect edit is known
COUNTED = {"ground_truth": "by ground truth", "blind": "by measures that need no target"}  # evidence, in words


class Item(TypedDict):
    """Everything measured on one edit: one condition, one seed, one policy. A line of items.jsonl."""

    split: str
    condition_id: str
    source_id: str
    origin: str  # what the source image is cut from; intervals draw whole origins
    task: str
    kind: str
    prompt: str
    seed: int
    policy: str  # "base", a reference mode, or "production"
    policy_digest: str
    judge_digest: str
    # dimension -> the measure that counts wins, higher is better; empty where it needs a target and there is none
    measures: dict[str, float]
    confirming_measures: dict[str, float]  # dimension -> the second opinion, higher is better; the same keys
    judge: dict[str, dict[str, list[float]]]  # opponent -> dimension -> [P(Yes | this, opponent), P(Yes | opponent, this)]
    preservation_psnr: float  # dB outside the mask, raw output against the source
    outside_similarity: float  # the same to the eye: SSIM over scales, up to 1
    withheld_psnr: float | None  # dB inside the mask against the pixels that were there; None for scenes, and where they are no answer
    seen: dict[str, bool]  # fact -> whether it is to be seen, of those that a scene's request asks for (models/mini/seen.py)


class _Duel(NamedTuple):
    """One dimension of one edit against the opponent's edit of the same condition from the same seed."""

    task: str
    dimension: str
    origin: str
    key: tuple[str, int]
    truth: float | None  # 1, 1/2 or 0, by the measure that counts; None where it was not measured
    confirming: float | None  # the same, by the measure that has to confirm it
    judge: float  # the same, by its mean over both orders
    orders: float  # share of the two orders in which the judge prefers this edit; an undecided one counts half

    @property
    def right(self) -> float | None:
        """How much of the judge's two decisions agrees with the confirming measure; None where that names no winner."""
        if self.confirming is None or self.confirming == 0.5:
            return None
        return self.orders if self.confirming == 1 else 1 - self.orders


def write_items(path: Path, items: Iterable[Item]) -> None:
    """Write items.jsonl, keys sorted."""
    path.write_text("".join(json.dumps(item, sort_keys=True) + "\n" for item in items))


def read_items(path: Path) -> list[Item]:
    """Read a file written by `write_items`."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def duels(items: Sequence[Item], policy: str, opponent: str, tie_tolerance: float) -> list[_Duel]:
    """Every paired comparison of two policies. Raises KeyError where the opponent lacks a condition or seed: pairs must be complete."""
    theirs = {(item["condition_id"], item["seed"]): item for item in items if item["policy"] == opponent}
    found = []
    for item in items:
        if item["policy"] != policy:
            continue
        key = (item["condition_id"], item["seed"])
        other = theirs[key]
        for dimension, (forward, backward) in item["judge"][opponent].items():
            known = dimension in item["measures"]
            truth, confirming = (
                won(item[family][dimension], other[family][dimension], tie_tolerance) if known else None
                for family in ("measures", "confirming_measures")
            )
            preferred = outcome((forward + 1 - backward) / 2 - 0.5)
            orders = (outcome(forward - 0.5) + outcome(0.5 - backward)) / 2
            found.append(_Duel(item["task"], dimension, item["origin"], key, truth, confirming, preferred, orders))
    return found


def won(ours: float, theirs: float, tie_tolerance: float) -> float:
    """1, 1/2 or 0: one measure of an edit against the opponent's, a tie where they differ by that share of the larger or less."""
    return outcome(ours - theirs, tie_tolerance * max(abs(ours), abs(theirs)))


def recompute(
    items: Sequence[Item],
    taxonomy: Taxonomy,
    *,
    split: str,
    choose_split: str,
    tie_tolerance: float,
    confidence: float = 0.95,
    resamples: int = 2000,
    evidence: str = "ground_truth",
) -> dict[str, Any]:
    """Every figure of an evaluation but the judge's own accuracy, from its records alone. `evidence` names what their measures are."""
    tested = [item for item in items if item["split"] == split]
    chosen_on = [item for item in items if item["split"] == choose_split] or tested
    names = list(dict.fromkeys(item["policy"] for item in tested))
    modes = [name for name in names if name not in (BASE, PRODUCTION)]
    settings: dict[str, Any] = {"tie_tolerance": tie_tolerance, "confidence": confidence, "resamples": resamples}

    def against(opponent: str) -> dict[str, Any]:
        return {mode: _summary(tested, mode, opponent, taxonomy, **settings) for mode in modes}

    metrics = {
        "settings": settings,
        "evidence": evidence,
        "split": split,
        "chosen_on": chosen_on[0]["split"] if chosen_on else None,
        "not_evaluated": [task.name for task in taxonomy.active if not any(item["task"] == task.name for item in tested)],
        "best_mode": choose(chosen_on, modes, tie_tolerance),
        "policy": against(BASE),
        "photos": {mode: _photos(tested, mode, taxonomy, **settings) for mode in modes},
        "withheld": {mode: _withheld(tested, mode, **settings) for mode in modes},
        "absolute": {name: _absolute(tested, name, taxonomy) for name in names},
        "seen": {name: seen_shares(tested, name, taxonomy, confidence=confidence, resamples=resamples) for name in names},
    }
    if PRODUCTION in names:
        metrics["against_production"] = against(PRODUCTION)
    return metrics


def choose(items: Sequence[Item], modes: Sequence[str], tie_tolerance: float) -> str | None:
    """The mode that beats the base most: by the measures where there are any, else by the judge. The first wins a tie."""

    def mean_rate(mode: str) -> float:
        fought = duels(items, mode, BASE, tie_tolerance)
        known = [duel for duel in fought if duel.truth is not None]
        rows = known or fought
        values = [duel.truth if duel.truth is not None else duel.judge for duel in rows]
        return nested_mean(values, _levels(rows))

    return max(modes, key=mean_rate) if items and modes else None


def _levels(rows: Sequence[_Duel]) -> list[list[str]]:
    return [[duel.task for duel in rows], [duel.dimension for duel in rows]]


def _estimate(rows: Sequence[_Duel], by: str, confidence: float, resamples: int) -> Estimate:
    values = [getattr(duel, by) for duel in rows]
    return clustered_mean(values, [d.origin for d in rows], _levels(rows), confidence=confidence, resamples=resamples)


def _pairs(rows: Sequence[_Duel]) -> int:
    return len({duel.key for duel in rows})


def _summary(
    items: Sequence[Item], mode: str, opponent: str, taxonomy: Taxonomy, *, tie_tolerance: float, confidence: float, resamples: int
) -> dict[str, Any]:
    """One mode against one opponent on what was measured, every active task in its row; preservation over everything."""
    fought = duels(items, mode, opponent, tie_tolerance)
    rows = [duel for duel in fought if duel.truth is not None]
    decided = [duel for duel in rows if duel.truth != 0.5]
    mean = _estimate(rows, "truth", confidence, resamples) if rows else None
    confirmed = _estimate(rows, "confirming", confidence, resamples) if rows else None
    return {
        "n": _pairs(rows),
        "conditions": len({condition for condition, _ in (duel.key for duel in rows)}),
        "origins": mean.sources if mean else 0,
        "mean_win_rate": mean.mean if mean else None,
        "mean_lo": mean.lo if mean else None,
        "mean_hi": mean.hi if mean else None,
        "mean_se": mean.se if mean else None,
        "confirming_mean_win_rate": confirmed.mean if confirmed else None,
        "confirming_mean_lo": confirmed.lo if confirmed else None,
        "confirming_mean_hi": confirmed.hi if confirmed else None,
        "confirming_mean_se": confirmed.se if confirmed else None,
        "judge_mean_win_rate": nested_mean([duel.judge for duel in rows], _levels(rows)) if rows else None,
        "judge_agreement": nested_mean([d.truth == d.judge for d in decided], _levels(decided)) if decided else None,
        "judge_on_edits": _judge_on_edits(rows, taxonomy, confidence, resamples),
        "preservation_psnr": _mean_of("preservation_psnr", items, mode),
        f"{opponent}_preservation_psnr": _mean_of("preservation_psnr", items, opponent),
        "outside_similarity": _mean_of("outside_similarity", items, mode),
        f"{opponent}_outside_similarity": _mean_of("outside_similarity", items, opponent),
        "tasks": [_task_row(fought, task.name, confidence, resamples) for task in taxonomy.active],
        "cells": [row for cell in taxonomy.cells if (row := _cell_row(rows, cell, confidence, resamples))],
        "facts": fact_rows(items, mode, opponent, taxonomy, confidence=confidence, resamples=resamples),
    }


def _judge_on_edits(rows: Sequence[_Duel], taxonomy: Taxonomy, confidence: float, resamples: int) -> dict[str, Any] | None:
    """The judge's accuracy on policy against opponent, over cells and per cell; None where the confirming measures name no winner."""
    decided = [duel for duel in rows if duel.right is not None]
    if not decided:
        return None
    cells = []
    for cell in taxonomy.cells:
        if here := [duel for duel in decided if (duel.task, duel.dimension) == cell]:
            found = _estimate(here, "right", confidence, resamples)
            cells.append({"task": cell[0], "dimension": cell[1], "n": found.n, "accuracy": found.mean, "lo": found.lo, "hi": found.hi})
    by_cell = [[f"{duel.task}/{duel.dimension}" for duel in decided]]
    origins = [duel.origin for duel in decided]
    mean = clustered_mean([duel.right or 0.0 for duel in decided], origins, by_cell, confidence=confidence, resamples=resamples)
    return {"mean_accuracy": mean.mean, "lo": mean.lo, "hi": mean.hi, "n": mean.n, "cells": cells}


def _task_row(fought: Sequence[_Duel], task: str, confidence: float, resamples: int) -> dict[str, Any]:
    """A task's win rate over the `n` edits that were measured; null where there is none. `n_without_truth` counts the others.

    `p_worse`: small where the opponent is truly better.
    """
    of_task = [duel for duel in fought if duel.task == task]
    known = [duel for duel in of_task if duel.truth is not None]
    rate = _estimate(known, "truth", confidence, resamples) if known else None
    confirmed = _estimate(known, "confirming", confidence, resamples) if known else None
    return {
        "task": task,
        "n": _pairs(known),
        "n_without_truth": _pairs(of_task) - _pairs(known),
        "origins": rate.sources if rate else 0,
        "win_rate": rate.mean if rate else None,
        "lo": rate.lo if rate else None,
        "hi": rate.hi if rate else None,
        "se": rate.se if rate else None,
        "p_worse": _p_worse(known, resamples) if known else None,
        "confirming_win_rate": confirmed.mean if confirmed else None,
        "confirming_lo": confirmed.lo if confirmed else None,
        "confirming_hi": confirmed.hi if confirmed else None,
    }


def _cell_row(rows: Sequence[_Duel], cell: tuple[str, str], confidence: float, resamples: int) -> dict[str, Any] | None:
    """One task and dimension; None where nothing was measured. `p_worse`: small where the opponent is truly better."""
    here = [duel for duel in rows if (duel.task, duel.dimension) == cell]
    if not here:
        return None
    rate = _estimate(here, "truth", confidence, resamples)
    confirmed = _estimate(here, "confirming", confidence, resamples)
    others = {"confirming_win_rate": confirmed.mean, "confirming_lo": confirmed.lo, "confirming_hi": confirmed.hi}
    others["judge_win_rate"] = sum(duel.judge for duel in here) / len(here)
    found: dict[str, Any] = {"task": cell[0], "dimension": cell[1], "n": rate.n, "origins": rate.sources}
    found |= {"win_rate": rate.mean, "lo": rate.lo, "hi": rate.hi, "se": rate.se}
    return {**found, "p_worse": _p_worse(here, resamples), **others}


def _p_worse(rows: Sequence[_Duel], resamples: int) -> float:
    """p of "the opponent is not better", over duels that were measured."""
    values, origins = [float(duel.truth or 0) for duel in rows], [duel.origin for duel in rows]
    return p_below(values, origins, 0.5, _levels(rows), resamples=max(resamples, DRAWS))


def _photos(
    items: Sequence[Item], mode: str, taxonomy: Taxonomy, *, tie_tolerance: float, confidence: float, resamples: int
) -> dict[str, Any] | None:
    """What can be said of one mode on pictures that were not measured: the judge's opinion and preservation. None without any."""
    pictures = [item for item in items if not item["measures"]]
    rows = duels(pictures, mode, BASE, tie_tolerance)
    if not rows:
        return None
    mean = _estimate(rows, "judge", confidence, resamples)
    cells = []
    for task, dimension in taxonomy.cells:
        cell = [duel.judge for duel in rows if (duel.task, duel.dimension) == (task, dimension)]
        if cell:
            cells.append({"task": task, "dimension": dimension, "n": len(cell), "judge_win_rate": sum(cell) / len(cell)})
    return {
        "n": _pairs(rows),
        "judge_mean_win_rate": mean.mean,
        "judge_mean_lo": mean.lo,
        "judge_mean_hi": mean.hi,
        "preservation_psnr": _mean_of("preservation_psnr", pictures, mode),
        "base_preservation_psnr": _mean_of("preservation_psnr", pictures, BASE),
        "cells": cells,
    }


def _withheld(items: Sequence[Item], mode: str, *, tie_tolerance: float, confidence: float, resamples: int) -> dict[str, Any] | None:
    """How near one mode and the base come to the pixels that a picture had under the mask; None where there are none."""
    known = {(item["condition_id"], item["seed"], item["policy"]): item for item in items if item.get("withheld_psnr") is not None}
    pairs = [(item, known[condition, seed, BASE]) for (condition, seed, policy), item in known.items() if policy == mode]
    if not pairs:
        return None
    values = [won(ours["withheld_psnr"] or 0.0, theirs["withheld_psnr"] or 0.0, tie_tolerance) for ours, theirs in pairs]
    origins, tasks = [ours["origin"] for ours, _ in pairs], [[ours["task"] for ours, _ in pairs]]
    nearer = clustered_mean(values, origins, tasks, confidence=confidence, resamples=resamples)
    psnr, base_psnr = (sum(pair[side]["withheld_psnr"] or 0.0 for pair in pairs) / len(pairs) for side in (0, 1))
    return {"n": nearer.n, "win_rate": nearer.mean, "lo": nearer.lo, "hi": nearer.hi, "psnr": psnr, "base_psnr": base_psnr}


def _absolute(items: Sequence[Item], name: str, taxonomy: Taxonomy) -> list[dict[str, Any]]:
    """Mean measure per cell."""
    cells = []
    for task, dimension in taxonomy.cells:
        scores = [
            item["measures"][dimension]
            for item in items
            if (item["policy"], item["task"]) == (name, task) and dimension in item["measures"]
        ]
        if scores:
            cells.append({"task": task, "dimension": dimension, "n": len(scores), "mean": sum(scores) / len(scores)})
    return cells


def seen_shares(
    items: Sequence[Item], name: str, taxonomy: Taxonomy, *, confidence: float = 0.95, resamples: int = 2000
) -> list[dict[str, Any]]:
    """Share of a task's edits in which each fact that was asked for is to be seen. Records from before it was looked for have none."""
    found = []
    for task in taxonomy.active:
        mine = [item for item in items if (item["policy"], item["task"]) == (name, task.name) and item.get("seen")]
        for fact in FACTS:
            rows = [item for item in mine if fact in item["seen"]]
            if rows:
                values, origins = [float(item["seen"][fact]) for item in rows], [item["origin"] for item in rows]
                share = clustered_mean(values, origins, [[task.name] * len(rows)], confidence=confidence, resamples=resamples)
                found.append({"task": task.name, "fact": fact, "n": len(rows), "share": share.mean, "lo": share.lo, "hi": share.hi})
    return found


def fact_rows(
    items: Sequence[Item], policy: str, opponent: str, taxonomy: Taxonomy, *, confidence: float = 0.95, resamples: int = DRAWS
) -> list[dict[str, Any]]:
    """Per task and fact how much `more` often, -1 to 1, it is to be seen in a policy's edits than in the opponent's from the same noise.

    `p_worse`: small where the opponent truly shows it more often.
    """
    theirs = {(item["condition_id"], item["seed"]): item["seen"] for item in items if item["policy"] == opponent and item.get("seen")}
    asked = [item for item in items if item["policy"] == policy and item.get("seen")]
    found = []
    for task, fact in itertools.product([task.name for task in taxonomy.active], FACTS):
        both = [
            (item["seen"][fact], theirs[item["condition_id"], item["seed"]][fact], item["origin"])
            for item in asked
            if item["task"] == task and fact in item["seen"]
        ]
        if both:
            halves, origins = [(1 + ours - other) / 2 for ours, other, _ in both], [origin for _, _, origin in both]  # in [0, 1]
            half = clustered_mean(halves, origins, confidence=confidence, resamples=resamples)
            more, lo, hi = (2 * value - 1 for value in (half.mean, half.lo, half.hi))
            worse = p_below(halves, origins, 0.5, resamples=max(resamples, DRAWS))
            found.append({"task": task, "fact": fact, "n": half.n, "more": more, "lo": lo, "hi": hi, "p_worse": worse})
    return found


def _mean_of(field: Literal["preservation_psnr", "outside_similarity"], items: Sequence[Item], name: str) -> float | None:
    values = [item[field] for item in items if item["policy"] == name]
    return sum(values) / len(values) if values else None


def win_rate_plot(policy: dict[str, Any], taxonomy: Taxonomy) -> Figure:
    """Win rate over the base per task and over all, one dot with its interval per mode. `policy` is the metrics' entry of that name."""
    titles = [task.title for task in taxonomy.active]
    series: dict[str, list[tuple[float, float, float] | None]] = {}
    for mode, summary in sorted(policy.items()):  # a mode keeps its colour from picture to picture
        by_task = {entry["task"]: (entry["win_rate"], entry["lo"], entry["hi"]) for entry in summary["tasks"] if entry["n"]}
        whole = (summary["mean_win_rate"], summary["mean_lo"], summary["mean_hi"]) if summary["n"] else None
        series[mode] = [*(by_task.get(task.name) for task in taxonomy.active), whole]
    return rates([*titles, "All tasks"], series, x="win rate over the base")
