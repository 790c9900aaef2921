"""How many users an experiment needs, for one look with a one-sided test."""

import math
from dataclasses import dataclass

from scipy.stats import norm


@dataclass(frozen=True, slots=True)
class Plan:
    """Users needed in each arm."""

    candidate: int
    control: int


def users_needed(
    variance: float,
    margin: float,
    *,
    alpha: float = 0.05,
    power: float = 0.8,
    control_per_candidate: float = 1.0,
) -> Plan:
    """Users an arm to tell a difference of `margin` with this power.

    Args:
        variance: of one user's value; p (1 - p) for a proportion.
        margin: the difference to detect, or the non-inferiority margin; in the metric's own units.
        control_per_candidate: users on control for each one on the candidate; 9 for a 10 % canary
            compared with everybody else.
    """
    z = float(norm.isf(alpha) + norm.isf(1 - power))
    exact = z**2 * variance * (1 + 1 / control_per_candidate) / margin**2
    return Plan(math.ceil(exact - 1e-9), math.ceil(exact * control_per_candidate - 1e-9))


def information_needed(improvement: float, *, alpha: float, power: float) -> float:
    """Inverse variance of the effect at which an improvement is found with this power, in one look.

    O'Brien-Fleming looks on the way cost about two per cent more.
    """
    return float((norm.isf(alpha) + norm.isf(1 - power)) / improvement) ** 2


def users_for_proportion(
    probability: float,
    margin: float,
    *,
    alpha: float = 0.05,
    power: float = 0.8,
    control_per_candidate: float = 1.0,
) -> Plan:
    """The same for an event with this probability."""
    variance = probability * (1 - probability)
    return users_needed(variance, margin, alpha=alpha, power=power, control_per_candidate=control_per_candidate)
