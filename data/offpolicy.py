"""Estimates of what another policy would have earned, from the log of this one and its propensities.

Rewards are weighed by how much more often the other policy would have done what was done. Rows of one user belong
together, so the errors are taken over users. `serve.experiments` weighs arms with it, `train.evaluate` answers.

Letters: N rows, U users.

Sources: Horvitz & Thompson 1952 (IPS); Dudík, Langford & Li 2011 (doubly robust); Kish 1965 (effective sample size).
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.stats import norm

Floats = npt.NDArray[np.float64]
Users = npt.NDArray[np.int64]
"""Number of the user of each row, 0 to U - 1; rows of a user are one draw."""
Estimator = Literal["ips", "snips", "doubly_robust"]


@dataclass(frozen=True, slots=True)
class Value:
    """Estimated mean reward under another policy, with its interval."""

    estimator: Estimator
    value: float
    low: float
    high: float
    effective_requests: float
    """Rows drawn from that policy that would have told as much, users apart."""


def weighted_mean(user_N: Users, weight_N: Floats, reward_N: Floats, alpha: float = 0.05) -> Value:
    """IPS: `weight_N` is the other policy's probability of what was done over the recorded one."""
    return ratio_value("ips", user_N, weight_N, weight_N * reward_N, np.ones_like(weight_N), alpha)


def doubly_robust(
    user_N: Users, weight_N: Floats, reward_N: Floats, expected: tuple[Floats, Floats], alpha: float = 0.05
) -> Value:
    """Expected rewards, corrected by the weighed errors of what was expected.

    `expected` are the reward expected of what was done, and of what the other policy would do; float [N] each.
    """
    done_N, other_N = expected
    score_N = other_N + weight_N * (reward_N - done_N)
    return ratio_value("doubly_robust", user_N, weight_N, score_N, np.ones_like(weight_N), alpha)


def ratio_value(
    estimator: Estimator, user_N: Users, weight_N: Floats, score_N: Floats, base_N: Floats, alpha: float
) -> Value:
    """Sum of scores over sum of bases, with an interval over users."""
    value, error = _ratio_over_users(user_N, score_N, base_N)
    half = float(norm.isf(alpha / 2)) * error
    return Value(estimator, value, value - half, value + half, effective_sample_size(weight_N))


def effective_sample_size(weight_N: Floats) -> float:
    """Kish's: the square of the weights' sum over the sum of their squares."""
    squares = float(np.sum(weight_N**2))
    return float(np.sum(weight_N)) ** 2 / squares if squares > 0 else 0.0


def cross_fitted_mean(user_N: Users, reward_N: Floats, among_N: npt.NDArray[np.bool_]) -> Floats:
    """Mean reward of the rows in `among_N`, for each row from the users of the other half."""
    even_N = user_N % 2 == 0
    found_N = np.empty_like(reward_N)
    for half_N in (even_N, ~even_N):
        others_N = among_N & ~half_N
        found_N[half_N] = float(reward_N[others_N].mean()) if others_N.any() else 0.0
    return found_N


def _ratio_over_users(user_N: Users, score_N: Floats, base_N: Floats) -> tuple[float, float]:
    """The ratio with its standard error, by the delta method over users."""
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
