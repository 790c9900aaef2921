"""Experiments and rollouts (experiments.md)."""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from cluster.settings.base import Section

Check = Literal["no_regression", "positive_trend", "significant_improvement", "final_validation"]


REACTION_METRICS = (
    "satisfaction", "thumbs_up_rate", "rating", "grader_score", "hallucination_rate", "toxicity_rate", "win_rate",
)  # fmt: skip
"""Metrics of feedback and grades."""
METRIC_NAMES = (
    *REACTION_METRICS, "error_rate", "latency_over_slo", "ttft_over_slo", "refusal_rate", "safety_incident_rate",
    "feedback_response_rate", "tool_error_rate",
)  # fmt: skip
"""The metric table's names (`serve.experiments.metrics` holds the table)."""
OUTCOME_PREFIX = "outcome:"


def _check_names(field: str, names: Iterable[str], known: tuple[str, ...] = METRIC_NAMES) -> None:
    for name in names:
        is_outcome = name.startswith(OUTCOME_PREFIX) and len(name) > len(OUTCOME_PREFIX)
        if name not in known and not is_outcome:
            raise ValueError(f"{field}: {name!r} must be one of {', '.join(known)}, {OUTCOME_PREFIX}NAME")


class ExperimentSettings(Section):
    """What is measured, and how certain the statistics must be."""

    primary: str = "satisfaction"
    """The metric a candidate must improve; a name of the metric table, or `outcome:NAME`."""
    further_primaries: tuple[str, ...] = ()
    """Other metrics of which an improvement suffices. Alpha is divided by the number of primaries, and each must be
    non-inferior at its margin."""
    guardrails: tuple[str, ...] = ("error_rate", "latency_over_slo", "feedback_response_rate")
    """Metrics that must not get worse. Without data on one of them a rollout holds."""
    guardrails_when_present: tuple[str, ...] = (
        "rating",
        "thumbs_up_rate",
        "safety_incident_rate",
        "refusal_rate",
        "ttft_over_slo",
        "hallucination_rate",
        "tool_error_rate",
        "grader_score",
    )
    """Guardrails that count only once both arms have enough users with a value."""
    margins: dict[str, float] = Field({})
    """Metric -> how much worse it may be, in its own units, over the metric table's default."""
    alpha: float = Field(0.05, gt=0, lt=0.5)
    """One-sided error probability: split over the guardrails, and spent over the looks at the primary."""
    power: float = Field(0.8, gt=0.5, lt=1)
    """Probability to find what the planner plans for."""
    tuning_users: int = Field(2000, ge=10)
    """Users, both arms together, at which the always-valid bounds are tightest."""
    tuning_trials: int = Field(1000, ge=10)
    """Requests an arm at which the Bernoulli bounds of rare events are tightest."""
    breach_min_users_per_arm: int = Field(30, ge=2)
    """A guardrail is not read with fewer users: the bounds are asymptotic."""
    variance_prior_users: int = Field(30, ge=0)
    """Each arm's spread is drawn towards the common one as if by this many users, so that twenty users who
    happen to agree do not count as certainty."""
    srm_alpha: float = Field(0.001, gt=0, lt=0.5)
    """The split counts as broken below this always-valid p-value."""
    srm_concentration: float = Field(1000.0, gt=0)
    """Prior weight of the configured split; larger looks for smaller deviations."""
    latency_slo_s: float = Field(10.0, gt=0)
    """An answer that takes longer is over the objective."""
    ttft_slo_s: float = Field(2.0, gt=0)
    """The same for the time to the first token."""
    projection_page: int = Field(1000, ge=1, le=10_000)
    """Events counted in one transaction."""
    covariates: tuple[str, ...] = ("satisfaction",)
    """Metrics whose mean before a user's first exposure is kept and taken off (CUPED). Only metrics of feedback,
    grades and outcomes can be."""
    small_sample_users: int = Field(100, ge=0)
    """With fewer users an arm than this, means of bounded values are read by a betting sequence, which needs no
    normal approximation and is wider. 0 never does."""
    response_drop: float = Field(0.1, gt=0, lt=1)
    """A fall of the feedback response rate by this share of control's is said with every decision to go on, certain
    or not."""
    history_interval_s: float = Field(3600.0, ge=0)
    """How often the sums are kept for the plot over time, by the events' own time."""
    bandit_floor: float = Field(0.1, gt=0, le=0.5)
    """Least share of each arm in bandit mode."""
    bandit_update_s: float = Field(300.0, gt=0)
    """How often a bandit's share follows the evidence."""

    def measures(self, metric: str) -> bool:
        """Whether a decision rests on it."""
        return metric in (self.primary, *self.further_primaries, *self.guardrails, *self.guardrails_when_present)

    @model_validator(mode="after")
    def _metrics_make_sense(self) -> "ExperimentSettings":
        guardrails = (*self.guardrails, *self.guardrails_when_present)
        _check_names("experiment.primary", [self.primary])
        _check_names("experiment.further_primaries", self.further_primaries)
        _check_names("experiment.guardrails", guardrails)
        _check_names("experiment.margins", self.margins)
        _check_names("experiment.covariates", self.covariates, REACTION_METRICS)
        required = (self.primary, *self.further_primaries, *self.guardrails)
        twice = [name for name in required if required.count(name) > 1]
        if twice:
            raise ValueError(f"experiment: {twice[0]!r} must be one of primary, further_primaries and guardrails, once")
        bad = [name for name, margin in self.margins.items() if not margin > 0]
        if bad:
            raise ValueError(f"experiment.margins: the margin of {bad[0]!r} must be above 0")
        return self


