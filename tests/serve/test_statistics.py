"""The statistics against published numbers; each test names the source it was taken from."""

import math

import numpy as np
import pytest
import scipy.stats

from serve.experiments import comparisons, group_sequential, planner, sequences, srm


def close(found: float, published: float, digits: int) -> bool:
    return abs(found - published) <= 0.5 * 10**-digits * 1.001


@pytest.mark.parametrize(
    ("counts", "weights", "p_value"),
    [
        ([1000, 1200], [0.5, 0.5], 0.000020079),
        ([135, 115], [0.5, 0.5], 0.205903211),
        ([310, 98], [0.75, 0.25], 0.647434186),
        ([500, 500, 600], [0.34, 0.33, 0.33], 0.000592638),
    ],
)
def test_chi_squared_srm_matches_growthbook(counts: list[int], weights: list[float], p_value: float) -> None:
    """GrowthBook, packages/back-end/test/stats.test.ts, srm."""
    assert close(srm.chi_squared_p_value(counts, weights), p_value, 9)


def test_sequential_srm_matches_optimizely() -> None:
    """Optimizely ssrm tests: outcomes 1,2,1,2,3, null .4/.4/.2, prior Dirichlet(1,1,1)."""
    assert close(srm.mixture_log_probability([2, 2, 1], [1, 1, 1]), -6.445720, 6)
    assert close(srm.null_log_probability([2, 2, 1], [0.4, 0.4, 0.2]), -5.274601, 6)


def test_sequential_srm_refuses_a_weight_of_zero() -> None:
    with pytest.raises(ValueError, match="must all be positive"):
        srm.log_bayes_factor([1, 1], [1.0, 0.0], 100)


def test_sequential_srm_rarely_alarms_under_continuous_looks_and_finds_a_mismatch() -> None:
    random = np.random.default_rng(1)

    def lowest_p(true_share: float) -> float:
        candidates = np.cumsum(random.random(2000) < true_share)
        looks = range(20, 2001, 20)
        factors = [srm.log_bayes_factor([candidates[n - 1], n - candidates[n - 1]], [0.25, 0.75], 1000) for n in looks]
        return srm.sequential_p_value(max(factors))

    assert sum(lowest_p(0.25) < 0.05 for _ in range(200)) <= 16
    assert sum(lowest_p(0.32) < 0.001 for _ in range(40)) >= 36


SUMS_A, SUMS_B = (1396.87, 52377.9767), (2422.7, 134698.29)


def test_welch_matches_gbstats() -> None:
    """gbstats tests, TestTwoSidedTTest: absolute."""
    found = comparisons.welch(comparisons.from_sums(3461, *SUMS_B), comparisons.from_sums(3407, *SUMS_A))
    assert close(found.effect, 0.29, 5)
    assert close(found.low, 0.04538, 5)
    assert close(found.high, 0.53462, 5)
    assert close(found.p_value, 0.02016, 5)


def test_relative_confidence_sequence_matches_gbstats() -> None:
    """gbstats tests, SequentialTwoSidedTTest: relative, tuning parameters 1000 and 5000."""
    control, candidate = comparisons.from_sums(3000, *SUMS_A), comparisons.from_sums(3461, *SUMS_B)
    effect, variance = comparisons.relative_difference(candidate, control)
    half = sequences.interval_half_width(variance, 6461, 1000, 0.05)
    assert [
        close(effect, 0.50336, 5),
        close(effect - half, -0.55844, 5),
        close(effect + half, 1.56516, 5),
    ] == [True] * 3
    p1, p0 = 2422 / 3461, 1396 / 3000
    effect, variance = comparisons.relative_difference(
        comparisons.Estimate(3461, p1, p1 * (1 - p1) / 3461),
        comparisons.Estimate(3000, p0, p0 * (1 - p0) / 3000),
    )
    half = sequences.interval_half_width(variance, 6461, 5000, 0.05)
    assert [
        close(effect, 0.50386, 5),
        close(effect - half, 0.40098, 5),
        close(effect + half, 0.60675, 5),
    ] == [True] * 3


def test_normal_mixture_bound_matches_confseq() -> None:
    """confseq tests: normal mixture, v = v_opt = 100, alpha = .05."""
    assert close(sequences.normal_mixture_bound(100, 0.05, sequences.best_rho(100, 0.05)), 30.35209, 5)


def test_one_sided_bound_spends_alpha_on_one_side() -> None:
    rho = sequences.best_rho(100, 0.1)
    one_sided = sequences.one_sided_normal_mixture_bound(100, 0.05, rho)
    assert sequences.normal_mixture_bound(100, 0.1, rho) < one_sided < sequences.normal_mixture_bound(100, 0.05, rho)
    assert math.isclose(sequences.one_sided_log_evidence(one_sided, 100, rho), math.log(20))


def test_bernoulli_interval_matches_confseq() -> None:
    """confseq tests: 700 of 1000, alpha = .05, tuned for 100 trials."""
    low, high = sequences.bernoulli_interval(700, 1000, 0.05, 100)
    assert close(low, 0.65163, 5)
    assert close(high, 0.74595, 5)


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (0, 20), (20, 20), (1, 10_000)])
def test_bernoulli_interval_is_proper_at_the_edges(successes: int, trials: int) -> None:
    low, high = sequences.bernoulli_interval(successes, trials, 0.05, 100)
    mean = successes / trials if trials else 0.5
    assert 0 <= low <= mean <= high <= 1


