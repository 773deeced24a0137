"""Intervals cover what they claim to cover, and clustering widens them."""

import numpy as np
import pytest
from scipy import stats

from ops.statistics import clustered_mean, holm, outcome, p_below, sample_size


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
    """Clopper and Pearson's for an event seen in all or none of the sources, and its like for ties."""
    won = clustered_mean([1, 1, 1, 1], ["p", "p", "q", "r"])
    exact = stats.binomtest(3, 3).proportion_ci(method="exact")
    assert (won.lo, won.hi) == pytest.approx((exact.low, exact.high))
    tied = clustered_mean([0.5] * 40, range(40))
    unseen = stats.binomtest(0, 40).proportion_ci(method="exact").high  # of the edits may be losses, all of them
    assert (tied.lo, tied.hi) == pytest.approx((0.5 - unseen / 2, 0.5 + unseen / 2))
    assert won.se == tied.se == 0


def test_one_loss_among_ties_is_not_told_more_surely_than_none() -> None:
    none, one = clustered_mean([0.5] * 30, range(30)), clustered_mean([0.5] * 29 + [0], range(30))
    assert one.lo < none.lo


@pytest.mark.parametrize("rate", [0.42, 0.46])
def test_the_p_value_is_the_level_at_which_the_interval_excludes_the_null(rate: float) -> None:
    rng = np.random.default_rng(7)
    values = rng.normal(rate, 0.25, 24).clip(0, 1)
    p = p_below(values, range(24), 0.5, resamples=4000)
    sure, unsure = (clustered_mean(values, range(24), confidence=1 - 2 * level, resamples=4000) for level in (p * 1.3, p / 1.3))
    assert sure.hi <= 0.5 < unsure.hi


def test_p_values_of_unanimous_sources_are_those_of_the_sign_test() -> None:
    assert p_below([0.0] * 12, range(12), 0.5, resamples=100_000) == pytest.approx(stats.binomtest(0, 12, alternative="less").pvalue)
    assert p_below([0.5] * 12, range(12), 0.5) == 1
    assert p_below([0.7] * 12, range(12), 0.5) == 1


def test_a_true_null_is_rarely_rejected() -> None:
    rng = np.random.default_rng(2)
    found = [p_below(rng.choice([0, 0.5, 1], 40, p=[0.1, 0.8, 0.1]), range(40), 0.5, resamples=400, seed=i) < 0.05 for i in range(200)]
    assert sum(found) <= 20


def test_holm_is_stricter_than_no_correction_and_laxer_than_bonferroni() -> None:
    p_values = {"a": 0.012, "b": 0.011, "c": 0.02, "d": 0.9}
    assert holm(p_values, 0.05) == ["b", "a", "c"]  # .05 / 4, .05 / 3, .05 / 2, then .9 stops; Bonferroni alone would keep b and a
    assert holm({"a": 0.013, "b": 0.014, "c": 0.02, "d": 0.9}, 0.05) == []  # the smallest fails, though three are under .05
    assert holm({}, 0.05) == []


def test_the_sample_size_gives_the_power_it_promises() -> None:
    assert sample_size(0.5, 0.1) == pytest.approx(196, abs=1)  # the textbook's ((1.96 + .8416) / 2 / .1)^2
    assert sample_size(0.5, 0.05) == pytest.approx(4 * 196, abs=3)
    rng = np.random.default_rng(3)
    n = sample_size(0.5, 0.15)
    seen = sum((rng.random(n) < 0.65).mean() - 1.96 * 0.5 / np.sqrt(n) > 0.5 for _ in range(400))
    assert 0.74 < seen / 400 < 0.88


def test_ties_alone_need_enough_sources_to_have_shown_a_loss() -> None:
    n = sample_size(0.0, 0.05)
    assert clustered_mean([0.5] * n, range(n)).lo >= 0.45 > clustered_mean([0.5] * (n - 1), range(n - 1)).lo
    four_each = sample_size(0.0, 0.05, per_source=4)
    assert four_each == pytest.approx(4 * n, abs=4)
    assert clustered_mean([0.5] * four_each, [place // 4 for place in range(four_each)]).lo >= 0.45


def test_same_seed_same_interval() -> None:
    arguments = ([1, 0, 1, 0, 0.5], list("abcde"))
    assert clustered_mean(*arguments, seed=3) == clustered_mean(*arguments, seed=3)


def test_nothing_to_average_is_an_error() -> None:
    with pytest.raises(ValueError, match="no values"):
        clustered_mean([], [])
