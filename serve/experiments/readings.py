"""Reads an experiment's evidence from its running sums: a few rows a metric, whatever the log holds."""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

import orjson
import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from cluster.settings.experiments import ExperimentSettings
from cluster.tables import (
    arm_histograms,
    arm_moments,
    arm_statistics,
    cursors,
    events,
    experiment_arms,
    experiment_users,
    experiments,
)
from data.log import EventLog
from data.moments import EVERYBODY, TERMS
from serve.experiments import srm
from serve.experiments.comparisons import Moments
from serve.experiments.evidence import AnomalyReading, Evidence, Reading, SplitReading, UserValues, read_metric
from serve.experiments.fold import LATENCY, RESPONSE_RATE
from serve.experiments.metrics import Metric, find_metric
from serve.experiments.projection import CURSOR, FIRST_REQUESTS, KINDS
from serve.experiments.quantiles import BINS, QuantileReading, equal_quantiles_p_value, read_quantile

_m, _a, _s = arm_moments.c, experiment_arms.c, arm_statistics.c
MOMENTS = sa.select(_m.metric, _m.arm, *(_m[term] for term in TERMS)).where(
    _m.experiment_id == sa.bindparam("experiment_id"),
    _m.segment == sa.bindparam("segment"),
    _m.period == sa.bindparam("period"),
)
ARMS = (
    sa.select(_a.arm, _a.share, _a.users, _a.last_seen_us)
    .where(_a.experiment_id == sa.bindparam("experiment_id"))
    .order_by(_a.share, _a.arm)
)
FIRST = sa.select(_s.sums).where(_s.experiment_id == sa.bindparam("experiment_id"), _s.user_id == "")
LAG = sa.select(sa.func.count()).where(
    events.c.seq > sa.func.coalesce(sa.select(cursors.c.seq).where(cursors.c.name == CURSOR).scalar_subquery(), 0),
    events.c.kind.in_(KINDS),
)
"""Made once: building a statement takes longer than these take to run. The last one counts what is not folded yet."""
ANOMALY = "anomaly.detected"
METRIC_OF_SIGNAL = {"errors": "error_rate", "tool_errors": "tool_error_rate", "safety": "safety_incident_rate"}
"""Signals of the routers and the metric that bears them out; `latency` is borne out by the p95 itself."""
Arms = dict[str, Moments]
"""`candidate`, `control` and, where stable stood in for the candidate, `fallback` -> sums."""


def read_evidence(
    engine: Engine,
    experiment_id: str,
    settings: ExperimentSettings,
    *,
    period: str,
    periods: int = 1,
    control_period: str | None = None,
) -> Evidence:
    """What the statistics say in `period`; alpha is split over guardrails and over the periods there are.

    `control_period`: compare with the control of that period, for a candidate that has been promoted.
    """
    signals = _signals(engine, experiment_id)
    with engine.connect() as connection:
        arms = _moments(connection, experiment_id, period)
        if control_period is not None:
            arms = _with_control(arms, _moments(connection, experiment_id, control_period))
            settings = settings.model_copy(update={"small_sample_users": 0})  # their values are of one period only
        required = [settings.primary, *settings.further_primaries, *settings.guardrails]
        optional = [name for name in settings.guardrails_when_present if name not in required]
        names = [*required, *optional]
        alpha = settings.alpha / _num_tests(names) / periods
        readings = {name: _read(connection, experiment_id, period, name, arms, settings, alpha) for name in names}
        exposed = arms.get("error_rate", {})
        first_requests, first_errors = _first_requests(connection, experiment_id)
        met = _arms(connection, experiment_id)
        found = Evidence(
            experiment_id=experiment_id,
            period=period,
            primary=readings[settings.primary],
            further_primaries=tuple(readings[name] for name in settings.further_primaries),
            guardrails=tuple(readings[name] for name in settings.guardrails),
            optional_guardrails=tuple(readings[name] for name in optional),
            split=_split(met, settings),
            exposed={side: exposed[side].users if side in exposed else 0 for side in ("candidate", "control")},
            first_requests=first_requests,
            first_errors=first_errors,
            last_seen_us=_last_seen(met),
            cursor_lag_events=connection.execute(LAG).scalar() or 0,
            response=read_metric(
                find_metric(RESPONSE_RATE, settings), *_two(arms.get(RESPONSE_RATE, {})), settings, settings.alpha
            ),
            anomalies=_anomalies(connection, experiment_id, period, signals, arms, settings, alpha),
        )
        return found.finite()


