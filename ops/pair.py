"""Best and worst become (winner, loser): the reward model's training rows.

    make_pairs(PairConfig(), curated, candidates, preferences, out, Progress(print), taxonomy)

One pair per annotator, condition and dimension, as in the paper; ties give none. A pair belongs to its condition's split.
Both orders of a pair are trained on (L averages them), so the classes Yes and No are balanced by construction;
`first_wins_share` tells whether annotators favoured what they saw first.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pydantic
from matplotlib.figure import Figure

from infra.progress import Progress
from models.config import OpConfig
from models.errors import BadLabel, NotEnoughData
from models.records import SPLITS, Candidate, Condition, Pair, Preference, read_rows, write_rows
from models.taxonomy import Taxonomy
from ops.folders import save_picture, write_metrics
from ops.pictures import LINE, SERIES, stacked_bars


class PairConfig(OpConfig):
    """What is done where annotators disagree."""

    drop_contradictions: bool = pydantic.Field(
        True, description="Drop a pair when annotators order its two candidates both ways; off, every vote is kept (ours)."
    )


def make_pairs(
    config: PairConfig, curated: Path, candidates: Path, preferences: Path, out: Path, progress: Progress, taxonomy: Taxonomy
) -> dict[str, Any]:
    """Write `pairs.jsonl`, a picture and `metrics.json` into `out`; return the metrics.

    `preferences` is the artifact's folder. Raises BadLabel for a label that fits neither dataset nor candidates,
    NotEnoughData when no pair is left.
    """
    conditions = {row.id: row for row in read_rows(curated / "conditions.jsonl", Condition)}
    known = {row.id: row.condition_id for row in read_rows(candidates / "candidates.jsonl", Candidate)}
    labels = read_rows(preferences / "preferences.jsonl", Preference)
    for label in labels:
        _check(label, conditions, known, taxonomy)
    decided = [label for label in labels if not label.tie]
    against = _contradicted(decided) if config.drop_contradictions else set()
    used = [label for label in decided if _item(label) not in against]
    pairs = [_pair(label, conditions[label.condition_id]) for label in used]
    if not pairs:
        raise NotEnoughData(f"{len(labels)} labels give no pair.", "Label more conditions; ties and contradictions give none.")
    write_rows(out / "pairs.jsonl", pairs)
    cells = [_cell(cell, labels, used, conditions) for cell in taxonomy.cells]
    metrics = {
        "pairs": len(pairs),
        "labels": len(labels),
        "ties": len(labels) - len(decided),
        "contradictions": len(decided) - len(used),
        "first_wins_share": _first_wins(used),
        "cells": cells,
    }
    save_picture(out, "pairs", _bars(cells))
    write_metrics(out, metrics)
    progress.say(f"{len(pairs)} pairs from {len(labels)} labels: {metrics['ties']} ties, {metrics['contradictions']} contradicted")
    return metrics


def _check(label: Preference, conditions: dict[str, Condition], known: dict[str, str], taxonomy: Taxonomy) -> None:
    if label.condition_id not in conditions:
        raise BadLabel(f"A label names the unknown condition {label.condition_id!r}.", "Label this version of the candidates.")
    for name in label.shown:
        if known.get(name) != label.condition_id:
            raise BadLabel(
                f"A label of {label.condition_id} names the unknown candidate {name!r}.", "Label this version of the candidates."
            )
    task = taxonomy.task(conditions[label.condition_id].task)
    if label.dimension not in task.dimensions:
        raise BadLabel(f"A label judges {task.name!r} on {label.dimension!r}.", f"Use {', '.join(task.dimensions)}.")


Item = tuple[str, str, frozenset[str | None]]  # condition, dimension, the two candidates


def _item(label: Preference) -> Item:
    return label.condition_id, label.dimension, frozenset((label.best, label.worst))


def _contradicted(labels: Iterable[Preference]) -> set[Item]:
    winners: dict[Item, set[str | None]] = defaultdict(set)
    for label in labels:
        winners[_item(label)].add(label.best)
    return {item for item, found in winners.items() if len(found) > 1}


def _pair(label: Preference, condition: Condition) -> Pair:
    assert label.best is not None and label.worst is not None
    return Pair(
        condition_id=condition.id,
        task=condition.task,
        dimension=label.dimension,
        prompt=condition.prompt,
        split=condition.split,
        winner=label.best,
        loser=label.worst,
    )


def _first_wins(labels: list[Preference]) -> float | None:
    """Share of labels whose best was shown before its worst; one half where the order shown does not matter. None without labels."""
    first = [label.shown.index(str(label.best)) < label.shown.index(str(label.worst)) for label in labels]
    return sum(first) / len(first) if first else None


def _cell(cell: tuple[str, str], labels: list[Preference], used: list[Preference], conditions: dict[str, Condition]) -> dict[str, Any]:
    def here(rows: list[Preference]) -> list[Preference]:
        return [row for row in rows if (conditions[row.condition_id].task, row.dimension) == cell]

    asked, kept = here(labels), here(used)
    per_split = Counter(conditions[row.condition_id].split for row in kept)
    ties = sum(row.tie for row in asked)
    return {
        "task": cell[0],
        "dimension": cell[1],
        "conditions": sum(row.task == cell[0] for row in conditions.values()),
        **{f"n_{split}": per_split[split] for split in SPLITS},
        "ties": ties,
        "contradictions": len(asked) - ties - len(kept),
        "dropped_share": 1 - len(kept) / len(asked) if asked else None,
        "first_wins_share": _first_wins(kept),
    }


def _bars(cells: list[dict[str, Any]]) -> Figure:
    """Pairs per cell, stacked by split, with what was dropped at the end of each bar."""
    parts: dict[str, tuple[list[float], str]] = {
        split: ([cell[f"n_{split}"] for cell in cells], colour) for split, colour in zip(SPLITS, SERIES, strict=False)
    }
    parts["dropped"] = ([cell["ties"] + cell["contradictions"] for cell in cells], LINE)
    return stacked_bars([f"{cell['task']} · {cell['dimension']}" for cell in cells], parts, x="pairs")
