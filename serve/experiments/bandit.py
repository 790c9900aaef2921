"""Bandit mode, for choices where a wrong arm costs little: shares follow the evidence, from a floor upwards.

The candidate gets the probability that it is the better arm (Thompson sampling, its probability computed and
not drawn, so that a decision can be replayed), never less than the floor and never more than one minus
it. The share in force is recorded with each request as its propensity, so other splits can be estimated
afterwards (`offpolicy`). No always-valid claim is made from such data.

Sources: Thompson 1933; Chapelle & Li 2011, "An empirical evaluation of Thompson sampling".
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy.stats import beta

from cluster.errors import InputError
from serve.experiments.quadrature import nodes_between


@dataclass(frozen=True, slots=True)
class Posterior:
    """Beta posterior of one arm's mean, values scaled to [0, 1]."""

    a: float
    b: float


def posterior(
    total: float, count: float, *, low: float = 0.0, high: float = 1.0, design_effect: float = 1.0
) -> Posterior:
    """Posterior of a mean in [low, high] from a sum and a count, on a uniform prior.

    Values of one user resemble each other; the count is divided by the design effect.
    """
    liked = (total - low * count) / (high - low)
    return Posterior(1.0 + liked / design_effect, 1.0 + (count - liked) / design_effect)


def probability_better(candidate: Posterior, control: Posterior) -> float:
    """P(the candidate's mean is the higher one)."""
    spans = [beta.ppf((1e-12, 1 - 1e-12), arm.a, arm.b) for arm in (candidate, control)]
    low, high = min(s[0] for s in spans), max(s[1] for s in spans)
    at, weights = nodes_between(low, high)
    better = float(np.sum(weights * beta.pdf(at, candidate.a, candidate.b) * beta.cdf(at, control.a, control.b)))
    return min(1.0, max(0.0, better))


def thompson_share(candidate: Posterior, control: Posterior, floor: float) -> float:
    """The candidate's next share, in [floor, 1 - floor], to four digits.

    Raises:
        InputError: the floor is not in (0, 0.5].
    """
    if not (math.isfinite(floor) and 0 < floor <= 0.5):
        raise InputError("bandit_floor", floor, "must be above 0 and at most 0.5", "write a share such as 0.05")
    return round(min(1 - floor, max(floor, probability_better(candidate, control))), 4)
