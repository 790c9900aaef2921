"""Boundaries for a test looked at a planned number of times (group-sequential, Lan-DeMets).

A spending function says how much of alpha may be used up by each fraction of the planned information; the
boundary of a look is the z-value that spends exactly its share, given that no earlier look crossed.
O'Brien-Fleming spends almost nothing early, so its last boundary is close to the one of a single test.

Source: Lan & DeMets 1983, Biometrika 70; the recursion is Armitage, McPherson & Rowe 1969.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
from scipy.optimize import brentq
from scipy.special import ndtr
from scipy.stats import norm

from serve.experiments.quadrature import nodes_between

Spending = Literal["obrien_fleming", "pocock"]
FAR = 12.0  # standard deviations that count as infinitely far


def obrien_fleming_spent(fraction: float, alpha: float, sides: int = 1) -> float:
    """Share of alpha spent by an information fraction: 2 sides (1 - Φ(z_{alpha/(2 sides)} / √t))."""
    return float(2 * sides * norm.sf(norm.isf(alpha / (2 * sides)) / math.sqrt(fraction)))


def pocock_spent(fraction: float, alpha: float, sides: int = 1) -> float:
    """Share of alpha spent by an information fraction: alpha ln(1 + (e - 1) t)."""
    return alpha * math.log1p((math.e - 1.0) * fraction)


SPENT: dict[str, Callable[[float, float, int], float]] = {
    "obrien_fleming": obrien_fleming_spent,
    "pocock": pocock_spent,
}


@lru_cache(maxsize=256)
def boundaries(
    fractions: tuple[float, ...], alpha: float, *, spending: Spending = "obrien_fleming", sides: int = 1
) -> tuple[float, ...]:
    """The z-value each look must pass, for looks at these increasing information fractions in (0, 1].

    Raises:
        ValueError: the fractions do not increase, or leave (0, 1].
    """
    if any(b <= a for a, b in zip((0.0, *fractions), fractions, strict=False)) or fractions[-1] > 1:
        raise ValueError(f"fractions={fractions!r} must increase within (0, 1]")
    spent = [SPENT[spending](fraction, alpha, sides) for fraction in fractions]
    found: list[float] = []
    nodes = weights = density = np.empty(0)
    for look, fraction in enumerate(fractions):
        step = fraction - (fractions[look - 1] if look else 0.0)
        spend = spent[look] - (spent[look - 1] if look else 0.0)
        edge = _edge(nodes, weights * density, step, spend, sides, first=not look)
        found.append(edge / math.sqrt(fraction))
        far = FAR * math.sqrt(fraction)
        new_nodes, new_weights = nodes_between(-min(edge, far) if sides == 2 else -far, min(edge, far))
        density = _propagate(nodes, weights * density, new_nodes, step, first=not look)
        nodes, weights = new_nodes, new_weights
    return tuple(found)


def _edge(nodes: np.ndarray, mass: np.ndarray, step: float, spend: float, sides: int, *, first: bool) -> float:
    """The value of the score process whose crossing, not having crossed before, has probability `spend`."""
    deviation = math.sqrt(step)
    if first:
        return float(norm.isf(spend / sides)) * deviation
    if spend <= 0:
        return math.inf

    def crossing(edge: float) -> float:
        above = float(np.sum(mass * ndtr((nodes - edge) / deviation)))
        below = float(np.sum(mass * ndtr((-edge - nodes) / deviation))) if sides == 2 else 0.0
        return above + below - spend

    return float(brentq(crossing, -FAR, 2 * FAR))


def _propagate(nodes: np.ndarray, mass: np.ndarray, new_nodes: np.ndarray, step: float, *, first: bool) -> np.ndarray:
    """Density of the process at `new_nodes` after a step of this much information."""
    deviation = math.sqrt(step)
    if first:
        return np.asarray(norm.pdf(new_nodes, scale=deviation))
    return np.asarray(norm.pdf(new_nodes[:, None] - nodes[None, :], scale=deviation) @ mass)


def next_look(fraction: float, planned: Sequence[float], made: Sequence[float]) -> float | None:
    """The information fraction to test at now, or `None` when no planned look is due.

    A look is due once information reaches the next planned fraction that lies beyond the last look
    made. It is tested at the fraction reached, so the boundary fits the data it is used on.
    """
    last = made[-1] if made else 0.0
    reached = min(1.0, fraction)
    due = [at for at in planned if last < at <= reached + 1e-12]
    return reached if due and reached > last else None
