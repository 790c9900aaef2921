"""Krippendorff's alpha: how far reviewers agree, beyond what chance would give.

1 is perfect agreement, 0 what chance gives, below 0 worse. Works with any number of reviewers and with gaps.
Source: Krippendorff 2011, Computing Krippendorff's Alpha-Reliability,
https://repository.upenn.edu/handle/20.500.14332/2089
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Literal

Level = Literal["nominal", "interval"]


def krippendorff_alpha(units: Iterable[Sequence[Hashable]], level: Level = "nominal") -> float | None:
    """Alpha of units, each with the values that its reviewers gave it; `None` where nothing can be compared.

    `nominal`: values are the same or not. `interval`: numbers, whose squared differences count. A unit with fewer
    than two values says nothing, nor does anything where all values are equal.
    """
    pairable = [Counter(values) for values in units if len(values) >= 2]
    totals: Counter[Hashable] = sum(pairable, Counter())
    n = totals.total()
    expected = _disagreement(totals, DELTAS[level]) / (n - 1) if n else 0.0
    if not expected:
        return None
    observed = sum(_disagreement(values, DELTAS[level]) / (values.total() - 1) for values in pairable)
    return 1 - observed / expected


def _disagreement(values: Counter[Hashable], delta: Callable[[Hashable, Hashable], float]) -> float:
    """Sum of the differences over all ordered pairs of values."""
    return sum(count * other * delta(a, b) for a, count in values.items() for b, other in values.items())


def _nominal(one: Hashable, other: Hashable) -> float:
    return float(one != other)


def _interval(one: Hashable, other: Hashable) -> float:
    assert isinstance(one, int | float)
    assert isinstance(other, int | float)
    return float(one - other) ** 2


DELTAS = {"nominal": _nominal, "interval": _interval}
