"""Bounds that hold at every look at once (confidence sequences), so a guardrail may be watched continuously.

A fixed-sample test looked at fifty times raises a false alarm about one time in three; these do so at
most alpha of the time, however often one looks. Time is measured in `intrinsic time` v, the variance of the
sum S; a bound u(v) satisfies P(S ever reaches u(v)) <= alpha.

Sources: Howard, Ramdas, McAuliffe, Sekhon 2021, "Time-uniform, nonparametric, nonasymptotic confidence
sequences" (mixtures); Waudby-Smith, Arbour, Sinha, Kennedy, Ramdas 2021, arXiv 2103.06476 (asymptotic
sequences for means).
"""

import math
from collections.abc import Callable

from scipy.optimize import brentq
from scipy.special import log_ndtr

PRECISION = 1e-9  # of a bound that is searched for
LARGEST_LOG = 690.0  # e to this power is still a double
EDGE = 1e-12  # probabilities are searched for in [EDGE, 1 - EDGE]


def best_rho(optimal_time: float, alpha: float) -> float:
    """The mixture's parameter that makes the two-sided bound tightest at `optimal_time`.

    For a one-sided bound pass twice its alpha.
    """
    log_inverse = math.log(1.0 / alpha)
    return optimal_time / (2.0 * log_inverse + math.log1p(2.0 * log_inverse))


def normal_mixture_bound(time: float, alpha: float, rho: float) -> float:
    """Two-sided normal-mixture bound: P(|S| ever passes it) <= alpha."""
    return math.sqrt((time + rho) * math.log((time + rho) / (rho * alpha**2)))


def one_sided_log_evidence(total: float, time: float, rho: float) -> float:
    """Log of the one-sided mixture martingale at S = `total`; large when S is large and positive."""
    spread = time + rho
    return 0.5 * math.log(4.0 * rho / spread) + total**2 / (2.0 * spread) + float(log_ndtr(total / math.sqrt(spread)))


def one_sided_normal_mixture_bound(time: float, alpha: float, rho: float) -> float:
    """One-sided normal-mixture bound: P(S ever passes it) <= alpha."""
    ceiling = math.sqrt(time + rho) * (4.0 + math.sqrt(2.0 * math.log((time + rho) / rho / alpha**2)))
    threshold = math.log(1.0 / alpha)
    return float(brentq(lambda s: one_sided_log_evidence(s, time, rho) - threshold, 0.0, ceiling))


def interval_half_width(variance: float, num_users: float, tuning_users: float, alpha: float) -> float:
    """Half the width of the asymptotic confidence sequence around an estimate.

    Args:
        variance: of the estimate itself (a squared standard error).
        num_users: users behind it, both arms together; its intrinsic time.
        tuning_users: number of users at which the sequence is to be tightest.
    """
    rho = best_rho(tuning_users, alpha)
    return math.sqrt(variance / num_users) * normal_mixture_bound(num_users, alpha, rho)


def one_sided_width(variance: float, num_users: float, tuning_users: float, alpha: float) -> float:
    """Distance from an estimate to its one-sided always-valid bound; arguments as above."""
    rho = best_rho(tuning_users, min(2.0 * alpha, 0.99))
    return math.sqrt(variance / num_users) * one_sided_normal_mixture_bound(num_users, alpha, rho)


def e_value(effect: float, variance: float, num_users: float, tuning_users: float, alpha: float) -> float:
    """Evidence against "no effect", either way: its chance ever to reach 1 / a is at most a when there is none.

    Arguments as for `interval_half_width`. At most 1e300, so that it stays a number.
    """
    if variance <= 0:
        return 1.0
    rho = best_rho(tuning_users, alpha)
    spread = num_users + rho
    total = effect * math.sqrt(num_users / variance)
    return math.exp(min(LARGEST_LOG, 0.5 * math.log(rho / spread) + total**2 / (2.0 * spread)))


def bernoulli_interval(
    successes: float, trials: float, alpha: float, tuning_trials: float, tuning_alpha: float = 0.05
) -> tuple[float, float]:
    """Two-sided confidence sequence for a probability (beta-binomial mixture; exact for any sample size).

    For one side alone at level alpha take the bound of that side at 2 alpha.
    """
    return (
        bernoulli_low(successes, trials, alpha, tuning_trials, tuning_alpha),
        bernoulli_high(successes, trials, alpha, tuning_trials, tuning_alpha),
    )


def bernoulli_low(
    successes: float, trials: float, alpha: float, tuning_trials: float, tuning_alpha: float = 0.05
) -> float:
    """The lower end of `bernoulli_interval`.

    The evidence grows about with the square of the distance from the mean, so its root is searched for: that
    is nearly a line, and takes five evaluations where the evidence itself takes twenty.
    """
    mean = successes / trials if trials > 0 else 0.0
    threshold = math.log(1.0 / alpha)
    if trials <= 0 or mean <= EDGE:
        return 0.0
    evidence = _bernoulli_evidence(mean, trials, tuning_trials, tuning_alpha)
    if evidence(EDGE) <= threshold:
        return 0.0
    least = evidence(mean)
    height = math.sqrt(threshold - least)

    def excess(probability: float) -> float:
        return math.sqrt(max(0.0, evidence(probability) - least)) - height

    low, high = EDGE, mean
    guess = mean - 1.5 * height * math.sqrt(2.0 * mean * (1.0 - mean) / trials)
    if guess > EDGE:
        low, high = (guess, high) if excess(guess) > 0 else (low, guess)
    return float(brentq(excess, low, high, xtol=PRECISION))


def bernoulli_high(
    successes: float, trials: float, alpha: float, tuning_trials: float, tuning_alpha: float = 0.05
) -> float:
    """The upper end of `bernoulli_interval`: the lower end for failures, from the other side."""
    return 1.0 - bernoulli_low(trials - successes, trials, alpha, tuning_trials, tuning_alpha)


def bernoulli_log_evidence(
    mean: float, trials: float, probability: float, tuning_trials: float, tuning_alpha: float
) -> float:
    """Log mixture martingale of "the probability is `probability`" after `trials` with this mean."""
    return _bernoulli_evidence(mean, trials, tuning_trials, tuning_alpha)(probability)


def _bernoulli_evidence(
    mean: float, trials: float, tuning_trials: float, tuning_alpha: float
) -> Callable[[float], float]:
    """The same for any probability p: the likelihood averaged over Beta(r p, r q), over the likelihood at p.

    The paper's rho is r p q, and p q is the variance of one trial.
    """
    successes, failures = mean * trials, (1.0 - mean) * trials
    r = max(best_rho(tuning_trials, tuning_alpha) - 1.0, 1e-3)
    constant = math.lgamma(r) - math.lgamma(r + trials)

    def evidence(probability: float) -> float:
        p = min(max(probability, EDGE), 1 - EDGE)
        q = 1 - p
        mixture = math.lgamma(r * p + successes) + math.lgamma(r * q + failures) + constant
        return mixture - math.lgamma(r * p) - math.lgamma(r * q) - successes * math.log(p) - failures * math.log(q)

    return evidence
