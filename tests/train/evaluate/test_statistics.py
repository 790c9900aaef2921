"""Intervals and tests against published numbers."""

import numpy as np
import pytest

from train.evaluate.statistics import (
    PairedCounts,
    bootstrap,
    count_pairs,
    mcnemar,
    newcombe,
    newcombe_paired,
    wilson,
    win_rate_interval,
)


@pytest.mark.parametrize(
    ("successes", "total", "expected"),
    [
        (81, 263, (0.2553, 0.3662)),  # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
    ],
)
def test_wilson_matches_newcombes_table(successes: int, total: int, expected: tuple[float, float]) -> None:
    assert wilson(successes, total) == pytest.approx(expected, abs=5e-5)


def test_newcombe_matches_the_published_interval() -> None:
    # Newcombe 1998, Statistics in Medicine 17:873, table II (a), method 10
    assert newcombe(56, 70, 48, 80) == pytest.approx((0.0524, 0.3339), abs=5e-5)


def test_newcombe_paired_matches_the_airway_study() -> None:
    # Fagerland, Lydersen, Laake 2014, Statistics in Medicine 33:2850, airway hyper-responsiveness
    # (1, 1, 7, 12): difference -0.286, Newcombe square-and-add (-0.507, -0.026).
    counts = PairedCounts(both=1, only_first=1, only_second=7, neither=12)
    assert counts.difference == pytest.approx(-6 / 21)
    assert newcombe_paired(counts) == pytest.approx((-0.507, -0.026), abs=5e-4)


def test_mcnemar_is_the_exact_binomial_test() -> None:
    assert mcnemar(59, 121) == pytest.approx(4.434444926375551e-06)  # statsmodels' test of mcnemar, exact
    assert mcnemar(1, 7) == pytest.approx(18 / 256)  # 2·(1 + 8)/2^8
    assert mcnemar(0, 0) == 1.0 and mcnemar(3, 3) == 1.0


def test_count_pairs() -> None:
    counts = count_pairs([True, True, False, False], [True, False, True, False])
    assert counts == PairedCounts(1, 1, 1, 1) and counts.difference == 0


def test_bootstrap_covers_the_mean_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    hits = 0
    for seed in range(200):
        low, high = bootstrap(generator.normal(0.3, 1, 80), samples=500, seed=seed)
        hits += low <= 0.3 <= high
    assert 0.90 <= hits / 200 <= 0.985


def test_bootstrap_by_cluster_is_wider_when_rows_of_a_user_agree() -> None:
    values = np.repeat(np.random.default_rng(2).normal(0, 1, 30), 10)
    users = [str(i // 10) for i in range(300)]
    plain, clustered = bootstrap(values), bootstrap(values, users)
    assert clustered[1] - clustered[0] > 2.5 * (plain[1] - plain[0])  # √10 in theory


def test_bootstrap_weighs_rows_and_is_repeatable() -> None:
    low, high = bootstrap([1.0, 3.0], weights=[3.0, 1.0], samples=4000)
    assert (low, high) == (1.0, 3.0)
    assert bootstrap([1.0, 2.0, 4.0], seed=7) == bootstrap([1.0, 2.0, 4.0], seed=7)
    with pytest.raises(ValueError, match="at least one"):
        bootstrap([])


def test_win_rate_counts_ties_as_half() -> None:
    rate, (low, high) = win_rate_interval([1] * 30 + [0] * 60 + [-1] * 10)
    assert rate == 0.6 and 0.5 < low < 0.6 < high < 0.7


def test_win_rate_of_few_equal_outcomes_is_not_certain() -> None:
    assert win_rate_interval([1, 1, 1])[1] == pytest.approx(wilson(3, 3))
    assert win_rate_interval([0, 0, 0]) == (0.5, (0.5, 0.5))


def test_win_rate_between_equals_seldom_has_a_lower_bound_above_half() -> None:
    generator = np.random.default_rng(3)
    alarms = 0
    for seed in range(300):
        outcomes = generator.choice([1, 0, -1], 150, p=[0.2, 0.6, 0.2])
        alarms += win_rate_interval(list(outcomes), samples=400, seed=seed)[1][0] > 0.5
    assert alarms / 300 < 0.06  # one-sided 2.5 % nominal
