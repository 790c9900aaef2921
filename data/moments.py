"""Running sums per experiment, metric, period, arm and segment: all that an analysis reads.

They follow the per-user statistics: when a user's count and total change, what the user contributed before is
taken off and what the user contributes now is added. So the sums of an arm are those over its per-user rows, to
rounding, however the log was cut into pages.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.tables import MOMENT_COLUMNS

Floats = npt.NDArray[np.float64]
EVERYBODY = ""
"""The segment that holds all users."""

TERMS = MOMENT_COLUMNS


def contributions(count_U: Floats, total_U: Floats, covariate_U: Floats) -> Floats:
    """What each user adds to the sums, [U, 13] in the order of `TERMS`; nothing where the count is 0.

    `covariate_U` is the user's mean before the first exposure, NaN where there is none.
    """
    there_U = count_U > 0
    mean_U = np.divide(total_U, count_U, out=np.zeros_like(total_U), where=there_U)
    known_U = there_U & ~np.isnan(covariate_U)
    x_U = np.where(known_U, covariate_U, 0.0)
    mean_known_U = np.where(known_U, mean_U, 0.0)
    terms = (
        there_U, count_U, total_U, count_U**2, count_U * total_U, total_U**2, mean_U, mean_U**2,
        known_U, x_U, x_U**2, mean_known_U, x_U * mean_known_U,
    )  # fmt: skip
    return np.where(there_U[:, None], np.stack([np.asarray(t, float) for t in terms], axis=1), 0.0)


@dataclass(slots=True)
class SumChanges:
    """What one page changes in the sums: users' statistics before and after it, gathered row by row."""

    _rows: list[tuple[float, ...]] = field(default_factory=list)
    """Count and total before, count and total after, covariate."""
    _places: list[int] = field(default_factory=list)
    """Row -> group."""
    _groups: dict[tuple[str, str, str, str, tuple[str, ...]], int] = field(default_factory=dict)
    """Experiment, metric, period, arm and the user's segments -> group."""

    def add(
        self,
        key: tuple[str, str, str, str],
        metric: str,
        segments: Sequence[str],
        sums: tuple[float, ...],
        covariate: float | None,
    ) -> None:
        """One user's statistic. `key`: experiment, user, period, arm; `sums`: count and total before, and after."""
        experiment_id, _, period, arm = key
        group = (experiment_id, metric, period, arm, tuple(segments))
        self._places.append(self._groups.setdefault(group, len(self._groups)))
        self._rows.append((*sums, math.nan if covariate is None else covariate))

    def rows(self) -> list[tuple[Any, ...]]:
        """Additions to `arm_moments`, in the order of its columns."""
        if not self._rows:
            return []
        n0, y0, n1, y1, x = np.array(self._rows).T
        change = contributions(n1, y1, x) - contributions(n0, y0, x)
        by_group = np.zeros((len(self._groups), len(TERMS)))
        np.add.at(by_group, self._places, change)
        sums: dict[tuple[str, ...], Floats] = {}
        for (experiment_id, metric, period, arm, segments), number in self._groups.items():
            for segment in (EVERYBODY, *segments):
                place = (experiment_id, segment, period, metric, arm)
                sums[place] = sums[place] + by_group[number] if place in sums else by_group[number]
        return [(*place, *change.tolist()) for place, change in sorted(sums.items(), key=lambda item: item[0])]