class ApplicationSettings(Section):
    """Serve applications for candidates with another base model."""

    driver: Literal["none", "serve", "rayservice"] = "none"
    """What brings them up: Ray Serve's REST API, the RayService resource of Kubernetes, or nothing: then
    `rollout.engine` must hold every candidate."""
    template: str = "engine"
    """The deployed application that a new one is a copy of, with its own name, prefix and base model."""
    linger_s: float = Field(120.0, ge=0)
    """How long one stays after its last version is no longer wanted; open streams end meanwhile."""
    timeout_s: float = Field(10.0, gt=0)
    """How long each request to the API may take, and after which no further try is made in one tick."""
    attempts: int = Field(5, ge=1)
    """Tries of one change against conflicts and lost connections; the next tick goes on."""
    dashboard_url: str | None = Field(None, pattern=r"^https?://\S+$")
    """Driver `serve`: Ray's dashboard. `None` means that of the cluster the controller runs in."""
    rayservice: str = Field("rayloop", pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")
    """Driver `rayservice`: name of the resource."""
    namespace: str | None = Field(None, pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")
    """Its namespace. `None` means that of the service account."""
    api_url: str | None = Field(None, pattern=r"^https?://\S+$")
    """The API server. `None` means that of the cluster the controller runs in."""
    account_dir: Path = Path("/var/run/secrets/kubernetes.io/serviceaccount")
    """Where the service account's `token`, `ca.crt` and `namespace` are mounted."""


class RolloutSettings(Section):
    """The rollout controller."""

    stages: tuple[float, ...] = (0.10, 0.25, 0.50, 1.00)
    """The candidate's share, stage by stage."""
    checks: tuple[Check, ...] = (
        "no_regression",
        "positive_trend",
        "significant_improvement",
        "final_validation",
    )
    """What must hold before each stage is left."""
    stage_duration_s: float = Field(86_400.0, ge=0)
    """Every stage lasts at least this long."""
    min_users_per_arm: int = Field(1000, ge=2)
    """Users with a value of the primary that each arm needs before a stage is left."""
    detectable_improvement: float = Field(0.05, gt=0)
    """Improvement of the primary, in its own units, that the looks are planned for: the last one is made when
    there is enough information to find it with `experiment.power`."""
    looks: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    """Fractions of that information at which the primary is tested."""
    spending: Literal["obrien_fleming", "pocock"] = "obrien_fleming"
    """How alpha is spent over the looks."""
    final_control_share: float = Field(0.05, gt=0, le=0.5)
    """Share that stays on stable during the last stage, until its validation is done."""
    final_min_users_per_arm: int = Field(1000, ge=2)
    """The minimum of the last stage, where the control arm is small."""
    hold_limit_s: float = Field(259_200.0, gt=0)
    """A rollout that holds longer than this is rolled back."""
    stale_after_s: float = Field(1800.0, gt=0)
    """Without an interaction in both arms for this long the numbers are stale."""
    first_requests: int = Field(20, ge=1)
    """The candidate's first requests, which have an absolute stop."""
    first_requests_max_errors: int = Field(5, ge=0)
    """More errors among them roll back without statistics."""
    tick_s: float = Field(30.0, gt=0)
    """Time between two looks at every rollout."""
    lease_s: float = Field(4.0, gt=0)
    """A controller that has not renewed its lease for this long is replaced. It renews it four times as often, between
    two looks too; one that comes too late loses nothing, for whatever two controllers do is done once."""
    start_timeout_s: float = Field(600.0, gt=0)
    """How long a candidate may take to become servable before the rollout fails."""
    confirm_timeout_s: float = Field(30.0, ge=0)
    """How long the routers may take to show a new share before that is warned of. A promotion waits until each of
    them shows it, however long that takes; after `hold_limit_s` it is taken back."""
    restore_window_s: float = Field(604_800.0, ge=0)
    """How long after a promotion `rayloop rollout rollback` still restores the previous champion."""
    warm_s: float = Field(86_400.0, ge=0)
    """How long the previous champion stays loaded after a promotion."""
    engine: str = "local"
    """The engine that must hold the candidate, unless it has a base model of its own."""
    applications: ApplicationSettings = ApplicationSettings()
    router_url: str | None = Field(None, pattern=r"^https?://\S+$")
    """Address of the routers, to try a candidate. `None` means `serve.host` and
    `serve.port`."""
    router_key_env: str = "RAYLOOP_API_KEY"
    """Environment variable with an API key for that. Without it the controller makes a key of its own, which it
    revokes when it ends."""
    smoke_conversations: tuple[tuple[str, ...], ...] = (("Say OK.",),)
    """Held with a candidate before its first user, turn by turn; every turn must be answered."""
    smoke_tokens: int = Field(8, ge=1)
    """Length of those answers."""
    smoke_timeout_s: float = Field(10.0, gt=0)
    """How long each may take."""
    smoke_attempts: int = Field(3, ge=1)
    """A candidate fails its smoke test when it fails this many times, a tick apart."""
    control_cpus: float = Field(0.1, ge=0)
    """Logical CPUs the deployment `control` reserves."""

    @model_validator(mode="after")
    def _stages_make_sense(self) -> "RolloutSettings":
        if not self.stages or any(not 0 < share <= 1 for share in self.stages):
            raise ValueError("rollout.stages must be shares in (0, 1]")
        if any(later <= earlier for earlier, later in zip(self.stages, self.stages[1:], strict=False)):
            raise ValueError("rollout.stages must grow")
        if len(self.checks) != len(self.stages):
            raise ValueError(f"rollout.checks must have one check for each of the {len(self.stages)} stages")
        if "significant_improvement" not in self.checks:
            raise ValueError("rollout.checks must contain significant_improvement: inconclusive never ships")
        bad = [b for a, b in zip((0.0, *self.looks), self.looks, strict=False) if not a < b <= 1]
        if bad or not self.looks or self.looks[-1] != 1:
            raise ValueError("rollout.looks must grow within (0, 1] and end at 1")
        return self
