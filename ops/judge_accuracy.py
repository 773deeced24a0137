"""How often the judge agrees with the annotators, on any set of pairs.

    report = judge_accuracy(judge, taxonomy, pairs, curated, candidates, batch_size=32, progress=Progress(print))

Every pair is put to the judge in both orders, and each order is one decision: P(Yes) above 1/2 with the winner first is right, below 1/2
with the loser first is right, exactly 1/2 counts half. A pair's accuracy is the mean of its two decisions, so a judge that always prefers
the first image scores 50%. `n` counts pairs; intervals are bootstrapped over origins, photographs or scenes (ops/statistics.py); means
over cells, one cell per task and dimension, are unweighted. So is order consistency, the share of pairs whose two orders name one image.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infra.progress import Progress
from models.errors import BadImage, BadManifest
from models.images import paste, to_mask, to_tensor
from models.judge import Judge
from models.records import Condition, Pair, read_rows
from models.shards import ShardReader
from models.taxonomy import Taxonomy
from ops.statistics import clustered_mean

KEEP_BYTES = 2**30  # ours: decoded pictures kept in memory, of one artifact of candidates


class PairImages:
    """The candidates' pictures as the judge sees them: pasted into the source image outside the mask (ours), or raw as in the paper.

    Each is decoded once and kept as bytes while there is room.
    """

    def __init__(self, curated: Path, candidates: Path, paste_source: bool = True):
        self._curated = ShardReader(curated)
        self._candidates = ShardReader(candidates)
        self._paste = paste_source
        self._kept: dict[str, Tensor] = {}
        self._room = KEEP_BYTES

    def __call__(self, pair: Pair, candidate: str) -> Tensor:
        """float32 [3, H, W] in [0, 1]. Raises UnknownVersion for an id that is in no shard and BadImage for one of another size."""
        if candidate not in self._kept:
            image = self._decode(pair, candidate)
            if image.nbytes > self._room:
                return image.float() / 255
            self._room -= image.nbytes
            self._kept[candidate] = image
        return self._kept[candidate].float() / 255

    def _decode(self, pair: Pair, candidate: str) -> Tensor:
        image, source = to_tensor(self._candidates[candidate]), to_tensor(self._curated[f"{pair.condition_id}.image"])
        if source.shape != image.shape:
            raise BadImage(
                f"Candidate {candidate} has {tuple(image.shape[1:])} pixels and the image it edits {tuple(source.shape[1:])}.",
                "Candidates and curated data are of different versions; generate the candidates again.",
            )
        if self._paste:
            image = paste(source, image, to_mask(self._curated[f"{pair.condition_id}.mask"]))
        return (image * 255).round().to(torch.uint8)


def both_orders(judge: Judge, taxonomy: Taxonomy, images: PairImages, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """Log-odds of "the first is better" with the winner first and with the loser first, [B] each; gradients flow into the judge.

    Pairs may differ in image size: each size is one forward pass.
    """
    sizes: dict[torch.Size, list[int]] = {}
    for row, pair in enumerate(pairs):
        sizes.setdefault(images(pair, pair.winner).shape, []).append(row)
    odds = torch.cat([_one_size(judge, taxonomy, images, [pairs[row] for row in rows]) for rows in sizes.values()], dim=1)  # [2, B]
    back = torch.tensor([row for rows in sizes.values() for row in rows]).argsort()
    winner_first, loser_first = odds[:, back.to(odds.device)]
    return winner_first, loser_first


def _one_size(judge: Judge, taxonomy: Taxonomy, images: PairImages, pairs: Sequence[Pair]) -> Tensor:
    """`both_orders` of pairs of one image size: [2, B]. A picture that is in several pairs is encoded once."""
    pictures = {candidate: images(pair, candidate) for pair in pairs for candidate in (pair.winner, pair.loser)}
    at = {candidate: row for row, candidate in enumerate(pictures)}
    seen = judge.encode(torch.stack(list(pictures.values())))
    winners, losers = seen[[at[pair.winner] for pair in pairs]], seen[[at[pair.loser] for pair in pairs]]
    queries = [taxonomy.query(pair.task, pair.dimension, pair.prompt) for pair in pairs]
    return judge.compare(winners.join(losers), losers.join(winners), queries * 2).view(2, len(pairs))


def ask(
    judge: Judge,
    taxonomy: Taxonomy,
    images: PairImages,
    pairs: Sequence[Pair],
    *,
    batch_size: int,
    progress: Progress,
    label: str = "judge",
) -> tuple[Tensor, Tensor]:
    """`both_orders` over any number of pairs, without gradient, the model in eval mode (restored after): [N] and [N] on the CPU."""
    training = judge.model.training
    judge.model.eval()
    found = []
    try:
        with torch.no_grad(), progress.bar(label, total=len(pairs), unit="pair") as bar:
            for start in range(0, len(pairs), batch_size):
                batch = pairs[start : start + batch_size]
                found.append(torch.stack(both_orders(judge, taxonomy, images, batch)).cpu())
                bar.advance(len(batch))
    finally:
        judge.model.train(training)
    winner_first, loser_first = torch.cat(found, dim=1)
    return winner_first, loser_first


def origins_of(curated: Path, pairs: Sequence[Pair]) -> list[str]:
    """What each pair's image is cut from, a photograph or a scene. Raises BadManifest for a pair without its condition."""
    known = {condition.id: condition.origin for condition in read_rows(curated / "conditions.jsonl", Condition)}
    if lost := [pair.condition_id for pair in pairs if pair.condition_id not in known]:
        raise BadManifest(
            f"{len(lost)} pairs name conditions that {curated} does not hold, first {lost[0]!r}.", "Make the pairs again from this dataset."
        )
    return [known[pair.condition_id] for pair in pairs]


