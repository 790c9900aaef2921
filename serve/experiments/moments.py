"""Running sums per experiment, metric, period, arm and segment: all that an analysis reads.

They follow the per-user statistics: when a user's count and total change, what the user contributed before is
taken off and what the user contributes now is added. So the sums of an arm are those over its per-user rows, to
rounding, however the log was cut into pages.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from serve.experiments.comparisons import Moments

Floats = npt.NDArray[np.float64]
EVERYBODY = ""
"""The segment that holds all users."""

MomentKey = tuple[str, str, str, str, str]
"""experiment, metric, period, arm, segment"""
TERMS = tuple(field.name for field in fields(Moments))


def contributions(count_U: Floats, total_U: Floats, covariate_U: Floats) -> Floats:
    """What each user adds to the sums, [U, 13] in the order of `Moments`; nothing where the count is 0.

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


@dataclass(frozen=True, slots=True)
class UserSums:
    """One user's statistic before and after a page; a count of 0 contributes nothing."""

    key: tuple[str, str, str, str]
    """experiment, metric, period, arm"""
    segments: tuple[str, ...]
    before: tuple[float, float]
    """Count and total."""
    after: tuple[float, float]
    covariate: float | None


def changes(users: Iterable[UserSums]) -> dict[MomentKey, Floats]:
    """How the sums change, by key: an array [13] in the order of `Moments`."""
    rows = list(users)
    covariate_U = np.array([math.nan if u.covariate is None else u.covariate for u in rows])
    before, after = (np.array([getattr(u, when) for u in rows], float).reshape(-1, 2) for when in ("before", "after"))
    change = contributions(after[:, 0], after[:, 1], covariate_U) - contributions(
        before[:, 0], before[:, 1], covariate_U
    )
    grouped: dict[MomentKey, list[int]] = defaultdict(list)
    for number, user in enumerate(rows):
        for segment in (EVERYBODY, *user.segments):
            grouped[(*user.key, segment)].append(number)
    return {key: change[numbers].sum(axis=0) for key, numbers in grouped.items()}
