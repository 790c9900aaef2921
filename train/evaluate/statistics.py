"""Statistics of evaluation: intervals of proportions, paired tests, bootstrap by cluster.

Pure functions over counts and arrays. Where two versions answer the same prompts the comparison is
paired; where several prompts come from one user, users are resampled, not prompts.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Interval = tuple[float, float]


@dataclass(frozen=True)
class PairedCounts:
    """Outcomes of two versions on the same cases."""

    both: int
    only_first: int
    only_second: int
    neither: int

    @property
    def total(self) -> int:
        """Number of cases."""
        return self.both + self.only_first + self.only_second + self.neither

    @property
    def difference(self) -> float:
        """Share that passes in the first minus the share that passes in the second."""
        return (self.only_first - self.only_second) / self.total


def count_pairs(first: Sequence[bool], second: Sequence[bool]) -> PairedCounts:
    """The two-by-two table of paired outcomes."""
    pairs = list(zip(first, second, strict=True))
    return PairedCounts(
        both=pairs.count((True, True)),
        only_first=pairs.count((True, False)),
        only_second=pairs.count((False, True)),
        neither=pairs.count((False, False)),
    )


def normal_quantile(probability: float) -> float:
    """Quantile of the standard normal distribution."""
    from scipy.special import ndtri

    return float(ndtri(probability))


def wilson(successes: int, total: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion.

    Source: Wilson 1927, https://doi.org/10.2307/2276774
    """
    if total == 0:
        return 0.0, 1.0
    z = normal_quantile((1 + confidence) / 2)
    share = successes / total
    centre = share + z * z / (2 * total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    low = 0.0 if successes == 0 else (centre - half) / scale
    return low, 1.0 if successes == total else (centre + half) / scale


def newcombe(x1: int, n1: int, x2: int, n2: int, confidence: float = 0.95) -> Interval:
    """Interval of p1 - p2 for independent samples, from the two Wilson intervals.

    Source: Newcombe 1998, method 10, https://pubmed.ncbi.nlm.nih.gov/9595617/
    """
    p1, p2 = x1 / n1, x2 / n2
    (low1, high1), (low2, high2) = wilson(x1, n1, confidence), wilson(x2, n2, confidence)
    return (
        p1 - p2 - math.hypot(p1 - low1, high2 - p2),
        p1 - p2 + math.hypot(high1 - p1, p2 - low2),
    )


def newcombe_paired(counts: PairedCounts, confidence: float = 0.95) -> Interval:
    """Interval of the difference of two proportions measured on the same cases.

    Source: Newcombe 1998, method 10 for paired data, https://pubmed.ncbi.nlm.nih.gov/9839354/
    """
    n = counts.total
    if n == 0:
        return -1.0, 1.0
    x1, x2 = counts.both + counts.only_first, counts.both + counts.only_second
    p1, p2 = x1 / n, x2 / n
    (low1, high1), (low2, high2) = wilson(x1, n, confidence), wilson(x2, n, confidence)
    phi = _continuity_corrected_phi(counts)

    def distance(a: float, b: float) -> float:
        return math.sqrt(max(a * a - 2 * phi * a * b + b * b, 0.0))

    difference = p1 - p2
    return difference - distance(p1 - low1, high2 - p2), difference + distance(high1 - p1, p2 - low2)


def _continuity_corrected_phi(counts: PairedCounts) -> float:
    a, b, c, d = counts.both, counts.only_first, counts.only_second, counts.neither
    margins = (a + b) * (c + d) * (a + c) * (b + d)
    if margins == 0:
        return 0.0
    product = float(a * d - b * c)
    if product > 0:
        product = max(product - counts.total / 2, 0.0)
    return product / math.sqrt(margins)


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p-value that discordant pairs fall equally on both sides.

    Source: McNemar 1947, https://doi.org/10.1007/BF02295996, with the binomial distribution.
    """
    from scipy.special import bdtr

    discordant = only_first + only_second
    if discordant == 0:
        return 1.0
    return min(1.0, 2 * float(bdtr(min(only_first, only_second), discordant, 0.5)))


def bootstrap(
    values: npt.ArrayLike,
    clusters: Sequence[str] | None = None,
    *,
    statistic: Callable[[Floats, Floats], Floats] | None = None,
    weights: npt.ArrayLike | None = None,
    confidence: float = 0.95,
    samples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile interval of a (weighted) mean, resampling whole clusters.

    Args:
        values: float [N].
        clusters: N names; rows of one name are drawn together. `None`: every row for itself.
        statistic: maps the sums of weighted values [S] and of weights [S] to the statistic [S]; the
            ratio by default.
        weights: float [N], for example tokens when `values` are means a token.

    Raises:
        ValueError: no values, or `weights` of another length.
    Source: Efron 1979, https://doi.org/10.1214/aos/1176344552; clusters as in Field and Welsh 2007.
    """
    rows_N = np.asarray(values, dtype=float)
    if rows_N.size == 0:
        raise ValueError("a bootstrap needs at least one value")
    weights_N = np.ones_like(rows_N) if weights is None else np.asarray(weights, dtype=float)
    if weights_N.shape != rows_N.shape:
        raise ValueError(f"{weights_N.shape[0]} weights for {rows_N.shape[0]} values")
    sums_C, totals_C = _by_cluster(rows_N * weights_N, weights_N, clusters)
    size, generator = sums_C.size, np.random.default_rng(seed)
    drawn_SC = generator.multinomial(size, np.full(size, 1 / size), samples).astype(float)
    measured_S = (statistic or np.divide)(drawn_SC @ sums_C, drawn_SC @ totals_C)
    tail = (1 - confidence) / 2
    low, high = np.quantile(measured_S, [tail, 1 - tail])
    return float(low), float(high)


def _by_cluster(sums_N: Floats, totals_N: Floats, clusters: Sequence[str] | None) -> tuple[Floats, Floats]:
    if clusters is None:
        return sums_N, totals_N
    _, position_N = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
    sums_C: Floats = np.bincount(position_N, sums_N).astype(float)
    totals_C: Floats = np.bincount(position_N, totals_N).astype(float)
    return sums_C, totals_C


def win_rate_interval(
    outcomes: Sequence[int], clusters: Sequence[str] | None = None, **options: Any
) -> tuple[float, Interval]:
    """Win rate with ties as half, and its interval. Outcomes: 1 win, 0 tie, -1 loss.

    The bootstrap has no width when all outcomes are alike, so there Wilson's interval of the clusters
    stands in; it keeps a handful of equal outcomes from looking certain.
    """
    scores = (np.asarray(outcomes, dtype=float) + 1) / 2
    rate = float(scores.mean())
    low, high = bootstrap(scores, clusters, **options)
    if low == high:
        units = len(set(clusters)) if clusters is not None else len(outcomes)
        wide = wilson(round(rate * units), units, options.get("confidence", 0.95))
        low, high = (rate, rate) if rate == 0.5 and not any(outcomes) else wide
    return rate, (low, high)
