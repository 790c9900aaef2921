"""What the numbers of an experiment say at one moment: plain values, no database.

`read_metric` turns the sums of two arms into a `Reading`: the effect, how much of it is harm, and bounds
on the harm that hold at every look.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from cluster.settings.experiments import ExperimentSettings
from serve.experiments import comparisons, covariates, sequences
from serve.experiments.betting import betting_interval
from serve.experiments.comparisons import Estimate, Moments
from serve.experiments.metrics import Metric

MIN_USERS_FOR_VARIANCE = 2
NUMBERS = (
    "margin", "effect", "harm", "harm_low", "harm_high", "z", "information", "p_value", "e_value", "variance_kept",
)  # fmt: skip
"""Fields of a `Reading` that are numbers."""


@dataclass(frozen=True, slots=True)
class ArmReading:
    """One arm of one metric."""

    users: int
    count: float
    mean: float | None


@dataclass(frozen=True, slots=True)
class Reading:
    """One metric of the candidate against control. Harm is the effect, turned so that positive is worse."""

    metric: str
    candidate: ArmReading
    control: ArmReading
    margin: float | None = None
    """How much harm is too much, in the metric's units."""
    effect: float | None = None
    harm: float | None = None
    harm_low: float | None = None
    """Always-valid lower bound of the harm; above 0 it is worse for certain."""
    harm_high: float | None = None
    """Always-valid upper bound; below the margin it is non-inferior for certain."""
    z: float | None = None
    """Effect over its standard error, positive is better; for the group-sequential looks."""
    information: float | None = None
    """Inverse of the effect's variance."""
    p_value: float | None = None
    """Two-sided, Welch; for reports, unsafe to look at repeatedly."""
    e_value: float | None = None
    """Evidence that the arms differ, always valid: above 1 / alpha with probability at most alpha when they do not."""
    variance_kept: float | None = None
    """Variance of the effect over what it was without covariates; `None` where none were used."""
    problem: str | None = None
    """Why there are no numbers: `no data`, `too few users`, `not a number`."""

    @property
    def is_breached(self) -> bool:
        """Worse for certain, and by more than its margin."""
        if self.harm is None or self.harm_low is None or self.margin is None:
            return False
        return self.harm_low > 0 and self.harm > self.margin

    @property
    def is_non_inferior(self) -> bool:
        """Harm beyond the margin is excluded for certain."""
        return self.harm_high is not None and self.margin is not None and self.harm_high < self.margin

    @property
    def is_within_margin(self) -> bool:
        """The estimate itself is no worse than the margin."""
        return self.harm is not None and self.margin is not None and self.harm <= self.margin

    @property
    def users(self) -> int:
        """Users of the smaller arm."""
        return min(self.candidate.users, self.control.users)


@dataclass(frozen=True, slots=True)
class UserValues:
    """Each user's first value, in the order in which they came."""

    candidate: tuple[float, ...]
    control: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class SplitReading:
    """Is the split as configured?"""

    users: dict[str, int]
    expected: dict[str, float]
    p_value: float
    """Always valid."""
    chi_squared_p_value: float | None = None
    """For one look only."""


