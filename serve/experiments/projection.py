"""Counts the log into statistics per user and per arm, so that an analysis never scans raw events.

Each page of the log is folded in one transaction together with the reader's cursor: killed anywhere, it
goes on where it was, and counting from zero (`rebuild`) gives the same statistics. `fold` says what counts
for whom; here are the tables: per-user counts and totals, the sums over users that analyses read, latency
histograms, users, and what was known about users beforehand.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import orjson
import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from cluster.bulk import merge_rows
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
from data.moments import EVERYBODY, TERMS, SumChanges
from serve.experiments.exposures import BANDIT, RAMP, Design, Designs, Exposure, may_count
from serve.experiments.fold import Baseline, Fold, Sums, UserKey, fold_groups
from serve.experiments.metrics import is_failed, is_rejected

log = logging.getLogger(__name__)

CURSOR = "experiments"
KINDS = ("interaction", "feedback", "grade", "outcome")
FIRST_REQUESTS = "first_requests"
"""Pseudo-metric: the candidate's first requests of an experiment and the errors among them, user ''."""
TABLES = (experiment_users, experiment_arms, arm_statistics, arm_moments, arm_history, arm_histograms, user_baselines)

NOTHING = (0.0, 0.0)
FOR_EVER = 2**63 - 1

Person = tuple[str, str]
"""experiment, user"""


@dataclass(frozen=True, slots=True)
class User:
    """One row of `experiment_users`, in the order of its columns."""

    experiment_id: str
    user_id: str
    arm: str
    bucket: float
    excluded: bool
    segments: list[str]
    covariates: dict[str, float]
    first_seen_us: int


class Projection:
    """The reader that keeps the statistics up to the log."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine = engine
        self.settings = settings.experiment
        self.first_requests = settings.rollout.first_requests
        self.watch_us = round(settings.rollout.restore_window_s * SECOND_US)
        self.log = EventLog(engine)

    def catch_up(self, goes_on: Callable[[], bool] = lambda: True) -> int:
        """Fold what the log holds at this moment; the number of events read.

        What is appended meanwhile is for the next time: under steady traffic this would not end. `goes_on` is asked
        before each page but the first.
        """
        newest, total = self.log.last_seq(), 0
        while read := self.step():
            total += read
            if self.log.cursor(CURSOR) >= newest or not goes_on():
                break
        return total

    def step(self) -> int:
        """Fold one page and move the cursor, in one transaction; the number of events read.

        Reading and folding come before the transaction, which keeps every other writer waiting; when somebody
        else has counted the page meanwhile, it is dropped.
        """
        newest, after = self.log.last_seq(), self.log.cursor(CURSOR)
        if after >= newest:
            return 0
        page, designs = self.log.read(after, self.settings.projection_page, kinds=KINDS), self._designs()
        fold = fold_groups(self._groups(page, after, designs), after, self.settings, designs)
        with write(self.engine).begin() as connection:
            if _locked_cursor(connection) == after:
                self._apply(connection, fold)
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

    def _groups(self, page: list[RecordedEvent], after: int, designs: Designs) -> Iterator[list[RecordedEvent]]:
        """All events about each interaction that the page touches, up to the page's end, in order."""
        wanted: dict[str, dict[str, list[RecordedEvent]]] = defaultdict(lambda: defaultdict(list))
        outside: set[tuple[str, str]] = set()
        for recorded in page:
            event = recorded.event
            if event.kind == "interaction" and not may_count(recorded, designs):
                outside.add((event.tenant, str(event.interaction_id)))
            if event.interaction_id:
                wanted[event.tenant][event.interaction_id].append(recorded)
        for tenant, groups in sorted(wanted.items()):
            ids = sorted(own for own in groups if len(groups[own]) > 1 or (tenant, own) not in outside)
            earlier: dict[str, list[RecordedEvent]] = defaultdict(list)
            for recorded in self.log.about(tenant, ids, kinds=KINDS, upto=after):
                earlier[str(recorded.event.interaction_id)].append(recorded)
            yield from ([*earlier[own], *groups[own]] for own in ids)

    def _designs(self) -> Designs:
        """What must be known of the experiments to count for them."""
        query = sa.select(experiments)
        with self.engine.connect() as connection:
            rows = connection.execute(query).mappings().all()
        return Designs({row["experiment_id"]: self._design(row) for row in rows})

    def _design(self, row: Mapping[Any, Any]) -> Design:
        is_bandit, until_us = row["config"].get("mode") == BANDIT, row["ended_at_us"]
        if is_bandit:
            until_us = None
        elif until_us is None:
            until_us = FOR_EVER
        elif row["outcome"] == "promote":
            until_us += self.watch_us
        named = {name: row[name] for name in ("tenant", "agent", "modality", "candidate", "created_at_us")}
        return Design(**named, is_bandit=is_bandit, watched_until_us=until_us)

    def _apply(self, connection: Connection, fold: Fold) -> None:
        keys = {(e.experiment_id, e.user) for e in fold.exposures} | {key[:2] for key in fold.statistics}
        before = _known_users(connection, keys)
        after = before | _users_after(connection, before, fold)
        changed = [astuple(row) for key, row in after.items() if row != before.get(key)]
        merge_rows(connection, experiment_users, changed)
        _save_arms(connection, before, fold.exposures)
        _save_first_requests(connection, fold.exposures, self.first_requests)
        # a reaction to an answer that was folded before its experiment was known belongs to nobody
        known = {key: sums for key, sums in fold.statistics.items() if key[:2] in after}
        _save_statistics(connection, known, before, after)
        histograms = [(*key, count) for key, count in fold.histograms.items()]
        merge_rows(connection, arm_histograms, histograms, add=("count",))
        _save_baselines(connection, fold.baselines)
        _save_history(connection, fold.exposures, self.settings.history_interval_s)


