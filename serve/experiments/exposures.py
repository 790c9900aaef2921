"""Who counts where: what one recorded interaction means for the arms of its experiment.

Each candidate has an experiment. Its side are the interactions assigned to it; the control side are those assigned
to stable whose bucket lies in the control slice of the share then in force. Both sides grow together, so they
are compared at the same times. Where candidates reach into the control slice (above one half, for one candidate) it
shrinks, users change sides, and a new `period` begins whose numbers stand by themselves. After a promotion there is
no control: that period is compared with the control of the last stage, to bring the old champion back. In bandit
mode shares move both ways: every request counts for its arm, and the propensities tell the rest.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data.events import RecordedEvent
from serve.assignment import (
    DIGITS,
    Slice,
    alone,
    assign,
    choose_unit,
    highest_end,
    in_control_slice,
    share_in_force,
)

RAMP = "ramp"
"""Period of all shares that leave stable a control slice of their size: up to one half, for one candidate."""
BANDIT = "bandit"
"""The one period of an experiment in bandit mode."""
SplitPart = tuple[str | None, Slice]
"""Experiment and buckets of one candidate in force."""


def period_of(slices: Sequence[Slice], candidate: int) -> str:
    """The period whose numbers a candidate's users belong to, under the slices in force."""
    end = round(highest_end(slices), DIGITS)
    return RAMP if end <= round(1.0 - slices[candidate].share, DIGITS) else f"{end:.6g}"


AFTER = period_of(alone(1.0), 0)
"""The period after a promotion."""


@dataclass(frozen=True, slots=True)
class Design:
    """What must be known of an experiment to count for it."""

    tenant: str
    agent: str
    modality: str
    candidate: str
    created_at_us: int
    is_bandit: bool = False
    watched_until_us: int | None = None
    """Until when its candidate is watched once it is stable; `None` where it will not be."""


class Designs:
    """The experiments that a page of the log may tell of."""

    def __init__(self, known: Mapping[str, Design]) -> None:
        self.bandits = {name for name, design in known.items() if design.is_bandit}
        self._watched: dict[tuple[str, str, str, str], list[tuple[str, int, int]]] = defaultdict(list)
        for name, design in known.items():
            if design.watched_until_us is not None:
                own = (design.tenant, design.agent, design.modality, design.candidate)
                self._watched[own].append((name, design.created_at_us, design.watched_until_us))

    def watching(self, recorded: RecordedEvent) -> list[str]:
        """Experiments whose candidate has become stable and gave this answer as such, not in a life before them."""
        event, body = recorded.event, recorded.event.body
        own = (event.tenant, event.agent or "", body.get("modality", "text"), body.get("assigned_version") or "")
        return [
            name
            for name, since_us, until_us in self._watched.get(own, ())
            if since_us <= event.occurred_at_us <= until_us
        ]


@dataclass(frozen=True, slots=True)
class Exposure:
    """One interaction of an experiment, as far as counting needs it."""

    seq: int
    experiment_id: str
    tenant: str
    agent: str
    user: str
    arm: str
    """`candidate`, `stable`, or `other` for another candidate of the same split."""
    bucket: float
    slices: tuple[Slice, ...]
    """Of all candidates in force."""
    candidate: int
    """Which of them is this experiment's."""
    at_us: int
    by_hand: bool
    """The arm is not what the bucket says: somebody moved this user."""
    is_bandit: bool
    body: dict[str, Any]

    @property
    def share(self) -> float:
        """Of this experiment's candidate."""
        return self.slices[self.candidate].share

    @property
    def period(self) -> str:
        """The period its numbers belong to."""
        return BANDIT if self.is_bandit else period_of(self.slices, self.candidate)

    @property
    def sides(self) -> tuple[str, ...]:
        """`candidate` or `control`, and `fallback` beside the first where stable answered; or none."""
        if self.by_hand:
            return ()
        if self.arm == "candidate":
            return ("candidate", "fallback") if self.body.get("flags", {}).get("fallback") else ("candidate",)
        if self.arm == "other":
            return ()
        is_control = self.is_bandit or in_control_slice(self.slices, self.candidate, self.bucket)
        return ("control",) if is_control else ()

    @property
    def segments(self) -> tuple[str, ...]:
        """The segments of its user, should this be the user's first exposure."""
        tier = self.body.get("user_tier")
        known = {"tier": tier, "modality": self.body.get("modality", "text"), "agent": self.agent}
        return tuple(f"{name}={value}" for name, value in known.items() if value)


