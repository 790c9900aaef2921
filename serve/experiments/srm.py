"""Is the split as configured? Tests of sample ratio mismatch.

A mismatch means that users were lost or moved on one side, and then no comparison of the arms can be
trusted. `sequential_p_value` may be looked at after every user; χ² is shown beside it because people
know it, and is only valid for one look.
"""

from collections.abc import Sequence

import numpy as np
from scipy.special import chdtrc, gammaln


def chi_squared_p_value(counts: Sequence[int], weights: Sequence[float]) -> float:
    """p-value of Pearson's χ² for users per arm against the configured weights. For one look only.

    Weights are relative, they need not sum to one.
    """
    observed = np.asarray(counts, float)
    expected = observed.sum() * _normalised(weights)
    return float(chdtrc(len(observed) - 1, np.sum((observed - expected) ** 2 / expected)))


def null_log_probability(counts: Sequence[int], weights: Sequence[float]) -> float:
    """Log probability of any one ordered sequence of assignments with these counts, as configured."""
    return float(np.dot(counts, np.log(_normalised(weights))))


def mixture_log_probability(counts: Sequence[int], prior: Sequence[float]) -> float:
    """The same with unknown weights, averaged over a Dirichlet prior.

    Source: Lindon & Malek 2022, "Anytime-valid inference for multinomial count data", section 3.
    """
    counts_K, prior_K = np.asarray(counts, float), np.asarray(prior, float)
    total = gammaln(prior_K.sum()) - gammaln(prior_K.sum() + counts_K.sum())
    return float(total + np.sum(gammaln(prior_K + counts_K) - gammaln(prior_K)))


def log_bayes_factor(counts: Sequence[int], weights: Sequence[float], concentration: float) -> float:
    """Log of the evidence for a mismatch; its exponential is a martingale while the split is right.

    The prior is Dirichlet(concentration · weights): a large concentration looks for small deviations.
    Periods with different weights add up, each user counted in the period of the first exposure.
    """
    prior = concentration * _normalised(weights)
    return mixture_log_probability(counts, list(prior)) - null_log_probability(counts, weights)


def sequential_p_value(log_factor: float) -> float:
    """An always-valid p-value: below alpha ever with probability at most alpha while the split is right."""
    return float(np.exp(-max(0.0, log_factor)))


def _normalised(weights: Sequence[float]) -> np.ndarray:
    weights_K = np.asarray(weights, float)
    if not np.all(weights_K > 0):
        raise ValueError(f"weights={list(weights)!r} must all be positive")
    return np.asarray(weights_K / weights_K.sum())