def _locked_cursor(connection: Connection) -> int:
    """The cursor, locked until the transaction ends so that nobody folds the same page."""
    query = sa.select(cursors.c.seq).where(cursors.c.name == CURSOR).with_for_update()
    seq = connection.execute(query).scalar()
    if seq is None:
        save_cursor(connection, CURSOR, 0)
    return seq or 0


# Users


def _known_users(connection: Connection, keys: Iterable[Person]) -> dict[Person, User]:
    found: dict[Person, User] = {}
    for experiment_id, users in _by_first(keys).items():
        for chunk in _chunks(users):
            query = sa.select(experiment_users).where(
                experiment_users.c.experiment_id == experiment_id, experiment_users.c.user_id.in_(chunk)
            )
            found |= {(experiment_id, row.user_id): User(*row) for row in connection.execute(query)}
    return found


def _users_after(connection: Connection, known: Mapping[Person, User], fold: Fold) -> dict[Person, User]:
    """Rows of the users exposed in this page: met for the first time, moved, or only seen again."""
    grouped: dict[Person, list[Exposure]] = defaultdict(list)
    for exposure in fold.exposures:
        grouped[exposure.experiment_id, exposure.user].append(exposure)
    firsts = [own[0] for key, own in grouped.items() if key not in known]
    covariates = _covariates(connection, firsts, fold.baselines)
    return {
        key: _user_after(known.get(key), own, covariates.get((own[0].tenant, own[0].agent, own[0].user, own[0].seq)))
        for key, own in grouped.items()
    }


def _user_after(known: User | None, own: list[Exposure], covariates: dict[str, float] | None) -> User:
    first = own[0]
    arm = known.arm if known else first.arm
    excluded = known is not None and bool(known.excluded)
    for exposure in own:
        grew = arm == "stable" and exposure.arm == "candidate"
        moved = arm != exposure.arm and not grew and not exposure.is_bandit
        excluded = excluded or exposure.by_hand or moved
        arm = exposure.arm
    earliest_us = min(exposure.at_us for exposure in own)
    if known is not None:
        return replace(
            known,
            arm=arm,
            bucket=first.bucket,
            excluded=excluded,
            first_seen_us=min(earliest_us, known.first_seen_us),
        )
    key = (first.experiment_id, first.user)
    return User(*key, arm, first.bucket, excluded, list(first.segments), covariates or {}, earliest_us)