@dataclass(frozen=True, slots=True)
class AnomalyReading:
    """What routers found out of the ordinary with the candidate (`serve.anomalies`), and whether that is certain.

    A router looks at a window of requests again and again, which sticks out by chance sooner or later.
    """

    signal: str
    said: str
    is_certain: bool
    """By an always-valid test of the whole experiment, at its own share of alpha."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """Everything a decision rests on; aggregates only, so it may be kept for ever."""

    experiment_id: str
    period: str
    primary: Reading
    guardrails: tuple[Reading, ...]
    optional_guardrails: tuple[Reading, ...]
    """Counted only where both arms have data."""
    split: SplitReading
    exposed: dict[str, int]
    """Users with an interaction in this period: `candidate` and `control`."""
    first_requests: int = 0
    """How many of the candidate's first requests are in, and how many of them failed."""
    first_errors: int = 0
    last_seen_us: dict[str, int] | None = None
    """Latest interaction of each served arm: `candidate` and `stable`."""
    cursor_lag_events: int = 0
    """Events in the log that are not counted yet."""
    response: Reading | None = None
    """How often users react, for what it says about every metric made of reactions."""
    further_primaries: tuple[Reading, ...] = ()
    anomalies: tuple[AnomalyReading, ...] = ()
    """Those of the candidate during the experiment, one for each signal."""

    @property
    def primaries(self) -> tuple[Reading, ...]:
        """All of them, the first one first."""
        return (self.primary, *self.further_primaries)

    @property
    def all_readings(self) -> tuple[Reading, ...]:
        """Everything that can roll back."""
        return (*self.primaries, *self.guardrails, *self.optional_guardrails)

    def finite(self) -> "Evidence":
        """The same with readings that hold no proper numbers marked so: JSON has no word for them, and a decision
        must follow from what is recorded of it."""
        return replace(
            self,
            primary=_finite_reading(self.primary),
            guardrails=tuple(map(_finite_reading, self.guardrails)),
            optional_guardrails=tuple(map(_finite_reading, self.optional_guardrails)),
            further_primaries=tuple(map(_finite_reading, self.further_primaries)),
            response=_finite_reading(self.response) if self.response else None,
        )

    def as_json(self) -> dict[str, Any]:
        """A form that survives JSON and comes back with `from_json` unchanged."""
        return asdict(self)

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "Evidence":
        """The evidence kept with a decision."""
        return Evidence(
            **{
                **value,
                "primary": _reading(value["primary"]),
                "guardrails": tuple(_reading(r) for r in value["guardrails"]),
                "optional_guardrails": tuple(_reading(r) for r in value["optional_guardrails"]),
                "further_primaries": tuple(_reading(r) for r in value.get("further_primaries", ())),
                "anomalies": tuple(AnomalyReading(**a) for a in value.get("anomalies", ())),
                "split": SplitReading(**value["split"]),
                "response": _reading(value["response"]) if value.get("response") else None,
            }
        )


def _finite_reading(reading: Reading) -> Reading:
    numbers = (getattr(reading, name) for name in NUMBERS)
    if all(number is None or math.isfinite(number) for number in numbers):
        return reading
    return Reading(reading.metric, reading.candidate, reading.control, problem="not a number")


def _reading(value: Mapping[str, Any]) -> Reading:
    arms = {name: ArmReading(**value[name]) for name in ("candidate", "control")}
    return Reading(**{**value, **arms})


def read_metric(
    metric: Metric,
    candidate: Moments | None,
    control: Moments | None,
    settings: ExperimentSettings,
    alpha: float,
    values: UserValues | None = None,
) -> Reading:
    """Compare two arms. `alpha` is this guardrail's share; non-inferiority uses the whole of it.

    With `values`, the users' first values in the order in which they came, the bounds are those of a betting
    sequence.
    """
    one, other = _estimate(metric, candidate), _estimate(metric, control)
    bare = Reading(metric.name, _arm(candidate, one), _arm(control, other))
    if candidate is None or control is None:
        return replace(bare, problem="no data")
    if bare.users < MIN_USERS_FOR_VARIANCE:
        return replace(bare, problem="too few users")
    p_value = comparisons.welch(one, other).p_value
    adjusted = covariates.adjust(candidate, control) if metric.kind == "user_mean" else None
    if adjusted is not None:
        one, other = adjusted.candidate, adjusted.control
    one, other = comparisons.steady(one, other, settings.variance_prior_users)
    variance = one.variance + other.variance
    if not all(math.isfinite(v) for v in (one.mean, other.mean, variance)):
        return replace(bare, problem="not a number")
    effect = one.mean - other.mean
    harm = effect if metric.better == "lower" else -effect
    if values is not None and metric.bounds is not None:
        low, high = _betting_bounds(metric, values, settings.alpha, alpha)
    else:
        low, high = _harm_bounds(metric, (candidate, control), harm, variance, settings, alpha)
    users = information(candidate.users, control.users)
    return replace(
        bare,
        margin=metric.margin * abs(other.mean) if metric.relative else metric.margin,
        effect=effect,
        harm=harm,
        harm_low=low,
        harm_high=high,
        z=-harm / math.sqrt(variance) if variance > 0 else None,
        information=1.0 / variance if variance > 0 else None,
        p_value=_finite(p_value),
        e_value=sequences.e_value(effect, variance, users, settings.tuning_users, settings.alpha),
        variance_kept=adjusted.variance_kept if adjusted else None,
    )


