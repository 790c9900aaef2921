"""Counts the log into statistics per user and per arm, so that an analysis never scans raw events.

Each page of the log is folded in one transaction together with the reader's cursor: killed anywhere, it
goes on where it was, and counting from zero (`rebuild`) gives the same statistics. `fold` says what counts
for whom; here are the tables: per-user counts and totals, the sums over users that analyses read, latency
histograms, users, and what was known about users beforehand.
"""

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection, Engine

from cluster.clock import SECOND_US
from cluster.database import write
from cluster.settings import Settings
from cluster.tables import (
    arm_histograms,
    arm_history,
    arm_moments,
    arm_statistics,
    cursors,
    experiment_arms,
    experiment_users,
    experiments,
    user_baselines,
)
from data.events import RecordedEvent
from data.log import LOOKUP_CHUNK, EventLog, save_cursor
from serve.experiments.exposures import RAMP, Exposure
from serve.experiments.fold import Baseline, Fold, StatisticKey, fold_groups
from serve.experiments.metrics import is_failed
from serve.experiments.moments import EVERYBODY, TERMS, UserSums, changes

log = logging.getLogger(__name__)

CURSOR = "experiments"
KINDS = ("interaction", "feedback", "grade", "outcome")
FIRST_REQUESTS = "first_requests"
"""Pseudo-metric: the candidate's first requests of an experiment and the errors among them, user ''."""
STATISTICS = ("experiment_id", "user_id", "metric", "period", "arm", "count", "total", "total_squares")
TABLES = (experiment_users, experiment_arms, arm_statistics, arm_moments, arm_history, arm_histograms, user_baselines)

NOTHING = (0.0, 0.0, 0.0)

UserKey = tuple[str, str]
"""experiment, user"""
UserRow = dict[str, Any]


class Projection:
    """The reader that keeps the statistics up to the log."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine = engine
        self.settings = settings.experiment
        self.first_requests = settings.rollout.first_requests
        self.log = EventLog(engine)

    def catch_up(self) -> int:
        """Fold everything the log holds; the number of events read."""
        total = 0
        while read := self.step():
            total += read
        return total

    def step(self) -> int:
        """Fold one page and move the cursor, in one transaction; the number of events read."""
        newest = self.log.last_seq()
        if self.log.cursor(CURSOR) >= newest:
            return 0
        with write(self.engine).begin() as connection:
            after = _locked_cursor(connection)
            page = self.log.read(after, self.settings.projection_page, kinds=KINDS)
            if page:
                bandits = _bandits(connection)
                self._apply(connection, fold_groups(self._groups(page), after, self.settings, bandits))
            is_last = len(page) < self.settings.projection_page
            reached = page[-1].seq if page else after
            save_cursor(connection, CURSOR, max(reached, newest) if is_last else reached)
        return len(page)

    def rebuild(self) -> int:
        """Forget everything counted and count again from the first event."""
        with write(self.engine).begin() as connection:
            for table in TABLES:
                connection.execute(table.delete())
            save_cursor(connection, CURSOR, 0)
        return self.catch_up()

    def _groups(self, page: list[RecordedEvent]) -> Iterator[list[RecordedEvent]]:
        """All events about each interaction that the page touches, up to the page's end, in order."""
        wanted: dict[str, set[str]] = defaultdict(set)
        for recorded in page:
            event = recorded.event
            outside = event.kind == "interaction" and event.body.get("experiment_id") is None
            if event.interaction_id and not outside:
                wanted[event.tenant].add(event.interaction_id)
        for tenant, ids in sorted(wanted.items()):
            groups: dict[str, list[RecordedEvent]] = defaultdict(list)
            for recorded in self.log.about(tenant, sorted(ids), kinds=KINDS, upto=page[-1].seq):
                groups[str(recorded.event.interaction_id)].append(recorded)
            yield from groups.values()

    def _apply(self, connection: Connection, fold: Fold) -> None:
        keys = {(e.experiment_id, e.user) for e in fold.exposures} | {key[:2] for key in fold.statistics}
        before = _known_users(connection, keys)
        after = before | _users_after(connection, before, fold)
        _upsert(connection, experiment_users, [row for key, row in after.items() if row != before.get(key)])
        _save_arms(connection, before, fold.exposures)
        _save_first_requests(connection, fold.exposures, self.first_requests)
        _save_statistics(connection, fold.statistics, before, after)
        _add(connection, arm_histograms, [(*key, count) for key, count in fold.histograms.items()], ("count",))
        _save_baselines(connection, fold.baselines)
        _save_history(connection, fold.exposures, self.settings.history_interval_s)


