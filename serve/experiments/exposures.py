"""Who counts where: what one recorded interaction means for the arms of its experiment.

The candidate's side are interactions assigned to the candidate; the control side are those assigned to stable
whose bucket lies in the control slice of the share then in force. Both sides grow together, so they
are compared at the same times. Above one half the control slice shrinks, users change sides, and a new
`period` begins whose numbers stand by themselves. After a promotion the share is one and there is no
control: its period is compared with the control of the last stage, to bring the old champion back. In bandit
mode shares move both ways: every request counts for its arm, and the propensities tell the rest.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data.events import RecordedEvent
from serve.assignment import LARGEST_CONTROL, assign, choose_unit, in_control_slice, share_in_force

RAMP = "ramp"
"""Period of all shares up to one half."""
BANDIT = "bandit"
"""The one period of an experiment in bandit mode."""


def period_of(share: float) -> str:
    """The period whose numbers a share belongs to."""
    return RAMP if share <= LARGEST_CONTROL else f"{share:.6g}"


AFTER = period_of(1.0)
"""The period after a promotion."""


@dataclass(frozen=True, slots=True)
class Design:
    """What must be known of an experiment to count for it."""

    candidate: str
    is_bandit: bool = False


@dataclass(frozen=True, slots=True)
class Exposure:
    """One interaction of an experiment, as far as counting needs it."""

    seq: int
    experiment_id: str
    tenant: str
    agent: str
    user: str
    arm: str
    bucket: float
    share: float
    at_us: int
    by_hand: bool
    """The arm is not what the bucket says: somebody moved this user."""
    is_bandit: bool
    body: dict[str, Any]

    @property
    def period(self) -> str:
        """The period its numbers belong to."""
        return BANDIT if self.is_bandit else period_of(self.share)

    @property
    def sides(self) -> tuple[str, ...]:
        """`candidate` or `control`, and `fallback` beside the first where stable answered; or none."""
        if self.by_hand:
            return ()
        if self.arm == "candidate":
            return ("candidate", "fallback") if self.body.get("flags", {}).get("fallback") else ("candidate",)
        return ("control",) if self.is_bandit or in_control_slice(self.share, self.bucket) else ()

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


def exposure_of(recorded: RecordedEvent, designs: Mapping[str, Design]) -> Exposure | None:
    """The exposure an interaction event records; `None` when it belongs to no experiment.

    Stable's answers while the candidate has no share count for nobody, but once it is promoted they are its own.
    """
    event, body = recorded.event, recorded.event.body
    arm, place, chance = body.get("arm"), body.get("bucket"), body.get("propensity")
    experiment_id = body.get("experiment_id")
    if experiment_id is None or arm not in ("stable", "candidate") or place is None or chance is None:
        return None
    design = designs.get(experiment_id)
    share = share_in_force(arm, chance)
    if share == 0.0 and design is not None and body.get("assigned_version") == design.candidate:
        arm, share = "candidate", 1.0
    elif not 0 < share < 1:
        return None
    if body.get("flags", {}).get("shadow"):
        return None
    return Exposure(
        seq=recorded.seq,
        experiment_id=experiment_id,
        tenant=event.tenant,
        agent=event.agent or "",
        user=unit_of(recorded),
        arm=arm,
        bucket=place,
        share=share,
        at_us=event.occurred_at_us,
        by_hand=arm != assign(share, place),
        is_bandit=design is not None and design.is_bandit,
        body=body,
    )
