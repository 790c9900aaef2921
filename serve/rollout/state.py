"""What a rollout is at one moment, and what was decided about it: plain values that survive JSON."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from cluster.settings import Settings
from cluster.settings.experiments import Check, ExperimentSettings, RolloutSettings
from serve.assignment import alone
from serve.experiments.exposures import period_of
from serve.experiments.store import Outcome as ExperimentOutcome

State = Literal[
    "pending",
    "running",
    "holding",
    "awaiting_approval",
    "promoting",
    "promoted",
    "rolling_back",
    "rolled_back",
    "failed",
]
LIVE: tuple[State, ...] = ("running", "holding", "awaiting_approval")
"""States in which the candidate has users and the statistics decide."""
ENDED: tuple[State, ...] = ("promoted", "rolled_back", "failed")
SETTLED: dict[str, State] = {"promoting": "promoted", "rolling_back": "rolled_back"}
"""What a state becomes once its decision is applied."""

Outcome = Literal[
    "start",
    "advance",
    "hold",
    "await_approval",
    "approve",
    "promote",
    "rollback",
    "freeze",
    "unfreeze",
    "fail",
]


class RolloutConfig(BaseModel):
    """The settings a rollout was started with; later edits of `rayloop.yaml` do not change it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    experiment: ExperimentSettings = ExperimentSettings()
    rollout: RolloutSettings = RolloutSettings()
    auto_rollout: bool = False
    rollback_on_regression: bool = True
    gates_override: str | None = None
    """The reason given for starting a version that has not passed its gates."""
    candidates: int = 1
    """How many candidates are compared with the same control; each has its part of alpha."""
    width: float = 1.0
    """Share of the buckets that the candidate may have before it is promoted; stages are fractions of it."""

    @staticmethod
    def of(
        settings: Settings, gates_override: str | None = None, *, candidates: int = 1, width: float = 1.0
    ) -> "RolloutConfig":
        """What the settings in force say. Alpha is split over the candidates (Bonferroni)."""
        own = settings.experiment
        split = {"alpha": own.alpha / candidates, "srm_alpha": own.srm_alpha / candidates}
        return RolloutConfig(
            experiment=own.model_copy(update=split) if candidates > 1 else own,
            rollout=settings.rollout,
            auto_rollout=settings.automation.auto_rollout,
            rollback_on_regression=settings.automation.rollback_on_regression,
            gates_override=gates_override,
            candidates=candidates,
            width=width,
        )

    def share(self, stage: int) -> float:
        """The candidate's share at a stage; the last leaves a control group until it is validated."""
        return min(self.rollout.stages[stage] * self.width, 1.0 - self.rollout.final_control_share)

    def check(self, stage: int) -> Check:
        """What must hold before the stage is left."""
        return self.rollout.checks[stage]

    def period(self, stage: int) -> str:
        """The period of the statistics that the stage is judged by."""
        return period_of(alone(self.share(stage)), 0)

    @property
    def last_stage(self) -> int:
        """Number of the last stage."""
        return len(self.rollout.stages) - 1

    @property
    def num_periods(self) -> int:
        """Over how many periods alpha is split."""
        return len({self.period(stage) for stage in range(len(self.rollout.stages))})


@dataclass(frozen=True, slots=True)
class Look:
    """One planned look at the primary."""

    fraction: float
    """Of the planned information, as reached."""
    z: float
    boundary: float
    metric: str = ""
    """Which primary; empty for the first."""

    @property
    def is_crossed(self) -> bool:
        """The improvement is significant."""
        return self.z >= self.boundary


@dataclass(frozen=True, slots=True)
class RolloutState:
    """What `decide` needs to know of a rollout."""

    state: State
    stage: int
    stage_started_us: int
    holding_since_us: int | None = None
    approved_stage: int | None = None
    """The highest stage a person has let it enter; the number after the last stage stands for promotion."""
    looks: tuple[Look, ...] = ()
    split_broken: bool = False
    """A sample ratio mismatch was seen; it is not forgotten."""
    frozen_by: str | None = None
    edited_by: str | None = None
    """Who changed the route under the rollout; seen at this tick."""
    max_share: float = 1.0
    """The route's ceiling."""
    others_share: float = 0.0
    """Share of the other candidates on the route."""
    unseen_since_us: int | None = None
    """Since when no controller could look at it, where that is longer than it may hold."""
    superseded_by: str | None = None
    """The version that another rollout has made stable in place of this one's."""
    answered_by: str | None = None
    """Of a promoted one: the stable version, where that is another by now."""

    @property
    def is_significant(self) -> bool:
        """One of the looks has crossed its boundary."""
        return any(look.is_crossed for look in self.looks)

    def as_json(self) -> dict[str, Any]:
        """A form that survives JSON and comes back with `from_json` unchanged."""
        return asdict(self)

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "RolloutState":
        """The state kept with a decision."""
        return RolloutState(**{**value, "looks": tuple(Look(**look) for look in value["looks"])})


@dataclass(frozen=True, slots=True)
class Decision:
    """What is to be done, and why."""

    outcome: Outcome
    code: str
    """Why, as one word for programs: `too_few_users`, `guardrail`, `stage_passed`, …"""
    reason: str
    """Why, for people."""
    to_state: State
    to_stage: int
    share: float
    """The candidate's share once it is applied."""
    ends_as: ExperimentOutcome | None = None
    """How the experiment ends, where it does."""
    look: Look | None = None
    """A look at the primary that was made for this decision."""
    split_broken: bool = False
    approved_stage: int | None = None
    frozen_by: str | None = None
    details: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """A form that survives JSON and comes back with `from_json` unchanged."""
        return asdict(self)

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "Decision":
        """The decision kept with a rollout."""
        return Decision(**{**value, "look": Look(**value["look"]) if value["look"] else None})

    def with_look(self, look: Look | None) -> "Decision":
        """The same, remembering a look that was made."""
        return replace(self, look=look) if look else self