def read_all(
    engine: Engine, experiment_id: str, settings: ExperimentSettings, *, period: str, segment: str = EVERYBODY
) -> list[Reading]:
    """Every metric that has data in the period, of one segment of users or of all, for reports."""
    with engine.connect() as connection:
        arms = _moments(connection, experiment_id, period, segment)
    return [
        read_metric(find_metric(name, settings), *_two(arms[name]), settings, settings.alpha) for name in sorted(arms)
    ]


def read_moments(engine: Engine, experiment_id: str, *, period: str, segment: str = EVERYBODY) -> dict[str, Arms]:
    """The sums themselves, by metric and arm."""
    with engine.connect() as connection:
        return _moments(connection, experiment_id, period, segment)


def read_as_served(engine: Engine, experiment_id: str, *, period: str) -> dict[str, float]:
    """Mean of each metric over the candidate's own answers, where stable stood in for some of them.

    Means over requests, shown beside the reading by assigned arm; what the candidate failed at is missing here,
    so it looks better than it is.
    """
    with engine.connect() as connection:
        arms = _moments(connection, experiment_id, period)
    found = {}
    for name, sides in arms.items():
        if "fallback" in sides and "candidate" in sides:
            count = sides["candidate"].sum_n - sides["fallback"].sum_n
            if count > 0:
                found[name] = (sides["candidate"].sum_y - sides["fallback"].sum_y) / count
    return found


def segments_of(engine: Engine, experiment_id: str) -> list[str]:
    """The segments its users are in, such as `tier=pro`."""
    s = arm_moments.c
    query = sa.select(s.segment).where(s.experiment_id == experiment_id, s.segment != EVERYBODY)
    with engine.connect() as connection:
        return list(connection.execute(query.distinct().order_by(s.segment)).scalars())


def read_latency(
    engine: Engine, experiment_id: str, settings: ExperimentSettings, *, period: str, quantile: float = 0.95
) -> tuple[dict[str, QuantileReading], float | None]:
    """A quantile of each arm's latency in seconds with its always-valid interval, and the p-value of "equal"."""
    with engine.connect() as connection:
        arms = _moments(connection, experiment_id, period).get("latency_over_slo", {})
        counts = _latencies(connection, experiment_id, period, arms)
    alpha, tuning = settings.alpha, settings.tuning_trials
    found = {arm: read_quantile(own, quantile, alpha, tuning) for arm, own in sorted(counts.items())}
    p_value = None
    if len(counts) == 2:
        p_value = equal_quantiles_p_value(counts["candidate"], counts["control"], quantile, tuning)
    return {arm: reading for arm, reading in found.items() if reading is not None}, p_value


def read_split(engine: Engine, experiment_id: str, settings: ExperimentSettings) -> SplitReading:
    """Is the split as configured?"""
    with engine.connect() as connection:
        return _split(_arms(connection, experiment_id), settings)


def periods_of(engine: Engine, experiment_id: str) -> list[str]:
    """The periods an experiment has statistics for."""
    s = arm_moments.c
    query = sa.select(s.period).where(s.experiment_id == experiment_id).distinct().order_by(s.period.desc())
    with engine.connect() as connection:
        return list(connection.execute(query).scalars())


def _read(
    connection: Connection,
    experiment_id: str,
    period: str,
    name: str,
    arms: dict[str, Arms],
    settings: ExperimentSettings,
    alpha: float,
) -> Reading:
    metric, (candidate, control) = find_metric(name, settings), _two(arms.get(name, {}))
    values = None
    if candidate and control and _is_small(metric, candidate, control, settings):
        values = _user_values(connection, experiment_id, period, name)
    return read_metric(metric, candidate, control, settings, alpha, values)


