"""Two proportions side by side: the plain test and the intervals people ask for. All valid for one look only.

Each arm is `(events, trials)`, the trials independent of each other; requests of the same user are not,
and belong to `comparisons.proportion`.
"""

import math

import scipy.stats
from scipy.optimize import brentq

from serve.experiments.comparisons import Comparison

Counts = tuple[int, int]
"""Events and trials."""
EDGE = 1e-10  # differences are searched for in [-1 + EDGE, 1 - EDGE]


def two_proportion_z(candidate: Counts, control: Counts, alpha: float = 0.05) -> Comparison:
    """Two-proportion z: pooled test, unpooled interval."""
    (x1, n1), (x2, n2) = candidate, control
    p1, p2, pooled = x1 / n1, x2 / n2, (x1 + x2) / (n1 + n2)
    error = math.sqrt(pooled * (1 - pooled) * (1 / n1 + 1 / n2))
    half = float(scipy.stats.norm.isf(alpha / 2)) * math.sqrt(p1 * (1 - p1) / n1 + p2 * (1 - p2) / n2)
    p_value = 2 * float(scipy.stats.norm.sf(abs(p1 - p2) / error)) if error > 0 else math.nan
    return Comparison(p1 - p2, p1 - p2 - half, p1 - p2 + half, p_value)


def wilson(events: int, trials: int, alpha: float = 0.05) -> tuple[float, float]:
    """Wilson's score interval for one proportion."""
    z = float(scipy.stats.norm.isf(alpha / 2))
    mean = events / trials
    centre = (mean + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z * math.sqrt(mean * (1 - mean) / trials + z * z / (4 * trials**2)) / (1 + z * z / trials)
    return centre - half, centre + half


def newcombe(candidate: Counts, control: Counts, alpha: float = 0.05) -> tuple[float, float]:
    """Newcombe's interval for a difference, from the two Wilson intervals.

    Source: Newcombe 1998, Statistics in Medicine 17, method 10.
    """
    p1, p2 = candidate[0] / candidate[1], control[0] / control[1]
    low1, high1 = wilson(*candidate, alpha)
    low2, high2 = wilson(*control, alpha)
    below, above = math.hypot(p1 - low1, high2 - p2), math.hypot(high1 - p1, p2 - low2)
    return p1 - p2 - below, p1 - p2 + above


def mee(candidate: Counts, control: Counts, alpha: float = 0.05) -> tuple[float, float]:
    """Score interval for a difference, its variance taken under each difference in turn.

    Source: Mee 1984, Biometrics 40; Newcombe 1998, method 5.
    """
    return _score_interval(candidate, control, alpha, 1.0)


def miettinen_nurminen(candidate: Counts, control: Counts, alpha: float = 0.05) -> tuple[float, float]:
    """Mee's interval with the variance taken N / (N - 1) times as large.

    Source: Miettinen & Nurminen 1985, Statistics in Medicine 4.
    """
    total = candidate[1] + control[1]
    return _score_interval(candidate, control, alpha, total / (total - 1))


def _score_interval(candidate: Counts, control: Counts, alpha: float, inflation: float) -> tuple[float, float]:
    z = float(scipy.stats.norm.isf(alpha / 2))
    observed = candidate[0] / candidate[1] - control[0] / control[1]

    def excess(difference: float, sign: float) -> float:
        spread = inflation * _null_variance(candidate, control, difference)
        return sign * (observed - difference) - z * math.sqrt(spread)

    low, high = -1 + EDGE, 1 - EDGE
    found_low = brentq(excess, low, observed, args=(1.0,)) if excess(low, 1.0) > 0 else -1.0
    found_high = brentq(excess, observed, high, args=(-1.0,)) if excess(high, -1.0) > 0 else 1.0
    return float(found_low), float(found_high)


def _null_variance(candidate: Counts, control: Counts, difference: float) -> float:
    """Variance of the observed difference where the true one is `difference` and all else is most likely.

    The most likely control proportion solves a cubic with one root in range, given in closed form by
    Miettinen & Nurminen 1985, appendix I.
    """
    (x1, n1), (x2, n2) = candidate, control
    total, events = n1 + n2, x1 + x2
    c2 = ((n1 + 2 * n2) * difference - total - events) / total
    c1 = ((n2 * difference - total - 2 * x2) * difference + events) / total
    c0 = x2 * difference * (1 - difference) / total
    q = c2**3 / 27 - c1 * c2 / 6 + c0 / 2
    radius = math.copysign(math.sqrt(max(0.0, c2**2 / 9 - c1 / 3)), q)
    turn = (math.pi + math.acos(min(1.0, max(-1.0, q / radius**3)))) / 3 if radius else 0.0
    p2 = min(1.0, max(0.0, 2 * radius * math.cos(turn) - c2 / 3))
    p1 = min(1.0, max(0.0, p2 + difference))
    return p1 * (1 - p1) / n1 + p2 * (1 - p2) / n2
