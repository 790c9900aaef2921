"""How a route splits its users: any number of candidates, each with buckets of its own; stable has the rest."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from cluster.errors import InputError
from serve.assignment import DIGITS, Slice

SPLIT_FIELDS = ("candidate", "share", "arms")
"""Fields of a change that say how users are split: `arms`, or `candidate` and `share` for a split of two."""


@dataclass(frozen=True, slots=True)
class Arm(Slice):
    """A candidate on a route, with its slice of the buckets."""

    version: str
    experiment_id: str | None = None
    """The experiment that the candidate is in."""

    def as_json(self) -> dict[str, Any]:
        """For the row and for events; `Arm(**value)` reads it."""
        return asdict(self)


def total(arms: Sequence[Arm]) -> float:
    """Share of users on candidates."""
    return arms[0].share if len(arms) == 1 else round(math.fsum(arm.share for arm in arms), DIGITS)


def live_arms(arms: Sequence[Arm], ceiling: float) -> tuple[Arm, ...]:
    """The candidates that have users, shrunk in proportion where together they pass the ceiling.

    Slices keep their starts, so a lower ceiling only sends users to stable and a higher one brings the same back.
    """
    share = total(arms)
    if share > ceiling:
        arms = [replace(arm, share=round(arm.share * ceiling / share, DIGITS)) for arm in arms]
    return tuple(arm for arm in arms if arm.share > 0)


def changed_arms(arms: tuple[Arm, ...], change: Mapping[str, Any]) -> tuple[Arm, ...]:
    """The candidates after a change.

    Raises:
        InputError: it says both `arms` and `candidate` or `share`, a share has no candidate, or one share is given
            for several candidates.
    """
    if "arms" in change:
        return _given(change)
    if "candidate" not in change and "share" not in change:
        return arms
    candidate = change.get("candidate", arms[0].version if arms else None)
    share = change.get("share", 0.0 if candidate is None or not arms else arms[0].share)
    check_share("share", share)
    if candidate is None:
        if share > 0:
            raise InputError("share", share, "needs a candidate", "name one, or write 0")
        return ()
    if len(arms) > 1 and "candidate" not in change:
        if share > 0:
            raise InputError("share", share, "is no share of several candidates", "write `arms`, or a candidate too")
        return tuple(replace(arm, share=0.0) for arm in arms)
    known = next((arm for arm in arms if arm.version == candidate), Arm(0.0, 0.0, candidate))
    return (replace(known, share=share),)


def _given(change: Mapping[str, Any]) -> tuple[Arm, ...]:
    for name in ("candidate", "share"):
        if name in change:
            raise InputError(name, change[name], "cannot be given beside `arms`", "write one or the other")
    return tuple(sorted(change["arms"], key=lambda arm: arm.start))


def check_arms(arms: Sequence[Arm], stable: str) -> None:
    """Shares in [0, 1], buckets that do not overlap and end at 1 at the latest, versions that differ.

    Raises:
        InputError: which of these does not hold.
    """
    for arm in arms:
        check_share("share", arm.share)
        if arm.version == stable:
            raise InputError("candidate", arm.version, "must differ from stable", "name another version")
    versions = [arm.version for arm in arms]
    if len(set(versions)) < len(versions):
        raise InputError("arms", versions, "must be different versions", "name each once")
    end, before = 0.0, ""
    for arm in arms:
        if not 0 <= arm.start <= 1 or round(arm.start - end, DIGITS) < 0:
            clash = f"must not overlap, as the buckets of {before} and {arm.version} do"
            problem = clash if before else "must be in [0, 1]"
            raise InputError("arms", [(a.version, a.start, a.share) for a in arms], problem, "move one")
        end, before = arm.start + arm.share, arm.version
    if round(end, DIGITS) > 1:
        raise InputError("arms", total(arms), "must end at 1 at the latest", "mend the shares")


def check_share(name: str, value: Any) -> None:
    """A number in [0, 1].

    Raises:
        InputError: it is none.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not 0 <= value <= 1:
        raise InputError(name, value, "must be between 0 and 1", "write a fraction such as 0.25")