def unit_of(recorded: RecordedEvent) -> str:
    """Who an interaction counts for: the user, else the session, else the request."""
    event = recorded.event
    kind, unit = choose_unit(event.user_id, event.session_id, event.interaction_id or event.event_id)
    return unit if kind == "user" else f"{kind}:{unit}"


def exposures_of(recorded: RecordedEvent, designs: Designs) -> list[Exposure]:
    """What an interaction means for each experiment that it belongs to; nothing where there is none.

    Of several candidates on a route, each has an experiment: the answer of one is an exposure in its own, and of
    somebody else in the others'; stable's answer may be control for all of them. A promoted candidate answers as
    stable, and is counted as long as it is watched, whatever experiment comes next.
    """
    body = recorded.event.body
    arm, place, chance = body.get("arm"), body.get("bucket"), body.get("propensity")
    if body.get("flags", {}).get("shadow"):
        return []
    if (
        arm == "none" and body.get("experiment_id") is not None and place is not None
    ):  # kept from its candidate by a pin
        return [_exposure(recorded, body["experiment_id"], "other", alone(1.0), 0, True, False)]
    if arm not in ("stable", "candidate") or place is None or chance is None:
        return []
    parts = split_of(body)
    slices = tuple(own for _, own in parts)
    expected, served = assign(slices, place), _served(body, parts)
    found = [
        _exposure(recorded, name, _arm_for(number, served), slices, number, served != expected, name in designs.bandits)
        for number, (name, _) in enumerate(parts)
        if name is not None
    ]
    if arm == "stable":
        found += [
            _exposure(recorded, name, "candidate", alone(1.0), 0, False, False) for name in designs.watching(recorded)
        ]
    return found


def may_count(recorded: RecordedEvent, designs: Designs) -> bool:
    """False for interactions that are of no experiment, as most of a page may be."""
    return recorded.event.body.get("experiment_id") is not None or bool(designs.watching(recorded))


def split_of(body: Mapping[str, Any]) -> list[SplitPart]:
    """The candidates in force when an interaction was assigned; none without an experiment.

    A share of 0 or 1 compares nobody with anybody.
    """
    if body.get("split"):
        return [(name, Slice(start, share)) for name, start, share in body["split"]]
    share = share_in_force(body["arm"], body["propensity"])
    name = body.get("experiment_id")
    return [(name, Slice(0.0, share))] if name is not None and 0 < share < 1 else []


def _served(body: Mapping[str, Any], parts: Sequence[SplitPart]) -> int | None:
    """Place of the candidate that was assigned; `None` for stable, -1 for one that is not in force."""
    if body["arm"] == "stable":
        return None
    return next((number for number, (name, _) in enumerate(parts) if name == body.get("experiment_id")), -1)


def _arm_for(number: int, served: int | None) -> str:
    if served is None:
        return "stable"
    return "candidate" if served == number else "other"


def _exposure(
    recorded: RecordedEvent,
    experiment_id: str,
    arm: str,
    slices: tuple[Slice, ...],
    candidate: int,
    by_hand: bool,
    is_bandit: bool,
) -> Exposure:
    event = recorded.event
    return Exposure(
        seq=recorded.seq,
        experiment_id=experiment_id,
        tenant=event.tenant,
        agent=event.agent or "",
        user=unit_of(recorded),
        arm=arm,
        bucket=event.body["bucket"],
        slices=slices,
        candidate=candidate,
        at_us=event.occurred_at_us,
        by_hand=by_hand,
        is_bandit=is_bandit,
        body=event.body,
    )