def _betting_bounds(metric: Metric, values: UserValues, alpha: float, guardrail_alpha: float) -> tuple[float, float]:
    """From one betting sequence an arm, as `_proportion_bounds` does from Bernoulli sequences."""
    assert metric.bounds is not None
    smallest, largest = metric.bounds

    def bounds(alpha: float) -> tuple[float, float]:
        (low_1, high_1), (low_0, high_0) = (
            betting_interval(arm, alpha, low=smallest, high=largest) for arm in (values.candidate, values.control)
        )
        return (low_1 - high_0, high_1 - low_0) if metric.better == "lower" else (low_0 - high_1, high_0 - low_1)

    return bounds(guardrail_alpha)[0], bounds(alpha)[1]


def _estimate(metric: Metric, moments: Moments | None) -> Estimate:
    if moments is None:
        return Estimate(0, math.nan, math.nan)
    if metric.kind == "user_mean":
        return comparisons.user_mean(moments)
    return comparisons.proportion(moments) if metric.kind == "proportion" else comparisons.ratio(moments)


def _arm(moments: Moments | None, estimate: Estimate) -> ArmReading:
    if moments is None:
        return ArmReading(0, 0.0, None)
    return ArmReading(moments.users, moments.sum_n, _finite(estimate.mean))


def _harm_bounds(
    metric: Metric,
    arms: tuple[Moments, Moments],
    harm: float,
    variance: float,
    settings: ExperimentSettings,
    alpha: float,
) -> tuple[float, float]:
    """Always-valid one-sided bounds: lower at `alpha`, upper at the whole `settings.alpha`."""
    if metric.kind == "proportion":
        return _proportion_bounds(metric, arms, settings, alpha)
    users = information(arms[0].users, arms[1].users)
    low = harm - sequences.one_sided_width(variance, users, settings.tuning_users, alpha)
    high = harm + sequences.one_sided_width(variance, users, settings.tuning_users, settings.alpha)
    return low, high


def _proportion_bounds(
    metric: Metric, arms: tuple[Moments, Moments], settings: ExperimentSettings, alpha: float
) -> tuple[float, float]:
    """From one Bernoulli sequence an arm, each with half of alpha on either side.

    Requests of one user are not independent, so trials are divided by the design effect over users.
    """

    effects = {id(arm): comparisons.cautious_design_effect(arm) for arm in arms}

    def distance(worse: Moments, better: Moments, alpha: float) -> float:
        """The least by which the first may exceed the second."""
        ends = []
        for end, moments in ((sequences.bernoulli_low, worse), (sequences.bernoulli_high, better)):
            # a two-sided sequence at alpha has alpha / 2 on each side, which is this arm's share
            effect = effects[id(moments)]
            ends.append(end(moments.sum_y / effect, moments.sum_n / effect, alpha, settings.tuning_trials))
        return ends[0] - ends[1]

    worse, better = reversed(arms) if metric.better == "higher" else arms
    return distance(worse, better, alpha), -distance(better, worse, settings.alpha)


def information(candidate_users: int, control_users: int) -> float:
    """Users of a balanced experiment that would tell as much as these two arms together."""
    return 4.0 * candidate_users * control_users / (candidate_users + control_users)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