def decisions(winner_first: Tensor, loser_first: Tensor) -> tuple[list[float], list[float]]:
    """Accuracy (0, 1/2 or 1, in quarters where undecided) and order consistency of each pair, from its two log-odds."""
    right = (winner_first.sign() - loser_first.sign() + 2) / 4
    consistent = (winner_first.sign() == -loser_first.sign()).float()
    return right.tolist(), consistent.tolist()


def cell_means(pairs: Sequence[Pair], values: Sequence[float]) -> dict[tuple[str, str], float]:
    """Mean value of each (task, dimension) that has pairs."""
    cells: dict[tuple[str, str], list[float]] = {}
    for pair, value in zip(pairs, values, strict=True):
        cells.setdefault((pair.task, pair.dimension), []).append(value)
    return {cell: sum(found) / len(found) for cell, found in cells.items()}


def mean_over_cells(pairs: Sequence[Pair], values: Sequence[float]) -> float:
    """Mean of the cells' means: a cell with few pairs weighs as much as one with many."""
    means = cell_means(pairs, values).values()
    return sum(means) / len(means)


def summarise(
    taxonomy: Taxonomy, pairs: Sequence[Pair], origins: Sequence[str], winner_first: Tensor, loser_first: Tensor
) -> dict[str, Any]:
    """The figures of `judge_accuracy` from log-odds: mean_accuracy, lo, hi, order_consistency, cells, empty_cells, n."""
    right, consistent = decisions(winner_first, loser_first)
    cells = []
    for task, dimension in taxonomy.cells:
        rows = [i for i, pair in enumerate(pairs) if (pair.task, pair.dimension) == (task, dimension)]
        if rows:
            estimate = clustered_mean([right[i] for i in rows], [origins[i] for i in rows])
            cells.append(
                {"task": task, "dimension": dimension, "n": len(rows), "accuracy": estimate.mean, "lo": estimate.lo, "hi": estimate.hi}
            )
    overall = clustered_mean(right, origins, levels=[[f"{pair.task}/{pair.dimension}" for pair in pairs]])
    filled = {(cell["task"], cell["dimension"]) for cell in cells}
    return {
        "mean_accuracy": overall.mean,
        "lo": overall.lo,
        "hi": overall.hi,
        "se": overall.se,
        "order_consistency": mean_over_cells(pairs, consistent),
        "n": len(pairs),
        "cells": cells,
        "empty_cells": [list(cell) for cell in taxonomy.cells if cell not in filled],
    }


def pair_rows(pairs: Sequence[Pair], origins: Sequence[str], winner_first: Tensor, loser_first: Tensor) -> list[dict[str, Any]]:
    """One row per pair from which every figure can be recomputed: who, and P(Yes) in both orders."""
    first, second = winner_first.sigmoid().tolist(), loser_first.sigmoid().tolist()
    return [
        {**pair.model_dump(), "origin": origin, "p_winner_first": a, "p_loser_first": b}
        for pair, origin, a, b in zip(pairs, origins, first, second, strict=True)
    ]


def judge_accuracy(
    judge: Judge,
    taxonomy: Taxonomy,
    pairs: Sequence[Pair],
    curated: Path,
    candidates: Path,
    *,
    batch_size: int,
    progress: Progress,
    paste_source: bool = True,
    label: str = "judge",
) -> dict[str, Any]:
    """Ask the judge about `pairs` (one or more) in both orders.

    Returns:
        mean_accuracy (over cells) with lo, hi and se, order_consistency (over cells), n (pairs), cells [{task, dimension, n, accuracy, lo,
        hi}], empty_cells [[task, dimension]] without a pair, rows (one per pair, `pair_rows`).
    """
    origins = origins_of(curated, pairs)
    images = PairImages(curated, candidates, paste_source)
    odds = ask(judge, taxonomy, images, pairs, batch_size=batch_size, progress=progress, label=label)
    return {**summarise(taxonomy, pairs, origins, *odds), "rows": pair_rows(pairs, origins, *odds)}
