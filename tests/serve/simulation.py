"""Many simulated experiments at once, as arrays [experiments, looks]: users with tastes, requests, feedback.

Letters: E experiments, L looks, U users of an arm.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cluster.settings.serving import AnomalySettings
from serve.experiments.comparisons import Moments
from serve.experiments.quantiles import BINS, GROWTH, SMALLEST_S, read_quantile

Floats = npt.NDArray[np.float64]
REQUESTS = 10
ICC = 0.2
"""Correlation of the requests of one user."""


@dataclass(frozen=True)
class ArmSums:
    """Sums over the users there are at each look, each [E, L] or [L]; the terms of `Moments`."""

    users: Floats
    sum_n: Floats
    sum_y: Floats
    sum_nn: Floats
    sum_ny: Floats
    sum_yy: Floats
    sum_m: Floats
    sum_mm: Floats

    def at(self, experiment: int, look: int) -> Moments:
        """The moments of one experiment at one look."""
        users, *sums = (float(getattr(self, name)[experiment, look]) for name in ArmSums.__dataclass_fields__)
        return Moments(int(users), *sums)

    @property
    def mean(self) -> Floats:
        """Mean over users of their means."""
        return self.sum_m / self.users

    @property
    def mean_variance(self) -> Floats:
        """Variance of that mean."""
        return (self.sum_mm - self.sum_m**2 / self.users) / (self.users - 1) / self.users


def user_sums(count_EU: Floats, total_EU: Floats, looks_L: npt.NDArray[np.int64]) -> ArmSums:
    """Cumulative sums at these numbers of users; users without a value count for nothing."""
    there_EU = (count_EU > 0).astype(float)
    mean_EU = np.divide(total_EU, count_EU, out=np.zeros_like(total_EU), where=count_EU > 0)
    terms = (
        there_EU, count_EU, total_EU, count_EU**2, count_EU * total_EU, total_EU**2, mean_EU, mean_EU**2,
    )  # fmt: skip
    return ArmSums(*(np.cumsum(term, axis=1)[:, looks_L - 1] for term in terms))


def tastes(random: np.random.Generator, shape: tuple[int, int], liking: float) -> Floats:
    """Each user's own probability to like an answer: beta with the mean `liking` and correlation `ICC`."""
    concentration = 1 / ICC - 1
    return random.beta(liking * concentration, (1 - liking) * concentration, shape)


def thumbs(
    random: np.random.Generator, taste_EU: Floats, *, reacts: float = 1.0, skew: float = 0.0
) -> tuple[Floats, Floats]:
    """Thumbs each user gave to ten answers, and those that were up.

    `skew` in [-1, 1]: by how much more often (relatively) a liked answer is reacted to than a disliked one.
    """
    liked_EU = random.binomial(REQUESTS, taste_EU)
    up_EU = random.binomial(liked_EU, min(1.0, reacts * (1 + skew)))
    down_EU = random.binomial(REQUESTS - liked_EU, max(0.0, reacts * (1 - skew)))
    return (up_EU + down_EU).astype(float), up_EU.astype(float)


def incidents(random: np.random.Generator, shape: tuple[int, int], rate: float) -> Floats:
    """How many of each user's ten answers a filter stopped; users differ as they do in taste."""
    return random.binomial(REQUESTS, tastes(random, shape, rate)).astype(float)


def sticks_out(
    candidate_EU: Floats, control_EU: Floats, looks_L: npt.NDArray[np.int64], settings: AnomalySettings
) -> npt.NDArray[np.bool_]:
    """[E, L]: whether a router finds the candidate's latest window of incidents out of the ordinary at each look.

    Users ask one after another, so that a window holds those of the latest users.
    """
    width = settings.window // REQUESTS
    start_L = np.maximum(looks_L - width, 0)
    enough_L = (looks_L - start_L) * REQUESTS >= settings.min_requests

    def rate(stopped_EU: Floats) -> Floats:
        upto = np.concatenate([np.zeros((len(stopped_EU), 1)), np.cumsum(stopped_EU, axis=1)], axis=1)
        found: Floats = (upto[:, looks_L] - upto[:, start_L]) / ((looks_L - start_L) * REQUESTS)
        return found

    return (rate(candidate_EU) - rate(control_EU) > settings.safety_excess) & enough_L


def latency_misses(random: np.random.Generator, runs: int, users: int = 300, looks: int = 8) -> float:
    """In how many runs the interval of the p95 misses it at some look.

    Users ask one to many times (a geometric number, ten in the mean) and differ as much as their requests do, all
    lognormal. Counts are weighed as `read_latency` does.
    """
    spread, edges_K, missed = 0.5, SMALLEST_S * GROWTH ** np.arange(BINS - 1), 0
    truth = math.exp(1.6448536 * math.hypot(spread, spread))
    for _ in range(runs):
        asked_U = random.geometric(1 / REQUESTS, users)
        user_N = np.repeat(np.arange(users), asked_U)
        seconds_N = np.exp(random.normal(0, spread, users)[user_N] + random.normal(0, spread, user_N.size))
        bin_N = np.searchsorted(edges_K, seconds_N)
        for look in np.linspace(users // looks, users, looks).astype(int):
            counts_K = np.bincount(bin_N[user_N < look], minlength=BINS)
            weight = np.sum(asked_U[:look] ** 2) / np.sum(asked_U[:look])
            found = read_quantile((counts_K / weight).tolist(), 0.95, 0.05, 1000)
            if found is None or not found.low <= truth <= found.high:
                missed += 1
                break
    return missed / runs


def share_of(alarms_EL: npt.NDArray[np.bool_]) -> float:
    """Share of experiments that raise an alarm at any look."""
    return float(np.mean(np.any(alarms_EL, axis=1)))
