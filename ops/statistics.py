"""Uncertainty of every figure that is reported: Wilson intervals and a bootstrap over source images.

    wilson(41, 50)                                        # accuracy of 41 right answers out of 50
    clustered_mean(values, sources)                       # mean with an interval
    clustered_mean(values, sources, levels=[tasks, dims]) # mean over tasks of means over dimensions of means over values

Edits of one source image resemble each other, so the bootstrap draws whole sources, never single values; counting values
as independent would make every interval too narrow. Both intervals are scipy's (`binomtest`, `bootstrap`).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Estimate:
    """A mean in [0, 1] with its interval; `n` counts the values behind it."""

    mean: float
    lo: float
    hi: float
    n: int


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval (lo, hi) of a proportion; (0, 1) when nothing was counted."""
    if n == 0:
        return 0.0, 1.0
    interval = stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def outcome(difference: float, tolerance: float = 0.0) -> float:
    """1 for a win, 0 for a loss, 1/2 for a tie: a difference of `tolerance` or less in either direction."""
    return 0.5 if abs(difference) <= tolerance else float(difference > 0)


def clustered_mean(
    values: Sequence[float],
    clusters: Sequence[Hashable],
    levels: Sequence[Sequence[Hashable]] = (),
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Mean of values in [0, 1] with a percentile bootstrap interval over clusters.

    `clusters` and every entry of `levels` have one label per value. With levels the mean is nested and unweighted: values are
    averaged within the finest level's cells, those within the next coarser level, and so on. Where every cluster says
    the same (or there is only one) the bootstrap knows no spread, and Wilson's interval over clusters is given instead.
    Raises ValueError without values.
    """
    if not len(values):
        raise ValueError("no values to average")
    nested = _NestedMean(values, clusters, levels)
    names = np.arange(nested.sums.shape[0])
    mean = float(nested(names))
    if len(names) > 1:
        drawn = stats.bootstrap(
            (names,), nested, n_resamples=resamples, confidence_level=confidence, method="percentile", vectorized=True, batch=256, rng=seed
        )
        low, high = map(float, drawn.confidence_interval)
        if high - low > 1e-9:
            return Estimate(mean, low, high, len(values))
    agreeing = mean * len(names)
    low = wilson(math.floor(agreeing + 1e-9), len(names), confidence)[0]
    high = wilson(math.ceil(agreeing - 1e-9), len(names), confidence)[1]
    return Estimate(mean, low, high, len(values))


def nested_mean(values: Sequence[float], levels: Sequence[Sequence[Hashable]]) -> float:
    """The mean of `clustered_mean` without its interval."""
    return float(_NestedMean(values, range(len(values)), levels)(np.arange(len(values))))


class _NestedMean:
    """The nested mean as a function of drawn cluster indices [..., S] -> [...]."""

    def __init__(self, values: Sequence[float], clusters: Sequence[Hashable], levels: Sequence[Sequence[Hashable]]):
        paths = list(zip(*levels, strict=True)) if levels else [()] * len(values)
        cells = list(dict.fromkeys(paths))
        sources = list(dict.fromkeys(clusters))
        self.sums = np.zeros((len(sources), len(cells)))  # [S, C]
        self.counts = np.zeros_like(self.sums)
        cell_at = {cell: i for i, cell in enumerate(cells)}
        source_at = {source: i for i, source in enumerate(sources)}
        for value, cluster, path in zip(values, clusters, paths, strict=True):
            self.sums[source_at[cluster], cell_at[path]] += value
            self.counts[source_at[cluster], cell_at[path]] += 1
        self.cells = cells

    def __call__(self, drawn: np.ndarray, axis: int = -1) -> np.ndarray:
        counts = self.counts[drawn].sum(axis=-2)  # [..., C]
        with np.errstate(invalid="ignore"):  # a draw may miss a small cell altogether: nan, left out of the mean above it
            means = self.sums[drawn].sum(axis=-2) / counts
        paths = self.cells
        while len(paths[0]) > 0:
            parents = list(dict.fromkeys(path[:-1] for path in paths))
            means = np.stack([_mean_of_known(means[..., [p[:-1] == parent for p in paths]]) for parent in parents], axis=-1)
            paths = parents
        return means[..., 0]


def _mean_of_known(means: np.ndarray) -> np.ndarray:
    """Mean over the last axis without nan; nan where all are. (np.nanmean warns on those.)"""
    known = ~np.isnan(means)
    with np.errstate(invalid="ignore"):
        return np.where(known, means, 0).sum(axis=-1) / known.sum(axis=-1)
