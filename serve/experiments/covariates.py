"""CUPED: a smaller variance from what was known about users before they were exposed.

A user's mean before the first exposure predicts the mean after it. What is predicted is taken off both
arms alike; since it was fixed before the arms were, the difference of the arms keeps its expectation and
loses variance. Users who were not seen before count with the mean of those who were.

Source: Deng, Xu, Kohavi, Walker 2013, "Improving the sensitivity of online controlled experiments by
utilizing pre-experiment data", WSDM.
"""

import math
from dataclasses import dataclass

from serve.experiments.comparisons import Estimate, Moments, user_mean

MIN_USERS = 30
"""Fewer users with a covariate, in both arms together, and nothing is adjusted."""


@dataclass(frozen=True, slots=True)
class Adjusted:
    """Both arms' means after adjustment."""

    candidate: Estimate
    control: Estimate
    variance_kept: float
    """Variance of the adjusted difference over that of the plain one."""


def adjust(candidate: Moments, control: Moments) -> Adjusted | None:
    """User means adjusted by their covariate, or `None` where that would not help."""
    arms = (candidate, control)
    known = sum(arm.known for arm in arms)
    if known < MIN_USERS or min(arm.users for arm in arms) < 2:
        return None
    centre = sum(arm.sum_x for arm in arms) / known
    spread = sum(_within(arm.sum_xx, arm.sum_x, arm.sum_x, arm.known) for arm in arms)
    together = sum(_within(arm.sum_xm, arm.sum_x, arm.sum_m_known, arm.known) for arm in arms)
    if not spread > 1e-12 * known:
        return None
    slope = together / spread
    one, other = (_adjusted(arm, slope, centre) for arm in arms)
    plain = sum(user_mean(arm).variance for arm in arms)
    kept = (one.variance + other.variance) / plain if plain > 0 else math.nan
    return Adjusted(one, other, kept) if kept < 1 else None


def _within(sum_ab: float, sum_a: float, sum_b: float, count: float) -> float:
    return sum_ab - sum_a * sum_b / count if count else 0.0


def _adjusted(arm: Moments, slope: float, centre: float) -> Estimate:
    """Mean and variance of m - slope (x - centre), the bracket being 0 where x is not known."""
    off = arm.sum_x - arm.known * centre
    off_squared = arm.sum_xx - 2 * centre * arm.sum_x + arm.known * centre**2
    crossed = arm.sum_xm - centre * arm.sum_m_known
    total = arm.sum_m - slope * off
    squares = arm.sum_mm - 2 * slope * crossed + slope**2 * off_squared
    variance = (squares - total**2 / arm.users) / (arm.users - 1)
    return Estimate(arm.users, total / arm.users, max(0.0, variance) / arm.users)