def _with_control(arms: dict[str, Arms], earlier: dict[str, Arms]) -> dict[str, Arms]:
    """The candidate of one period beside the control of another."""
    found: dict[str, Arms] = {name: {"candidate": sides["candidate"]} for name, sides in arms.items()}
    for name, sides in earlier.items():
        if "control" in sides:
            found.setdefault(name, {})["control"] = sides["control"]
    return found


def _two(sides: Arms) -> tuple[Moments | None, Moments | None]:
    return sides.get("candidate"), sides.get("control")


def _is_small(metric: Metric, candidate: Moments, control: Moments, settings: ExperimentSettings) -> bool:
    users = min(candidate.users, control.users)
    return metric.kind == "user_mean" and metric.bounds is not None and users < settings.small_sample_users


def _user_values(connection: Connection, experiment_id: str, period: str, metric: str) -> UserValues:
    """Each user's first value, in the order in which they came; only read for small samples.

    Whoever bets on a value must not have seen it: a mean that later values change, or that is put before others which
    were known, would be another game at every look.
    """
    s, u = arm_statistics.c, experiment_users.c
    same = (u.experiment_id == s.experiment_id) & (u.user_id == s.user_id)
    query = (
        sa.select(s.arm, s.sums)
        .join_from(arm_statistics, experiment_users, same)
        .where(s.experiment_id == experiment_id, s.period == period, u.excluded.is_(False))
    )
    firsts: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for arm, text in connection.execute(query):
        _, _, *first = orjson.loads(text).get(metric, (0.0, 0.0))
        if first:
            firsts[arm].append((first[0], first[1]))
    candidate, control = (tuple(value for _, value in sorted(firsts[arm])) for arm in ("candidate", "control"))
    return UserValues(candidate, control)


def _moments(connection: Connection, experiment_id: str, period: str, segment: str = EVERYBODY) -> dict[str, Arms]:
    """Sums over users, by metric and side; users moved by hand are not in them."""
    found: dict[str, Arms] = defaultdict(dict)
    given = {"experiment_id": experiment_id, "period": period, "segment": segment}
    for metric, arm, users, *sums in connection.execute(MOMENTS, given):
        if round(users) > 0:
            found[metric][arm] = Moments(round(users), *sums)
    return found


ArmRow = tuple[str, float, int, int]
"""Arm, share, users first met so, latest interaction."""


def _arms(connection: Connection, experiment_id: str) -> list[ArmRow]:
    rows = connection.execute(ARMS, {"experiment_id": experiment_id})
    return [(arm, share, users, seen_us) for arm, share, users, seen_us in rows]


def _split(rows: Sequence[ArmRow], settings: ExperimentSettings) -> SplitReading:
    """Users by first arm against the share in force when they were first met; not those met after a promotion.

    Users of other candidates are on the other side, as stable's are: the candidate should have its share of all.
    """
    counts: dict[float, dict[str, int]] = defaultdict(lambda: {"candidate": 0, "stable": 0})
    for arm, share, users, _ in rows:
        if users > 0 and share < 1:
            counts[share]["candidate" if arm == "candidate" else "stable"] += users
    log_factor = sum(
        srm.log_bayes_factor([by_arm["candidate"], by_arm["stable"]], [share, 1 - share], settings.srm_concentration)
        for share, by_arm in sorted(counts.items())
    )
    total = {arm: sum(by_arm[arm] for by_arm in counts.values()) for arm in ("candidate", "stable")}
    users = sum(total.values())
    expected = sum(share * sum(by_arm.values()) for share, by_arm in counts.items())
    return SplitReading(
        users=total,
        expected={"candidate": expected, "stable": users - expected},
        p_value=srm.sequential_p_value(log_factor),
        chi_squared_p_value=srm.chi_squared_p_value([total["candidate"], total["stable"]], [expected, users - expected])
        if users
        else None,
    )


def _first_requests(connection: Connection, experiment_id: str) -> tuple[int, int]:
    text = connection.execute(FIRST, {"experiment_id": experiment_id}).scalar()
    count, errors = orjson.loads(text)[FIRST_REQUESTS] if text else (0, 0)
    return int(count), int(errors)