def test_lan_demets_boundaries_match_five_looks() -> None:
    """R package ldbounds, two-sided alpha = .05. Its grid is coarser: the second is 3.35701 by quadrature."""
    fractions = (0.2, 0.4, 0.6, 0.8, 1.0)
    found = group_sequential.boundaries(fractions, 0.05, sides=2)
    published = (4.8769, 3.3569, 2.6803, 2.2898, 2.0310)
    assert all(close(f, p, 3) for f, p in zip(found, published, strict=True))
    pocock = group_sequential.boundaries(fractions, 0.05, spending="pocock", sides=2)
    assert close(pocock[0], 2.4380, 4) and close(pocock[-1], 2.3859, 3)


def test_group_sequential_one_sided_keeps_alpha() -> None:
    fractions = (0.1, 0.3, 0.5, 1.0)
    bounds = np.array(group_sequential.boundaries(fractions, 0.05))
    steps = np.diff(np.concatenate([[0], fractions]))
    paths = np.cumsum(np.random.default_rng(2).normal(size=(200_000, 4)) * np.sqrt(steps), axis=1)
    crossed = np.any(paths / np.sqrt(fractions) >= bounds, axis=1).mean()
    assert abs(crossed - 0.05) < 0.002


def test_a_single_look_is_the_plain_test() -> None:
    assert math.isclose(group_sequential.boundaries((1.0,), 0.05)[0], scipy.stats.norm.isf(0.05))


def test_fractions_must_increase() -> None:
    with pytest.raises(ValueError, match="must increase"):
        group_sequential.boundaries((0.5, 0.4), 0.05)


def test_looks_fall_due_once_each_at_the_fraction_reached() -> None:
    planned = (0.25, 0.5, 1.0)
    assert group_sequential.next_look(0.2, planned, ()) is None
    assert group_sequential.next_look(0.3, planned, ()) == 0.3
    assert group_sequential.next_look(0.4, planned, (0.3,)) is None
    assert group_sequential.next_look(1.7, planned, (0.3,)) == 1.0
    assert group_sequential.next_look(9.0, planned, (0.3, 1.0)) is None


def test_newcombe_interval_matches_the_paper() -> None:
    """Newcombe 1998, table II: 56/70 against 48/80."""
    low, high = comparisons.newcombe((56, 70), (48, 80))
    assert close(low, 0.0524, 4) and close(high, 0.3339, 4)


@pytest.mark.parametrize(
    ("variance", "margin", "balanced", "canary"),
    [(0.21, 0.03, 2886, 1603), (1.44, 0.1, 1781, 990), (0.0099, 0.005, 4897, 2721)],
)
def test_planner_matches_the_worked_numbers(variance: float, margin: float, balanced: int, canary: int) -> None:
    """statistics-oracles, item 11: thumbs-up .7 at 3 pp, rating SD 1.2 at .1, errors .01 at .5 pp."""
    assert planner.users_needed(variance, margin).candidate == balanced
    assert planner.users_needed(variance, margin, control_per_candidate=9).candidate == canary


def moments_of(totals: np.ndarray, counts: np.ndarray) -> comparisons.Moments:
    means = totals / counts
    sums = (counts, totals, counts**2, counts * totals, totals**2, means, means**2)
    return comparisons.Moments(len(totals), *(float(np.sum(s)) for s in sums))


def test_ratio_variance_follows_the_spread_over_users() -> None:
    """statistics-oracles, item 10: requests of one user resemble each other (intra-class correlation .2)."""
    random = np.random.default_rng(3)

    def arm() -> comparisons.Moments:
        rates = random.beta(0.7 * 4, 0.3 * 4, size=300)  # a + b = 1 / ICC - 1 = 4
        return moments_of(random.binomial(10, rates).astype(float), np.full(300, 10.0))

    pairs = [(arm(), arm()) for _ in range(1000)]
    by_users = [comparisons.welch(comparisons.ratio(a), comparisons.ratio(b)).p_value for a, b in pairs]
    naive = [comparisons.two_proportion_z((round(a.sum_y), 3000), (round(b.sum_y), 3000)).p_value for a, b in pairs]
    assert 0.03 < np.mean(np.array(by_users) < 0.05) < 0.08
    assert np.mean(np.array(naive) < 0.05) > 0.15
    assert 2.2 < np.mean([comparisons.design_effect(a) for a, _ in pairs]) < 3.4  # 1 + 9 · .2 = 2.8


def test_a_proportion_without_events_is_not_certain() -> None:
    none = moments_of(np.zeros(20), np.full(20, 5.0))
    assert comparisons.ratio(none).variance == 0
    assert comparisons.proportion(none).variance > 0


def test_estimates_of_empty_arms_are_not_numbers() -> None:
    empty = comparisons.Moments(0, 0, 0, 0, 0, 0, 0, 0)
    assert math.isnan(comparisons.user_mean(empty).mean)
    assert math.isnan(comparisons.ratio(empty).mean)
    assert math.isnan(comparisons.welch(comparisons.user_mean(empty), comparisons.user_mean(empty)).p_value)
