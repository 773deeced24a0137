"""Intervals cover what they claim to cover, and clustering widens them."""

import numpy as np
import pytest

from ops.statistics import clustered_mean, outcome, wilson


def test_wilson_agrees_with_the_textbook() -> None:
    assert wilson(7, 10) == pytest.approx((0.3968, 0.8922), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("difference", "expected"), [(0.2, 1.0), (-0.2, 0.0), (0.005, 0.5), (-0.01, 0.5)])
def test_ties_count_half(difference: float, expected: float) -> None:
    assert outcome(difference, tolerance=0.01) == expected


def test_repeating_every_source_ten_times_does_not_narrow_the_interval() -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2, 40).astype(float)
    sources = [f"s{i}" for i in range(40)]
    once = clustered_mean(values, sources)
    repeated = clustered_mean(np.repeat(values, 10), np.repeat(sources, 10))
    naive = clustered_mean(np.repeat(values, 10), range(400))
    assert repeated.mean == pytest.approx(once.mean)
    assert repeated.hi - repeated.lo == pytest.approx(once.hi - once.lo, abs=0.02)
    assert naive.hi - naive.lo < 0.5 * (once.hi - once.lo)


def test_interval_covers_the_true_rate_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(60):
        rates = rng.beta(3, 2, 50)  # every source has a rate of its own; the mean rate is 0.6
        values = (rng.random((50, 4)) < rates[:, None]).astype(float).ravel()
        found = clustered_mean(values, np.repeat(np.arange(50), 4), resamples=400, seed=trial)
        covered += found.lo <= 0.6 <= found.hi
    assert 51 <= covered <= 60


def test_levels_are_averaged_unweighted() -> None:
    values = [1, 1, 1, 0, 0.5, 0]
    tasks = ["a", "a", "a", "a", "b", "b"]
    dimensions = ["x", "x", "x", "y", "x", "x"]
    found = clustered_mean(values, list("pqrpqr"), levels=[tasks, dimensions])
    assert found.mean == pytest.approx(((1 + 0) / 2 + 0.25) / 2)
    assert found.lo <= found.mean <= found.hi
    assert found.n == 6


def test_a_cell_missing_from_some_draws_is_left_out_of_them() -> None:
    found = clustered_mean([1, 0, 1, 0], ["p", "q", "r", "r"], levels=[["a", "a", "a", "b"]])
    assert np.isfinite([found.lo, found.hi]).all()


def test_unanimous_sources_still_have_an_interval() -> None:
    assert clustered_mean([1, 1, 1, 1], ["p", "p", "q", "r"]).lo == pytest.approx(wilson(3, 3)[0])
    single = clustered_mean([0.5, 0.5], ["p", "p"])
    assert (single.lo, single.hi) == pytest.approx((wilson(0, 1)[0], wilson(1, 1)[1]))


def test_same_seed_same_interval() -> None:
    arguments = ([1, 0, 1, 0, 0.5], list("abcde"))
    assert clustered_mean(*arguments, seed=3) == clustered_mean(*arguments, seed=3)


def test_nothing_to_average_is_an_error() -> None:
    with pytest.raises(ValueError, match="no values"):
        clustered_mean([], [])