def _locked_cursor(connection: Connection) -> int:
    """The cursor, locked until the transaction ends so that nobody folds the same page."""
    query = sa.select(cursors.c.seq).where(cursors.c.name == CURSOR).with_for_update()
    seq = connection.execute(query).scalar()
    if seq is None:
        save_cursor(connection, CURSOR, 0)
    return seq or 0


def _bandits(connection: Connection) -> set[str]:
    query = sa.select(experiments.c.experiment_id, experiments.c.config)
    return {row.experiment_id for row in connection.execute(query) if row.config.get("mode") == "bandit"}


# Users


def _known_users(connection: Connection, keys: Iterable[UserKey]) -> dict[UserKey, UserRow]:
    found: dict[UserKey, UserRow] = {}
    for experiment_id, users in _by_first(keys).items():
        for chunk in _chunks(users):
            query = sa.select(experiment_users).where(
                experiment_users.c.experiment_id == experiment_id, experiment_users.c.user_id.in_(chunk)
            )
            found |= {(experiment_id, row["user_id"]): dict(row) for row in connection.execute(query).mappings()}
    return found


def _users_after(connection: Connection, known: Mapping[UserKey, UserRow], fold: Fold) -> dict[UserKey, UserRow]:
    """Rows of the users exposed in this page: met for the first time, moved, or only seen again."""
    grouped: dict[UserKey, list[Exposure]] = defaultdict(list)
    for exposure in fold.exposures:
        grouped[exposure.experiment_id, exposure.user].append(exposure)
    firsts = [own[0] for key, own in grouped.items() if key not in known]
    covariates = _covariates(connection, firsts, fold.baselines)
    return {
        key: _user_after(known.get(key), own, covariates.get((own[0].tenant, own[0].agent, own[0].user, own[0].seq)))
        for key, own in grouped.items()
    }


def _user_after(known: UserRow | None, own: list[Exposure], covariates: dict[str, float] | None) -> UserRow:
    first = own[0]
    arm = known["arm"] if known else first.arm
    excluded = bool(known["excluded"]) if known else False
    for exposure in own:
        moved_back = arm == "candidate" and exposure.arm == "stable" and not exposure.is_bandit
        excluded = excluded or exposure.by_hand or moved_back
        arm = exposure.arm
    times = [exposure.at_us for exposure in own]
    return {
        "experiment_id": first.experiment_id,
        "user_id": first.user,
        "arm": arm,
        "bucket": first.bucket,
        "excluded": excluded,
        "segments": known["segments"] if known else list(first.segments),
        "covariates": known["covariates"] if known else covariates or {},
        "first_seen_us": min(times + ([known["first_seen_us"]] if known else [])),
    }


def _save_arms(connection: Connection, known: Mapping[UserKey, UserRow], exposures: Sequence[Exposure]) -> None:
    """Users by the share and arm they were first met with, and when each arm was last seen."""
    rows: dict[tuple[str, float, str], list[int]] = defaultdict(lambda: [0, 0])
    met = set(known)
    for exposure in exposures:
        row, user = rows[exposure.experiment_id, exposure.share, exposure.arm], (exposure.experiment_id, exposure.user)
        row[0] += user not in met
        row[1] = max(row[1], exposure.at_us)
        met.add(user)
    table, statement = experiment_arms.c, _insert(connection, experiment_arms)
    newer = sa.case(
        (statement.excluded.last_seen_us > table.last_seen_us, statement.excluded.last_seen_us),
        else_=table.last_seen_us,
    )
    if rows:
        changes = {"users": table.users + statement.excluded.users, "last_seen_us": newer}
        statement = statement.on_conflict_do_update(index_elements=list(experiment_arms.primary_key), set_=changes)
        names = [column.name for column in experiment_arms.c]
        connection.execute(statement, [dict(zip(names, (*key, *row), strict=True)) for key, row in rows.items()])


