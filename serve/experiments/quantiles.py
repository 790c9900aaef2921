"""Quantiles that may be looked at continuously, such as the 95th percentile of latency, and a test of two arms.

Values are kept as counts in bins that grow by a constant factor, so an arm's histogram is a few hundred
numbers however many requests it saw, and two histograms add up. The share of values below any edge is
a Bernoulli sequence, so its always-valid evidence says which edges the true quantile may lie at.

Source: Howard & Ramdas 2022, "Sequential estimation of quantiles with applications to A/B testing and
best-arm identification", Bernoulli 28 (theorem 5 for the test).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from serve.experiments.sequences import bernoulli_log_evidence

SMALLEST_S = 0.001
GROWTH = 1.05
BINS = 284
"""From a millisecond to about a thousand seconds; both ends take what lies beyond them."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class QuantileReading:
    """A quantile of one arm with its always-valid interval, widened to the edges of its bins."""

    quantile: float
    value: float
    low: float
    high: float


def bin_of(seconds: float) -> int:
    """The bin of a duration, 0 to `BINS` - 1."""
    if seconds <= SMALLEST_S:
        return 0
    return min(BINS - 1, 1 + math.floor(math.log(seconds / SMALLEST_S) / math.log(GROWTH)))


def edges_of(bin_number: int) -> tuple[float, float]:
    """Lower and upper edge of a bin, in seconds."""
    low = 0.0 if bin_number == 0 else SMALLEST_S * GROWTH ** (bin_number - 1)
    return low, math.inf if bin_number == BINS - 1 else SMALLEST_S * GROWTH**bin_number


def read_quantile(
    counts_K: Sequence[float], quantile: float, alpha: float, tuning_trials: float
) -> QuantileReading | None:
    """A quantile from counts by bin; `None` without values. `counts_K` may be divided by a design effect."""
    counts = np.asarray(counts_K, float)
    total = float(counts.sum())
    if total <= 0:
        return None
    evidence_K = _evidence(counts, quantile, tuning_trials, 0.05)
    possible = np.flatnonzero(evidence_K < math.log(1.0 / alpha))
    reached = int(np.searchsorted(np.cumsum(counts) / total, quantile - 1e-12))
    low, high = edges_of(int(possible[0]))[0], edges_of(int(possible[-1]))[1]
    below, above = edges_of(reached)
    middle = math.sqrt(max(below, SMALLEST_S / GROWTH) * above) if math.isfinite(above) else below
    return QuantileReading(quantile, middle, low, high)


def equal_quantiles_p_value(
    counts_a_K: Sequence[float],
    counts_b_K: Sequence[float],
    quantile: float,
    tuning_trials: float,
    tuning_alpha: float = 0.05,
) -> float:
    """Always-valid two-sided p-value of "both arms have the same quantile", from counts over one support.

    The evidence is that of the common value which both arms contradict least.
    """
    evidence_K = sum(
        _evidence(np.asarray(counts, float), quantile, tuning_trials, tuning_alpha)
        for counts in (counts_a_K, counts_b_K)
    )
    return min(1.0, math.exp(-float(np.min(evidence_K))))


def _evidence(counts_K: Floats, quantile: float, tuning_trials: float, tuning_alpha: float) -> Floats:
    """Log evidence against each value of the support being the quantile.

    A value is the quantile if its share below is at most, and its share up to it at least, `quantile`;
    the evidence counts what the nearer of the two contradicts.
    """
    total = float(counts_K.sum())
    upto_K = np.cumsum(counts_K) / total
    nearest_K = np.clip(quantile, np.concatenate([[0.0], upto_K[:-1]]), upto_K)
    means, places = np.unique(nearest_K, return_inverse=True)
    found = [bernoulli_log_evidence(float(m), total, quantile, tuning_trials, tuning_alpha) for m in means]
    return np.asarray(found)[places]
