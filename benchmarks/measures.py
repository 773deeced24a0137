"""Do the two families of ground-truth measures agree, and do they see what they should? (docs/measures.md)

    python -m benchmarks.measures                      # candidates of the newest run of the home, into benchmarks/results/measures.json
    python -m benchmarks.measures --sheets docs/audit  # and the best and worst examples of every dimension, as pictures

Reads the candidates that a run of the chain has stored: every one is scored by both families. `agreement` is the share of conditions on
which the acceptance measure orders the annotator's best and worst alike, ties half; `one_step_wins` how often a one-step prediction beats a
sample where one of the two is best and the other worst: near one, the dimension prefers what is smooth.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.rows import machine
from infra.data import ensure_data
from infra.workspace import Workspace
from models.images import paste, to_mask, to_pil, to_tensor
from models.mini.acceptance import accept
from models.mini.measures import measure
from models.records import Candidate, Condition, read_rows
from models.shards import ShardReader
from models.taxonomy import Taxonomy
from ops.pictures import grid, overlay
from ops.statistics import clustered_mean
from ops.win_rates import TIE_TOLERANCE, won
from pipelines.home import enter
from pipelines.report import commit

ROOT = Path(__file__).parents[1]
SHOWN, PER_ROW = 24, 12  # of each end
Scored = tuple[Candidate, dict[str, float]]  # family -> score


def score(curated: Path, candidates: Path, taxonomy: Taxonomy, per_task: int) -> dict[tuple[str, str], dict[str, list[Scored]]]:
    """(task, dimension) -> condition id -> its candidates with their scores, over the first `per_task` scenes of each task."""
    shards, made = ShardReader(curated), ShardReader(candidates)
    shown = defaultdict(list)
    for row in read_rows(candidates / "candidates.jsonl", Candidate):
        shown[row.condition_id].append(row)
    found: dict[tuple[str, str], dict[str, list[Scored]]] = defaultdict(lambda: defaultdict(list))
    counts: dict[str, int] = defaultdict(int)
    for condition in read_rows(curated / "conditions.jsonl", Condition):
        if f"{condition.id}.target" not in shards or condition.kind != "scene" or counts[condition.task] >= per_task:
            continue
        counts[condition.task] += 1
        image, target = to_tensor(shards[f"{condition.id}.image"]), to_tensor(shards[f"{condition.id}.target"])
        mask = to_mask(shards[f"{condition.id}.mask"])
        for row in shown[condition.id]:
            known = paste(image, to_tensor(made[row.id]), mask), target, mask, condition.truth, condition.prompt
            for dimension in map(taxonomy.dimension, taxonomy.task(condition.task).dimensions):
                scores = {"annotator": measure(dimension.labelled_by, *known), "acceptance": accept(dimension.accepted_by, *known)}
                found[condition.task, dimension.name][condition.id].append((row, scores))
    return found


def agreement(cell: dict[str, list[Scored]]) -> dict[str, Any]:
    """How often the families agree on a condition's best and worst, and whether one-step predictions win."""
    agreed, one_step = [], []
    for rows in cell.values():
        best, worst = (pick(rows, key=lambda row: row[1]["annotator"]) for pick in (max, min))
        agreed.append(won(best[1]["acceptance"], worst[1]["acceptance"], TIE_TOLERANCE))
        if (best[0].stop is None) != (worst[0].stop is None):
            one_step.append(best[0].stop is not None)
    rate = clustered_mean(agreed, list(cell))
    told = sum(one_step) / len(one_step) if one_step else None
    return {"n": rate.n, "agreement": rate.mean, "lo": rate.lo, "hi": rate.hi, "one_step_wins": told}


def sheet(cell: dict[str, list[Scored]], family: str, curated: Path, candidates: Path) -> Any:
    """The best and the worst candidates of a cell by one family, each under what was asked."""
    shards, made = ShardReader(curated), ShardReader(candidates)
    rows = sorted((row for rows in cell.values() for row in rows), key=lambda row: row[1][family], reverse=True)
    picks = [*rows[:SHOWN], *rows[-SHOWN:]]
    lines: list[list[Any]] = []
    for start in range(0, len(picks), PER_ROW):
        part = picks[start : start + PER_ROW]
        parts = [(row.condition_id, to_tensor(made[row.id])) for row, _ in part]
        asked = [overlay(shards[f"{key}.image"], shards[f"{key}.mask"]) for key, _ in parts]
        edits = [to_pil(paste(to_tensor(shards[f"{key}.image"]), edit, to_mask(shards[f"{key}.mask"]))) for key, edit in parts]
        for pictures in (asked, edits, [shards[f"{key}.target"] for key, _ in parts]):
            lines.append([*pictures, *[None] * (PER_ROW - len(pictures))])
    return grid(lines, columns=[""] * PER_ROW, cell=64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset")
    parser.add_argument("--home", type=Path)
    parser.add_argument("--per-task", type=int, default=120)
    parser.add_argument("--sheets", type=Path, help="folder for the best and worst examples of every cell, by both families")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "measures.json")
    arguments = parser.parse_args()
    ensure_data(ROOT)
    _, workspace = enter(arguments.preset, arguments.home)
    refs = [_newest(workspace, name) for name in ("curated_dataset", "candidates")]
    curated, candidates = map(workspace.store.get, refs)
    taxonomy = Taxonomy.load()
    found = score(curated, candidates, taxonomy, arguments.per_task)
    rows = [{"task": task, "dimension": dimension, **agreement(cell)} for (task, dimension), cell in found.items()]
    for row in rows:
        share = "" if row["one_step_wins"] is None else f", one-step wins {row['one_step_wins']:.2f}"
        print(
            f"{row['task']:12} {row['dimension']:16} agree {row['agreement']:.2f} ({row['lo']:.2f} to {row['hi']:.2f}), n {row['n']}{share}"
        )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "command": f"python -m benchmarks.measures --per-task {arguments.per_task}",
        "commit": commit(),
        "machine": machine(),
        "candidates": refs[1].digest,
        "cells": rows,
    }
    arguments.out.write_text(json.dumps(record, indent=2) + "\n")
    if arguments.sheets:
        arguments.sheets.mkdir(parents=True, exist_ok=True)
        for (task, dimension), cell in found.items():
            for family in ("annotator", "acceptance"):
                sheet(cell, family, curated, candidates).save(arguments.sheets / f"{task}-{dimension}-{family}.webp", quality=70)


def _newest(workspace: Workspace, name: str) -> Any:
    return workspace.store.versions(name)[-1].ref


if __name__ == "__main__":
    main()