def _covariates(
    connection: Connection, firsts: Sequence[Exposure], page: Sequence[Baseline]
) -> dict[tuple[str, str, str, int], dict[str, float]]:
    """Each new user's means before the first exposure, by tenant, agent, user and the exposure's seq."""
    stored: dict[tuple[str, str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(lambda: [0.0, 0.0]))
    b = user_baselines.c
    for (tenant, agent), users in _by_pair((e.tenant, e.agent, e.user) for e in firsts).items():
        for chunk in _chunks(users):
            query = sa.select(b.user_id, b.metric, b.count, b.total)
            where = (b.tenant == tenant) & (b.agent == agent) & b.user_id.in_(chunk)
            for user, metric, count, total in connection.execute(query.where(where)):
                stored[tenant, agent, user][metric] = [count, total]
    recent: dict[tuple[str, str, str], list[Baseline]] = defaultdict(list)
    for baseline in page:
        recent[baseline.tenant, baseline.agent, baseline.user].append(baseline)
    found = {}
    for exposure in firsts:
        user = (exposure.tenant, exposure.agent, exposure.user)
        sums = {metric: list(pair) for metric, pair in stored[user].items()}
        for baseline in recent[user]:
            if baseline.seq < exposure.seq:
                pair = sums.setdefault(baseline.metric, [0.0, 0.0])
                pair[0], pair[1] = pair[0] + 1, pair[1] + baseline.value
        found[(*user, exposure.seq)] = {metric: total / count for metric, (count, total) in sums.items()}
    return found


# Statistics


def _save_statistics(
    connection: Connection,
    added: Mapping[StatisticKey, list[float]],
    before: Mapping[UserKey, UserRow],
    after: Mapping[UserKey, UserRow],
) -> None:
    """Add to the per-user statistics and bring the sums over users in line with them.

    A user moved by hand in this page leaves the sums with everything counted so far.
    """
    leaving = {key for key, row in after.items() if row["excluded"] and not _is_out(before.get(key))}
    stored = _stored(connection, {key[:2] for key in added} | leaving)
    values = {key: [a + b for a, b in zip(stored.get(key, NOTHING), sums, strict=True)] for key, sums in added.items()}
    _upsert(
        connection, arm_statistics, [dict(zip(STATISTICS, (*key, *sums), strict=True)) for key, sums in values.items()]
    )
    moved = []
    for key in sorted(values.keys() | {key for key in stored if key[:2] in leaving}):
        user = after[key[:2]]
        old = NOTHING if _is_out(before.get(key[:2])) else stored.get(key, NOTHING)
        new = NOTHING if user["excluded"] else values.get(key, old)
        experiment_id, _, metric, period, arm = key
        covariate = user["covariates"].get(metric)
        place = (experiment_id, metric, period, arm)
        moved.append(UserSums(place, tuple(user["segments"]), (old[0], old[1]), (new[0], new[1]), covariate))
    rows = [
        (experiment_id, segment, period, metric, arm, *map(float, change))
        for (experiment_id, metric, period, arm, segment), change in sorted(changes(moved).items())
    ]
    _add(connection, arm_moments, rows, TERMS)


def _is_out(user: UserRow | None) -> bool:
    return user is not None and bool(user["excluded"])


def _stored(connection: Connection, keys: Iterable[UserKey]) -> dict[StatisticKey, tuple[float, float, float]]:
    """All per-user statistics of these users."""
    found: dict[StatisticKey, tuple[float, float, float]] = {}
    for experiment_id, users in _by_first(keys).items():
        for chunk in _chunks(users):
            query = sa.select(*(arm_statistics.c[name] for name in STATISTICS)).where(
                arm_statistics.c.experiment_id == experiment_id, arm_statistics.c.user_id.in_(chunk)
            )
            for *key, count, total, squares in connection.execute(query):
                found[tuple(key)] = (count, total, squares)
    return found


def _save_first_requests(connection: Connection, exposures: list[Exposure], limit: int) -> None:
    """Count the candidate's first requests in order, up to the limit."""
    by_experiment: dict[str, list[Exposure]] = defaultdict(list)
    for exposure in exposures:
        if exposure.arm == "candidate":
            by_experiment[exposure.experiment_id].append(exposure)
    for experiment_id, own in by_experiment.items():
        key = (experiment_id, "", FIRST_REQUESTS, RAMP, "candidate")
        counted = int(_stored(connection, [(experiment_id, "")]).get(key, NOTHING)[0])
        errors = [float(is_failed(e.body)) for e in own[: max(0, limit - counted)]]
        if errors:
            row = (*key, float(len(errors)), sum(errors), sum(errors))
            _add(connection, arm_statistics, [row], ("count", "total", "total_squares"))


def _save_baselines(connection: Connection, page: Sequence[Baseline]) -> None:
    sums: dict[tuple[str, str, str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for baseline in page:
        pair = sums[baseline.tenant, baseline.agent, baseline.metric, baseline.user]
        pair[0], pair[1] = pair[0] + 1, pair[1] + baseline.value
    _add(connection, user_baselines, [(*key, *pair) for key, pair in sums.items()], ("count", "total"))


def _save_history(connection: Connection, exposures: Sequence[Exposure], interval_s: float) -> None:
    """Copy the sums over all users once an interval of the events' time, for plots over time."""
    newest: dict[str, int] = defaultdict(int)
    for exposure in exposures:
        newest[exposure.experiment_id] = max(newest[exposure.experiment_id], exposure.at_us)
    h, m = arm_history.c, arm_moments.c
    for experiment_id, at_us in newest.items():
        query = sa.select(sa.func.max(h.at_us)).where(h.experiment_id == experiment_id)
        last_us = connection.execute(query).scalar()
        if last_us is not None and at_us < last_us + interval_s * SECOND_US:
            continue
        names = ("experiment_id", "period", "metric", "arm", *TERMS)
        now = sa.select(*(m[name] for name in names), sa.literal(at_us, sa.BigInteger)).where(
            m.experiment_id == experiment_id, m.segment == EVERYBODY
        )
        connection.execute(arm_history.insert().from_select([*names, "at_us"], now))


# Rows


def _by_first(keys: Iterable[UserKey]) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = defaultdict(list)
    for first, second in sorted(keys):
        grouped[first].append(second)
    return grouped


def _by_pair(keys: Iterable[tuple[str, str, str]]) -> dict[tuple[str, str], list[str]]:
    grouped: dict[tuple[str, str], list[str]] = defaultdict(list)
    for one, other, user in sorted(set(keys)):
        grouped[one, other].append(user)
    return grouped


def _chunks(users: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(users), LOOKUP_CHUNK):
        yield users[start : start + LOOKUP_CHUNK]


def _insert(connection: Connection, table: sa.Table) -> Any:
    """An insert that can say what to do on conflict; the two dialects have it under one name."""
    return (postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert)(table)


def _upsert(connection: Connection, table: sa.Table, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows, over those with the same key."""
    if rows:
        statement = _insert(connection, table)
        update = {c.name: statement.excluded[c.name] for c in table.c if not c.primary_key}
        connection.execute(statement.on_conflict_do_update(index_elements=list(table.primary_key), set_=update), rows)


def _add(connection: Connection, table: sa.Table, rows: Sequence[tuple[Any, ...]], columns: Sequence[str]) -> None:
    """Add to these columns of the rows there are, or write them; values in the order of the table's columns."""
    if rows:
        statement = _insert(connection, table)
        added = {name: table.c[name] + statement.excluded[name] for name in columns}
        names = [c.name for c in table.c]
        statement = statement.on_conflict_do_update(index_elements=list(table.primary_key), set_=added)
        connection.execute(statement, [dict(zip(names, row, strict=True)) for row in rows])
