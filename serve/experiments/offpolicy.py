"""What another split would have earned, estimated from the log of this one and its recorded propensities.

Sources: Swaminathan & Joachims 2015 (SNIPS); the others in `data.offpolicy`.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cluster.errors import InputError
from data.offpolicy import Estimator, Floats, Users, Value, cross_fitted_mean, doubly_robust, ratio_value, weighted_mean


@dataclass(frozen=True, slots=True)
class Logged:
    """Requests with a reward, as arrays of one length N."""

    user_N: Users
    """Number of the user, 0 to U - 1; requests of a user are one draw."""
    candidate_N: npt.NDArray[np.bool_]
    """Whether the candidate was assigned."""
    propensity_N: Floats
    """Probability of the arm that was assigned, in (0, 1]."""
    reward_N: Floats


def estimate(logged: Logged, share: float, estimator: Estimator, alpha: float = 0.05) -> Value:
    """Mean reward had the candidate had `share` of the users.

    Raises:
        InputError: a propensity of 0 or no number, or a share outside [0, 1], or no requests.
    """
    _check(logged, share)
    user_N, reward_N = logged.user_N, logged.reward_N
    weight_N = np.where(logged.candidate_N, share, 1.0 - share) / logged.propensity_N
    if estimator == "ips":
        return weighted_mean(user_N, weight_N, reward_N, alpha)
    if estimator == "snips":
        return ratio_value("snips", user_N, weight_N, weight_N * reward_N, weight_N, alpha)
    own, other = (cross_fitted_mean(user_N, reward_N, arm_N) for arm_N in (logged.candidate_N, ~logged.candidate_N))
    expected = np.where(logged.candidate_N, own, other), share * own + (1 - share) * other
    return doubly_robust(user_N, weight_N, reward_N, expected, alpha)


def _check(logged: Logged, share: float) -> None:
    if not (math.isfinite(share) and 0 <= share <= 1):
        raise InputError("share", share, "must be between 0 and 1", "write a fraction such as 0.5")
    if logged.reward_N.size == 0:
        raise InputError("experiment", 0, "has no request with a reward and a propensity", "wait for feedback")
    lowest = float(logged.propensity_N.min())
    if not lowest > 0:
        raise InputError("propensity", lowest, "must be above 0", "leave out requests without a propensity")
