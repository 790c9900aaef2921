"""Gauss-Legendre nodes, which several integrals here share."""

from functools import lru_cache

import numpy as np
import numpy.typing as npt

NODES = 401
Floats = npt.NDArray[np.float64]


def nodes_between(low: float, high: float) -> tuple[Floats, Floats]:
    """Points in [low, high] and their weights, exact for polynomials up to degree 801."""
    points, weights = _legendre()
    return low + (points + 1) * (high - low) / 2, weights * (high - low) / 2


@lru_cache(maxsize=1)
def _legendre() -> tuple[Floats, Floats]:
    points, weights = np.polynomial.legendre.leggauss(NODES)
    return points, weights
