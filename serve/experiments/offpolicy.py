"""What another split would have earned, estimated from the log of this one and its recorded propensities.

Rewards of requests are weighed by how much more often the other policy would have chosen the arm that was
chosen. Requests of one user belong together, so the errors are taken over users.

Sources: Horvitz & Thompson 1952 (IPS); Swaminathan & Joachims 2015 (SNIPS); Dudík, Langford & Li 2011 (doubly
robust); Kish 1965 (effective sample size).
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.stats import norm

from cluster.errors import InputError

Floats = npt.NDArray[np.float64]
Estimator = Literal["ips", "snips", "doubly_robust"]


@dataclass(frozen=True, slots=True)
class Logged:
    """Requests with a reward, as arrays of one length N."""

    user_N: npt.NDArray[np.int64]
    """Number of the user, 0 to U - 1; requests of a user are one draw."""
    candidate_N: npt.NDArray[np.bool_]
    """Whether the candidate was assigned."""
    propensity_N: Floats
    """Probability of the arm that was assigned, in (0, 1]."""
    reward_N: Floats


@dataclass(frozen=True, slots=True)
class Value:
    """Estimated mean reward a request under another split, with its interval."""

    estimator: Estimator
    value: float
    low: float
    high: float
    effective_requests: float
    """Requests that an experiment of that split would have needed to know as much, users apart."""


def estimate(logged: Logged, share: float, estimator: Estimator, alpha: float = 0.05) -> Value:
    """Mean reward had the candidate had `share` of the users.

    Raises:
        InputError: a propensity of 0 or no number, or a share outside [0, 1], or no requests.
    """
    _check(logged, share)
    target_N = np.where(logged.candidate_N, share, 1.0 - share)
    weight_N = target_N / logged.propensity_N
    score_N, base_N = _scores(logged, weight_N, share, estimator)
    return _value(estimator, logged.user_N, weight_N, score_N, base_N, alpha)


def weighted_mean(user_N: npt.NDArray[np.int64], weight_N: Floats, reward_N: Floats, alpha: float = 0.05) -> Value:
    """IPS for any number of actions: `weight_N` is the target's probability over the recorded one."""
    return _value("ips", user_N, weight_N, weight_N * reward_N, np.ones_like(weight_N), alpha)


def _value(
    estimator: Estimator, user_N: npt.NDArray[np.int64], weight_N: Floats, score_N: Floats, base_N: Floats, alpha: float
) -> Value:
    value, error = _ratio_over_users(user_N, score_N, base_N)
    half = float(norm.isf(alpha / 2)) * error
    squares = float(np.sum(weight_N**2))
    effective = float(np.sum(weight_N)) ** 2 / squares if squares > 0 else 0.0
    return Value(estimator, value, value - half, value + half, effective)


def _scores(logged: Logged, weight_N: Floats, share: float, estimator: Estimator) -> tuple[Floats, Floats]:
    """Terms above and below the line of the estimate."""
    one_N = np.ones_like(weight_N)
    if estimator == "ips":
        return weight_N * logged.reward_N, one_N
    if estimator == "snips":
        return weight_N * logged.reward_N, weight_N
    expected = {arm: _cross_fitted_mean(logged, logged.candidate_N == arm) for arm in (True, False)}
    own_N = np.where(logged.candidate_N, expected[True], expected[False])
    policy_N = share * expected[True] + (1 - share) * expected[False]
    return policy_N + weight_N * (logged.reward_N - own_N), one_N


def _cross_fitted_mean(logged: Logged, chosen_N: npt.NDArray[np.bool_]) -> Floats:
    """Expected reward of an arm for each request, from the users of the other half."""
    even_N = logged.user_N % 2 == 0
    found_N = np.empty_like(logged.reward_N)
    for half_N in (even_N, ~even_N):
        others_N = chosen_N & ~half_N
        found_N[half_N] = float(logged.reward_N[others_N].mean()) if others_N.any() else 0.0
    return found_N


def _ratio_over_users(user_N: npt.NDArray[np.int64], score_N: Floats, base_N: Floats) -> tuple[float, float]:
    """Sum of scores over sum of bases with its standard error, by the delta method over users."""
    users = int(user_N.max()) + 1
    score_U, base_U = (np.bincount(user_N, terms, users) for terms in (score_N, base_N))
    total = float(base_U.sum())
    if total <= 0:
        return math.nan, math.nan
    value = float(score_U.sum()) / total
    if users < 2:
        return value, math.nan
    residual_U = score_U - value * base_U
    return value, math.sqrt(float(np.sum(residual_U**2)) * users / (users - 1)) / total


def _check(logged: Logged, share: float) -> None:
    if not (math.isfinite(share) and 0 <= share <= 1):
        raise InputError("share", share, "must be between 0 and 1", "write a fraction such as 0.5")
    if logged.reward_N.size == 0:
        raise InputError("experiment", 0, "has no request with a reward and a propensity", "wait for feedback")
    lowest = float(logged.propensity_N.min())
    if not lowest > 0:
        raise InputError("propensity", lowest, "must be above 0", "leave out requests without a propensity")
