"""The statistics against published numbers; each test names the source it was taken from."""

import math

import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from serve.experiments import comparisons, group_sequential, planner, proportions, quantiles, sequences, srm


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
    """Optimizely ssrm tests: outcomes 1,2,1,2,3, null .4/.4/.2, prior Dirichlet(1,1,1).

    By hand the null is 4 ln .4 + ln .2 = -5.274601 and the mixture ln(2! 2! 1! 2! / 7!) = -6.445720.
    """
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


FIVE = (0.2, 0.4, 0.6, 0.8, 1.0)


def test_lan_demets_boundaries_match_five_looks() -> None:
    """R package ldbounds, two-sided alpha = .05; the second look of O'Brien-Fleming is checked by itself below."""
    found = group_sequential.boundaries(FIVE, 0.05, sides=2)
    published = (4.8769, 3.3570, 2.6803, 2.2898, 2.0310)
    assert [round(bound, 4) for bound in found] == list(published)
    pocock = group_sequential.boundaries(FIVE, 0.05, spending="pocock", sides=2)
    assert [round(bound, 4) for bound in pocock] == [2.4380, 2.4268, 2.4102, 2.3966, 2.3860]
    assert close(pocock[-1], 2.3859, 3)


def test_the_second_boundary_by_adaptive_quadrature() -> None:
    """ldbounds prints 3.3569: its grid is coarse. The first look is exact, so one integral decides."""
    first, second = group_sequential.boundaries(FIVE[:2], 0.05, sides=2)
    spent = [group_sequential.obrien_fleming_spent(t, 0.05, 2) for t in FIVE[:2]]
    norm = scipy.stats.norm

    def density(z: float) -> float:  # increments of equal information: z2 √2 = z1 + z'
        return float(norm.pdf(z) * (norm.sf(second * math.sqrt(2) - z) + norm.cdf(-second * math.sqrt(2) - z)))

    crossing = scipy.integrate.quad(density, -first, first, epsabs=1e-13)[0]
    assert math.isclose(crossing, spent[1] - spent[0], rel_tol=1e-9)
    assert close(second, 3.35701, 5)


@pytest.mark.parametrize(("looks", "error"), [(2, 0.083), (5, 0.142), (10, 0.193), (20, 0.248), (50, 0.320)])
def test_peeking_inflates_a_fixed_test_as_published(looks: int, error: float) -> None:
    """Armitage, McPherson & Rowe 1969, table 2: two-sided .05 at equally spaced looks."""
    random = np.random.default_rng(4)
    paths = np.cumsum(random.normal(size=(100_000, looks)), axis=1) / np.sqrt(np.arange(1, looks + 1))
    assert abs(np.mean(np.any(np.abs(paths) > 1.95996, axis=1)) - error) < 0.0045  # three standard errors


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


def test_intervals_for_two_proportions_match_the_paper() -> None:
    """Newcombe 1998, table II: 56/70 against 48/80; and 7/34 against 1/34 by the uncorrected score."""
    one, other = (56, 70), (48, 80)
    found = [f(one, other) for f in (proportions.newcombe, proportions.mee, proportions.miettinen_nurminen)]
    published = [(0.0524, 0.3339), (0.0533, 0.3377), (0.0528, 0.3382)]
    assert all(close(f, p, 4) for pair in zip(found, published, strict=True) for f, p in zip(*pair, strict=True))
    low, high = proportions.mee((7, 34), (1, 34))
    assert close(low, 0.0284, 4) and close(high, 0.3439, 4)


@pytest.mark.parametrize(("one", "other"), [((0, 20), (0, 20)), ((20, 20), (0, 20)), ((1, 1), (1, 1))])
def test_score_intervals_are_proper_at_the_edges(one: tuple[int, int], other: tuple[int, int]) -> None:
    for interval in (proportions.mee, proportions.miettinen_nurminen):
        low, high = interval(one, other)
        assert -1 <= low <= one[0] / one[1] - other[0] / other[1] <= high <= 1


@pytest.mark.parametrize(
    ("quantile", "offset", "p_value"),
    [(0.5, 70, 0.814704), (0.5, 85, 0.0838055), (0.5, 100, 0.0054947), (0.9, 55, 0.0340463)],
)
def test_equal_quantiles_matches_confseq(quantile: float, offset: int, p_value: float) -> None:
    """confseq tests, QuantileABTest: 1..1000 against the same shifted, tuned for 100 values."""
    support = np.arange(1, 1001 + offset)
    arms = [((support > first) & (support <= first + 1000)).astype(float) for first in (0, offset)]
    assert abs(quantiles.equal_quantiles_p_value(*arms, quantile, 100) - p_value) < 5e-7


def test_a_bins_edges_hold_its_durations() -> None:
    for seconds in (0.0, 0.0009, 0.001, 0.0134, 1.0, 9.99, 250.0, 5000.0):
        low, high = quantiles.edges_of(quantiles.bin_of(seconds))
        assert low <= seconds <= high * (1 + 1e-12)


def test_quantile_sequence_covers_at_every_look_and_tightens() -> None:
    random = np.random.default_rng(12)
    truth = math.exp(1.6449 * 0.5)  # 95th percentile of a log-normal with sigma .5

    def covers() -> bool:
        bins = np.array([quantiles.bin_of(v) for v in random.lognormal(0, 0.5, 3000)])
        for look in range(200, 3001, 200):
            reading = quantiles.read_quantile(np.bincount(bins[:look], minlength=quantiles.BINS), 0.95, 0.05, 1000)
            assert reading is not None
            if not reading.low <= truth <= reading.high:
                return False
        assert reading.high / reading.low < 1.35 and reading.low <= reading.value <= reading.high
        return True

    assert sum(covers() for _ in range(60)) >= 57


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
    naive = [proportions.two_proportion_z((round(a.sum_y), 3000), (round(b.sum_y), 3000)).p_value for a, b in pairs]
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
