"""A confidence sequence for the mean of bounded values, for small or skewed samples, by betting.

Someone who doubts that the mean is m bets on every next value; if the bets win much, m is doubted
rightly. It holds from the first value on, without any normal approximation, and is narrow where the values
vary little.

Source: Waudby-Smith & Ramdas 2023, "Estimating means of bounded random variables by betting",
Journal of the Royal Statistical Society B 86 (hedged capital, predictable plug-in bets).
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

GRID = 512
LARGEST_BET = 0.75
"""Share of the capital that may be staked at most."""


def betting_interval(
    values: Sequence[float] | npt.NDArray[np.float64], alpha: float, *, low: float = 0.0, high: float = 1.0
) -> tuple[float, float]:
    """Two-sided interval for the mean of values in [low, high], in the order in which they came.

    It may be read after every value. The ends are widened to the grid, never narrowed.

    Raises:
        ValueError: a value lies outside [low, high].
    """
    values_T = (np.asarray(values, float) - low) / (high - low)
    if values_T.size == 0:
        return low, high
    if not (values_T.min() >= 0 and values_T.max() <= 1):
        raise ValueError(f"values must lie in [{low:g}, {high:g}]")
    means_G = np.linspace(0.0, 1.0, GRID + 1)
    kept = np.flatnonzero(_largest_log_capital(values_T, means_G, alpha) < math.log(1.0 / alpha))
    if kept.size == 0:  # bets against every mean won at some time, which happens with probability alpha
        kept = np.array([round(float(values_T.mean()) * GRID)])
    first, last = max(0, int(kept[0]) - 1), min(GRID, int(kept[-1]) + 1)
    return low + (high - low) * first / GRID, low + (high - low) * last / GRID


def _largest_log_capital(
    values_T: npt.NDArray[np.float64], means_G: npt.NDArray[np.float64], alpha: float
) -> npt.NDArray[np.float64]:
    """Log of the largest capital that bets against each mean ever had, half of it staked either way."""
    bets_T = _bets(values_T, alpha)
    with np.errstate(divide="ignore"):
        above_G, below_G = LARGEST_BET / means_G, LARGEST_BET / (1 - means_G)
    capital_GT = []
    for sign, limit_G in ((1.0, above_G), (-1.0, below_G)):
        bets_GT = np.minimum(bets_T[None, :], limit_G[:, None])
        gains_GT = np.log1p(sign * bets_GT * (values_T[None, :] - means_G[:, None]))
        capital_GT.append(np.cumsum(gains_GT, axis=1) + math.log(0.5))
    return np.asarray(np.maximum(*capital_GT).max(axis=1))


def _bets(values_T: npt.NDArray[np.float64], alpha: float) -> npt.NDArray[np.float64]:
    """Stakes made before each value, from the variance of those before it."""
    step_T = np.arange(1, values_T.size + 1)
    mean_T = (0.5 + np.cumsum(values_T)) / (step_T + 1)
    variance_T = (0.25 + np.cumsum((values_T - mean_T) ** 2)) / (step_T + 1)
    before_T = np.concatenate([[0.25], variance_T[:-1]])
    return np.sqrt(2 * math.log(2 / alpha) / (before_T * step_T * np.log(step_T + 1)))