def _last_seen(rows: Sequence[ArmRow]) -> dict[str, int]:
    """Latest interaction of each arm."""
    seen: dict[str, int] = {}
    for arm, _, _, seen_us in rows:
        seen[arm] = max(seen_us, seen.get(arm, seen_us))
    return seen


def _latencies(connection: Connection, experiment_id: str, period: str, arms: Arms) -> dict[str, list[float]]:
    """Latencies of both arms by bin, all requests of a user counting as one.

    Requests of one user resemble each other, and a histogram does not say how much; this is the most they can.
    """
    effects = {side: own.sum_nn / own.sum_n for side, own in arms.items()}
    h = arm_histograms.c
    query = sa.select(h.arm, h.bin, h.count).where(
        h.experiment_id == experiment_id, h.metric == LATENCY, h.period == period, h.arm.in_(("candidate", "control"))
    )
    counts: dict[str, list[float]] = {}
    for arm, number, count in connection.execute(query):
        counts.setdefault(arm, [0.0] * BINS)[number] += count / effects.get(arm, 1.0)
    return counts


def _num_tests(names: Collection[str]) -> int:
    """Over how many tests alpha is split: the metrics, what bears out the routers' signals beside them, and the p95."""
    return len({*names, *METRIC_OF_SIGNAL.values()}) + 1


def _anomalies(
    connection: Connection,
    experiment_id: str,
    period: str,
    signals: Mapping[str, str],
    arms: dict[str, Arms],
    settings: ExperimentSettings,
    alpha: float,
) -> tuple[AnomalyReading, ...]:
    """Each signal with what the numbers of the whole experiment say to it."""
    found = []
    for signal, said in signals.items():
        if signal == "latency":
            certain = _is_slower(connection, experiment_id, period, arms, settings, alpha)
        else:
            reading = _read(connection, experiment_id, period, METRIC_OF_SIGNAL[signal], arms, settings, alpha)
            enough = reading.users >= settings.breach_min_users_per_arm
            certain = enough and reading.harm_low is not None and reading.harm_low > 0
        found.append(AnomalyReading(signal, said, certain))
    return tuple(found)


def _is_slower(
    connection: Connection,
    experiment_id: str,
    period: str,
    arms: dict[str, Arms],
    settings: ExperimentSettings,
    alpha: float,
) -> bool:
    """Whether the candidate's p95 is above control's for certain."""
    moments = arms.get("error_rate", {})
    two = [own for own in _two(moments) if own is not None and own.users >= settings.breach_min_users_per_arm]
    if len(two) < 2:
        return False
    counts = _latencies(connection, experiment_id, period, moments)
    if len(counts) < 2:
        return False
    p95 = {arm: read_quantile(own, 0.95, alpha, settings.tuning_users) for arm, own in counts.items()}
    candidate, control = p95["candidate"], p95["control"]
    p_value = equal_quantiles_p_value(counts["candidate"], counts["control"], 0.95, settings.tuning_users)
    return p_value <= alpha and bool(candidate and control and candidate.value > control.value)


def _signals(engine: Engine, experiment_id: str) -> dict[str, str]:
    """What routers recorded of the candidate while it was in this experiment: each signal, and its last words."""
    e, x = events.c, experiments.c
    with engine.connect() as connection:
        experiment = connection.execute(sa.select(experiments).where(x.experiment_id == experiment_id)).first()
        if experiment is None:
            return {}
        since = sa.and_(e.kind == ANOMALY, e.tenant == experiment.tenant, e.recorded_at_us >= experiment.created_at_us)
        first = connection.execute(sa.select(sa.func.min(e.seq)).where(since)).scalar()
    if first is None:
        return {}
    found = {}
    for recorded in EventLog(engine).scan(first - 1, kinds=[ANOMALY], tenant=experiment.tenant):
        body = recorded.event.body
        if body.get("experiment_id") == experiment_id and body.get("version") == experiment.candidate:
            found[body["signal"]] = f"{body['signal']} {body['value']:.3g}, above {body['limit']:.3g}"
    return dict(sorted(found.items()))
