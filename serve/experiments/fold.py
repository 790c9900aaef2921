"""One page of the log as additions to the statistics: a pure function of the events, no database.

Everything known about an interaction (its feedback, grades, outcomes) is attributed to the arm *assigned*
to that interaction, whoever answered and however late the feedback comes; feedback that precedes its
interaction is counted when the interaction appears.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from cluster.settings.experiments import ExperimentSettings
from data.events import RecordedEvent, chosen_reports, judges
from serve.experiments.exposures import Designs, Exposure, exposures_of, unit_of
from serve.experiments.metrics import (
    METRICS,
    Observation,
    is_explicit,
    is_rejected,
    of_feedback,
    of_grade,
    of_interaction,
    of_outcome,
)
from serve.experiments.quantiles import bin_of

LATENCY = "latency_s"
"""Name of the histogram of whole answers."""
RESPONSE_RATE = "feedback_response_rate"
USER_MEANS = frozenset(name for name, metric in METRICS.items() if metric.kind == "user_mean")

UserKey = tuple[str, str, str, str]
"""experiment, user, period, arm"""
Sums = dict[str, list[float]]
"""metric -> count and total; of users' means also the `seq` and the value of the user's first observation, which no
later one changes"""
HistogramKey = tuple[str, str, str, str, int]
"""experiment, metric, period, arm, bin"""


@dataclass(frozen=True, slots=True)
class Baseline:
    """One observation of a user in any traffic, for the covariates of experiments that come later."""

    seq: int
    tenant: str
    agent: str
    user: str
    metric: str
    value: float


@dataclass(slots=True)
class Fold:
    """What one page adds to the tables."""

    exposures: list[Exposure] = field(default_factory=list)
    """In order."""
    statistics: dict[UserKey, Sums] = field(default_factory=lambda: defaultdict(dict))
    histograms: dict[HistogramKey, float] = field(default_factory=lambda: defaultdict(float))
    baselines: list[Baseline] = field(default_factory=list)

    def add(self, exposure: Exposure, observations: Iterable[Observation], seq: int) -> None:
        """Count observations for the sides of the exposure, as of that place in the log."""
        seen = list(observations)
        for side in exposure.sides:
            own = self.statistics[exposure.experiment_id, exposure.user, exposure.period, side]
            for metric, value in seen:
                sums = own.setdefault(metric, [0.0, 0.0])
                sums[0] += 1.0
                sums[1] += value
                if metric in USER_MEANS and (len(sums) == 2 or seq < sums[2]):
                    sums[2:] = (seq, value)

    def respond(self, exposure: Exposure) -> None:
        """Turn the interaction's counted 0 of the response rate into a 1."""
        for side in exposure.sides:
            own = self.statistics[exposure.experiment_id, exposure.user, exposure.period, side]
            own.setdefault(RESPONSE_RATE, [0.0, 0.0])[1] += 1.0

    def time(self, exposure: Exposure) -> None:
        """Count the answer's latency."""
        for side in exposure.sides:
            number = bin_of(exposure.body.get("latency_s", 0.0))
            self.histograms[exposure.experiment_id, LATENCY, exposure.period, side, number] += 1.0


def fold_groups(
    groups: Iterable[list[RecordedEvent]], after: int, settings: ExperimentSettings, designs: Designs
) -> Fold:
    """Count what is new (`seq` > `after`) in groups of events about one interaction each.

    An interaction counts at its own seq, each of its reactions at the later of the two.
    """
    fold = Fold()
    for group in groups:
        reports = chosen_reports(r for r in group if r.event.kind == "interaction")
        if not reports:
            continue
        interaction = reports[0]
        group = [r for r in group if r.event.kind != "grade" or judges(r.event.body, interaction.event.event_id)]
        _fold_baselines(fold, interaction, group, after, settings)
        for exposure in exposures_of(interaction, designs):
            _fold_exposure(fold, exposure, group, after, settings)
    fold.exposures.sort(key=lambda e: e.seq)
    fold.baselines.sort(key=lambda b: b.seq)
    return fold


def _fold_exposure(
    fold: Fold, exposure: Exposure, group: list[RecordedEvent], after: int, settings: ExperimentSettings
) -> None:
    if exposure.seq > after:
        fold.exposures.append(exposure)
    if is_rejected(exposure.body):
        return
    if exposure.seq > after:
        fold.add(exposure, (*of_interaction(exposure.body, settings), (RESPONSE_RATE, 0.0)), exposure.seq)
        fold.time(exposure)
    responded = False
    for reaction in group:
        first = reaction.event.kind == "feedback" and is_explicit(reaction.event.body) and not responded
        counted_at = max(reaction.seq, exposure.seq)
        if counted_at > after:
            fold.add(exposure, _of_reaction(reaction), counted_at)
            if first:
                fold.respond(exposure)
        responded = responded or first


def _fold_baselines(
    fold: Fold, interaction: RecordedEvent, group: list[RecordedEvent], after: int, settings: ExperimentSettings
) -> None:
    """Reactions that came after their interaction; those before it are too rare to look for."""
    event = interaction.event
    for reaction in group:
        if reaction.seq > max(after, interaction.seq):
            fold.baselines += [
                Baseline(reaction.seq, event.tenant, event.agent or "", unit_of(interaction), metric, value)
                for metric, value in _of_reaction(reaction)
                if metric in settings.covariates
            ]


def _of_reaction(recorded: RecordedEvent) -> Iterator[Observation]:
    body = recorded.event.body
    if recorded.erased or not body:
        return
    reader = {"feedback": of_feedback, "grade": of_grade, "outcome": of_outcome}.get(recorded.event.kind)
    if reader is not None:
        yield from reader(body)
