"""Reads an experiment's evidence from its per-user statistics: a few aggregate queries, never raw events."""

from collections import defaultdict

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from cluster.settings.experiments import ExperimentSettings
from cluster.tables import arm_statistics, cursors, events, experiment_users
from serve.experiments import srm
from serve.experiments.comparisons import Moments
from serve.experiments.evidence import Evidence, Reading, SplitReading, read_metric
from serve.experiments.metrics import find_metric
from serve.experiments.projection import CURSOR, FIRST_REQUESTS, KINDS

Arms = dict[str, Moments]
"""`candidate` and `control` -> sums."""


def read_evidence(
    engine: Engine, experiment_id: str, settings: ExperimentSettings, *, period: str, periods: int = 1
) -> Evidence:
    """What the statistics say in `period`; alpha is split over guardrails and over the periods there are."""
    with engine.connect() as connection:
        arms = _moments(connection, experiment_id, period)
        required = [settings.primary, *settings.guardrails]
        optional = [name for name in settings.guardrails_when_present if name not in required]
        alpha = settings.alpha / (len(required) + len(optional)) / periods
        readings = {name: _read(name, arms, settings, alpha) for name in (*required, *optional)}
        exposed = arms.get("error_rate", {})
        first_requests, first_errors = _first_requests(connection, experiment_id)
        return Evidence(
            experiment_id=experiment_id,
            period=period,
            primary=readings[settings.primary],
            guardrails=tuple(readings[name] for name in required[1:]),
            optional_guardrails=tuple(readings[name] for name in optional),
            split=_split(connection, experiment_id, settings),
            exposed={side: exposed[side].users if side in exposed else 0 for side in ("candidate", "control")},
            first_requests=first_requests,
            first_errors=first_errors,
            last_seen_us=_last_seen(connection, experiment_id),
            cursor_lag_events=_lag(connection),
        )


def read_all(engine: Engine, experiment_id: str, settings: ExperimentSettings, *, period: str) -> list[Reading]:
    """Every metric that has data in the period, for reports."""
    with engine.connect() as connection:
        arms = _moments(connection, experiment_id, period)
    return [_read(name, arms, settings, settings.alpha) for name in sorted(arms)]


def read_split(engine: Engine, experiment_id: str, settings: ExperimentSettings) -> SplitReading:
    """Is the split as configured?"""
    with engine.connect() as connection:
        return _split(connection, experiment_id, settings)


def periods_of(engine: Engine, experiment_id: str) -> list[str]:
    """The periods an experiment has statistics for."""
    s = arm_statistics.c
    query = sa.select(s.period).where(s.experiment_id == experiment_id).distinct().order_by(s.period.desc())
    with engine.connect() as connection:
        return list(connection.execute(query).scalars())


def _read(name: str, arms: dict[str, Arms], settings: ExperimentSettings, alpha: float) -> Reading:
    sides = arms.get(name, {})
    return read_metric(find_metric(name, settings), sides.get("candidate"), sides.get("control"), settings, alpha)


def _moments(connection: Connection, experiment_id: str, period: str) -> dict[str, Arms]:
    """Sums over users, by metric and side; users moved by hand are left out."""
    s, n, y = arm_statistics.c, arm_statistics.c.count, arm_statistics.c.total
    users = experiment_users.c
    sums = [n, y, n * n, n * y, y * y, y / n, (y / n) * (y / n)]
    query = (
        sa.select(s.metric, s.arm, sa.func.count(), *(sa.func.sum(term) for term in sums))
        .join_from(
            arm_statistics,
            experiment_users,
            (users.experiment_id == s.experiment_id) & (users.user_id == s.user_id),
        )
        .where(
            s.experiment_id == experiment_id,
            s.period == period,
            s.count > 0,
            s.metric != FIRST_REQUESTS,
            users.excluded.is_(False),
        )
        .group_by(s.metric, s.arm)
    )
    found: dict[str, Arms] = defaultdict(dict)
    for metric, arm, count, *rest in connection.execute(query):
        found[metric][arm] = Moments(count, *(float(value) for value in rest))
    return found


def _split(connection: Connection, experiment_id: str, settings: ExperimentSettings) -> SplitReading:
    """Users by first arm against the share in force when they were first met."""
    u = experiment_users.c
    query = sa.select(u.first_share, u.first_arm, sa.func.count()).where(u.experiment_id == experiment_id)
    counts: dict[float, dict[str, int]] = defaultdict(lambda: {"candidate": 0, "stable": 0})
    for share, arm, users in connection.execute(query.group_by(u.first_share, u.first_arm)):
        counts[share][arm] = users
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
    s = arm_statistics.c
    query = sa.select(s.count, s.total).where(s.experiment_id == experiment_id, s.metric == FIRST_REQUESTS)
    row = connection.execute(query).first()
    return (int(row[0]), int(row[1])) if row else (0, 0)


def _last_seen(connection: Connection, experiment_id: str) -> dict[str, int]:
    u = experiment_users.c
    query = sa.select(u.arm, sa.func.max(u.last_seen_us).label("at_us")).where(u.experiment_id == experiment_id)
    return {row.arm: row.at_us for row in connection.execute(query.group_by(u.arm))}


def _lag(connection: Connection) -> int:
    """Events after the cursor that the projection still has to read."""
    seq = connection.execute(sa.select(cursors.c.seq).where(cursors.c.name == CURSOR)).scalar() or 0
    query = sa.select(sa.func.count()).where(events.c.seq > seq, events.c.kind.in_(KINDS))
    return connection.execute(query).scalar() or 0
