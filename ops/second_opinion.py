"""What a second judge that nobody here fitted thinks of the edits: beside the win rates, and asked that there is no step back by it.

    rows = second_opinions(judge, ["base", "ema"], jobs, edits, out, progress)
    figures(rows, split="test", confidence=0.95, resamples=2000)     # opponent -> mode -> win rate with its interval

A row holds its P(this edit is better) in both orders, so every figure can be recomputed from `second-judge.jsonl`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from infra.progress import Progress
from models.images import to_tensor
from models.judge import SecondJudge
from models.shards import ShardReader
from ops.measure_edits import Job
from ops.statistics import clustered_mean, outcome
from ops.win_rates import BASE, PRODUCTION

SECOND_OPINIONS = "second-judge.jsonl"


def second_opinions(
    judge: SecondJudge, names: Sequence[str], jobs: Sequence[Job], edits: ShardReader, out: Path, progress: Progress
) -> list[dict[str, Any]]:
    """One row for every edit of a mode and each opponent, the base and production: pasted edits, both orders. Written to `out` too."""
    rows = []
    with progress.bar("evaluation: second judge", len(jobs), "image") as bar:
        for job in jobs:
            condition = job.condition
            pictures = {name: to_tensor(edits[job.key(name)]) for name in names if job.key(name) in edits}
            for opponent in (name for name in (BASE, PRODUCTION) if name in pictures):
                for mode in (name for name in pictures if name not in (BASE, PRODUCTION)):
                    pair = pictures[mode], pictures[opponent]
                    forward, backward = (judge.prefers(job.image, *order, condition.prompt) for order in (pair, pair[::-1]))
                    row = {"condition_id": condition.id, "origin": condition.origin, "task": condition.task, "split": condition.split}
                    rows.append({**row, "seed": job.seed, "policy": mode, "opponent": opponent, "p": [forward, backward]})
            bar.advance()
    (out / SECOND_OPINIONS).write_text("".join(json.dumps(row, sort_keys=True) + "\n" for row in rows))
    return rows


def figures(rows: Sequence[Mapping[str, Any]], *, split: str, confidence: float, resamples: int) -> dict[str, dict[str, dict[str, Any]]]:
    """Opponent -> mode -> how often the judge prefers the mode's edit, both orders averaged: mean over tasks, with lo, hi, se and n."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    tested = [row for row in rows if row["split"] == split]
    for opponent, mode in dict.fromkeys((row["opponent"], row["policy"]) for row in tested):
        mine = [row for row in tested if (row["opponent"], row["policy"]) == (opponent, mode)]
        won = [outcome((row["p"][0] + 1 - row["p"][1]) / 2 - 0.5) for row in mine]
        levels = [[row["task"] for row in mine]]
        rate = clustered_mean(won, [row["origin"] for row in mine], levels, confidence=confidence, resamples=resamples)
        found.setdefault(opponent, {})[mode] = {
            "mean_win_rate": rate.mean,
            "lo": rate.lo,
            "hi": rate.hi,
            "se": rate.se,
            "n": rate.n,
            "origins": rate.sources,
        }
    return found
