"""Uncertainty of every figure that is reported, and what follows from it: intervals, tests, sample sizes (docs/statistics.md).

    clustered_mean(values, sources)                       # mean with an interval
    clustered_mean(values, sources, levels=[tasks, dims]) # mean over tasks of means over dimensions of means over values
    p_below(values, sources, 0.5)                         # could the true mean be one half or more? small: it is below
    holm({"fill": 0.001, "text": 0.04}, 0.05)             # which of several such findings stand
    sample_size(sd=0.5, margin=0.1)                       # values needed to see a difference of .1 with 80% power

Edits of one source image resemble each other, so the bootstrap draws whole sources, never single values; counting values
as independent would make every interval too narrow. A bootstrap draws only what it has seen, so where nearly all sources
agree it knows next to no spread. Of G sources a share of up to 1 - alpha^(1/G) may be of a sort that none of them is (the
exact binomial bound on an event never seen); no interval is narrower than what that share allows.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

SEEN_AT_LEAST = 1e-9  # differences under this are rounding


@dataclass(frozen=True)
class Estimate:
    """A mean in [0, 1] with its interval and standard error; `n` counts the values behind it."""

    mean: float
    lo: float
    hi: float
    n: int
    sources: int  # clusters behind them
    se: float  # standard deviation of the mean over the bootstrap's draws; 0 where every source says the same


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
    """Mean of values in [0, 1] with a percentile bootstrap interval over clusters, widened to what unseen clusters allow.

    `clusters` and every entry of `levels` have one label per value. With levels the mean is nested and unweighted: values are
    averaged within the finest level's cells, those within the next coarser level, and so on. Raises ValueError without values.
    """
    mean, drawn, count = _draws(values, clusters, levels, resamples, seed)
    tail = (1 - confidence) / 2
    unseen = 1 - tail ** (1 / count)
    low, high = np.quantile(drawn, [tail, 1 - tail])
    low, high = min(low, mean * (1 - unseen)), max(high, mean * (1 - unseen) + unseen)
    se = float(drawn.std(ddof=1))
    return Estimate(mean, float(low), float(high), len(values), count, se if se > SEEN_AT_LEAST else 0.0)


def p_below(
    values: Sequence[float],
    clusters: Sequence[Hashable],
    null: float,
    levels: Sequence[Sequence[Hashable]] = (),
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> float:
    """One-sided p-value of "the true mean is `null` or more": small where the values, in [0, 1], lie below it.

    The level at which the upper bound of `clustered_mean` falls under `null`, as finely as the draws tell.
    Raises ValueError without values.
    """
    mean, drawn, count = _draws(values, clusters, levels, resamples, seed)
    if mean >= null:
        return 1.0
    unseen = ((1 - null) / (1 - mean)) ** count
    return float(max(unseen, (1 + (drawn >= null - SEEN_AT_LEAST).sum()) / (1 + resamples)))


def holm(p_values: Mapping[str, float], level: float) -> list[str]:
    """The hypotheses that Holm's step-down procedure rejects: at most a share `level` of families has any wrongly rejected.

    Stops at the first that does not fall, in the order of their p-values: p_(k) is held against level / (m - k), k from 0.
    """
    rejected = []
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        if p_values[name] > level / (len(p_values) - rank):
            break
        rejected.append(name)
    return rejected


def sample_size(sd: float, margin: float, *, alpha: float = 0.025, power: float = 0.8, per_source: float = 1.0) -> int:
    """Values needed for a one-sided test at level `alpha` to see a difference of `margin` with that power.

    n = (z_(1-alpha) + z_power)^2 sd^2 / margin^2, and never so few that a share of 2 margin, which could lower a rate of one half
    by `margin`, may go unseen: log(alpha) / log(1 - 2 margin) sources at least, `per_source` values each. With `sd` = se sqrt(n) of a
    clustered mean (`Estimate`) the design effect, variance of the clustered mean over that of as many independent values, is in it.
    """
    normal = stats.norm()
    spread = ((normal.ppf(1 - alpha) + normal.ppf(power)) * sd / margin) ** 2
    unseen = math.log(alpha) / math.log(1 - 2 * margin) if margin < 0.5 else 1.0
    return math.ceil(max(spread, unseen * per_source) - SEEN_AT_LEAST)


def _draws(
    values: Sequence[float], clusters: Sequence[Hashable], levels: Sequence[Sequence[Hashable]], resamples: int, seed: int
) -> tuple[float, np.ndarray, int]:
    """The nested mean, its bootstrap distribution over clusters [resamples], and the number of clusters."""
    if not len(values):
        raise ValueError("no values to average")
    nested = _NestedMean(values, clusters, levels)
    names = np.arange(nested.sums.shape[0])
    mean = float(nested(names))
    if len(names) == 1:
        return mean, np.full(resamples, mean), 1
    drawn = stats.bootstrap(
        (names,), nested, n_resamples=resamples, method="percentile", vectorized=True, batch=256, rng=seed
    ).bootstrap_distribution
    return mean, drawn, len(names)


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