def _save_arms(connection: Connection, known: Mapping[Person, User], exposures: Sequence[Exposure]) -> None:
    """Users by the share and arm they were first met with, and when each arm was last seen."""
    rows: dict[tuple[str, float, str], list[int]] = defaultdict(lambda: [0, 0])
    met = set(known)
    for exposure in exposures:
        row, user = rows[exposure.experiment_id, exposure.share, exposure.arm], (exposure.experiment_id, exposure.user)
        row[0] += user not in met
        row[1] = max(row[1], exposure.at_us)
        met.add(user)
    counted = [(*key, *row) for key, row in rows.items()]
    merge_rows(connection, experiment_arms, counted, add=("users",), latest=("last_seen_us",))


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
    added: Mapping[UserKey, Sums],
    before: Mapping[Person, User],
    after: Mapping[Person, User],
) -> None:
    """Add to the per-user statistics and bring the sums over users in line with them.

    A user moved by hand in this page leaves the sums with everything counted so far.
    """
    leaving = {key for key, user in after.items() if user.excluded and not _is_out(before.get(key))}
    stored = _stored(connection, {key[:2] for key in added} | leaving)
    changes, rows = SumChanges(), []
    for key, sums in added.items():
        old, was_out, user = stored.get(key, {}), _is_out(before.get(key[:2])), after[key[:2]]
        new = old | {name: _added(old.get(name, NOTHING), more) for name, more in sums.items()}
        rows.append((*key, orjson.dumps(new).decode()))
        for name in old | sums if user.excluded else sums:
            then = NOTHING if was_out else old.get(name, NOTHING)[:2]
            now = NOTHING if user.excluded else new[name][:2]
            changes.add(key, name, user.segments, (*then, *now), user.covariates.get(name))
    for key in (key for key in stored if key[:2] in leaving and key not in added):
        user = after[key[:2]]
        for name, sums_before in stored[key].items():
            changes.add(key, name, user.segments, (*sums_before[:2], *NOTHING), user.covariates.get(name))
    merge_rows(connection, arm_statistics, rows)
    merge_rows(connection, arm_moments, changes.rows(), add=TERMS)


def _added(known: Sequence[float], more: Sequence[float]) -> tuple[float, ...]:
    """Counts and totals together; of two first observations the one that was there."""
    return (known[0] + more[0], known[1] + more[1], *(known[2:] or more[2:]))


def _is_out(user: User | None) -> bool:
    return user is not None and bool(user.excluded)


def _stored(connection: Connection, keys: Iterable[Person]) -> dict[UserKey, dict[str, tuple[float, ...]]]:
    """All per-user statistics of these users."""
    found: dict[UserKey, dict[str, tuple[float, ...]]] = {}
    for experiment_id, users in _by_first(keys).items():
        for chunk in _chunks(users):
            query = sa.select(arm_statistics).where(
                arm_statistics.c.experiment_id == experiment_id, arm_statistics.c.user_id.in_(chunk)
            )
            for *key, sums in connection.execute(query):
                found[tuple(key)] = orjson.loads(sums)
    return found


def _save_first_requests(connection: Connection, exposures: list[Exposure], limit: int) -> None:
    """Count the candidate's first requests in order, up to the limit."""
    by_experiment: dict[str, list[Exposure]] = defaultdict(list)
    for exposure in exposures:
        if exposure.arm == "candidate":
            by_experiment[exposure.experiment_id].append(exposure)
    for experiment_id, own in by_experiment.items():
        key = (experiment_id, "", RAMP, "candidate")
        count, errors = _stored(connection, [key[:2]]).get(key, {}).get(FIRST_REQUESTS, NOTHING)
        telling = [exposure.body for exposure in own if not is_rejected(exposure.body)]
        failed = [is_failed(body) for body in telling[: max(0, limit - int(count))]]
        if failed:
            sums = {FIRST_REQUESTS: (count + len(failed), errors + sum(failed))}
            merge_rows(connection, arm_statistics, [(*key, orjson.dumps(sums).decode())])


def _save_baselines(connection: Connection, page: Sequence[Baseline]) -> None:
    sums: dict[tuple[str, str, str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for baseline in page:
        pair = sums[baseline.tenant, baseline.agent, baseline.metric, baseline.user]
        pair[0], pair[1] = pair[0] + 1, pair[1] + baseline.value
    merge_rows(connection, user_baselines, [(*key, *pair) for key, pair in sums.items()], add=("count", "total"))


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


def _by_first(keys: Iterable[Person]) -> dict[str, list[str]]:
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
