"""Counts the log into per-user statistics, so that an analysis never scans raw events.

Each page of the log is folded in one transaction together with the reader's cursor: killed anywhere, it
goes on where it was, and counting from zero (`rebuild`) gives the same tables. Everything known about an
interaction (its feedback, grades, outcomes) is attributed to the arm *assigned* to that interaction,
whoever answered and however late the feedback comes; feedback that precedes its interaction is counted
when the interaction appears.

Who counts where. The candidate's side are interactions assigned to the candidate; the control side are
those assigned to stable whose bucket lies in the control slice of the share then in force. Both sides
grow together, so they are compared at the same times. Above one half the control slice shrinks, users
change sides, and a new `period` begins whose numbers stand by themselves.
"""

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection, Engine

from cluster.database import write
from cluster.settings import Settings
from cluster.tables import arm_statistics, cursors, experiment_users
from data.events import RecordedEvent
from data.log import LOOKUP_CHUNK, EventLog, save_cursor
from serve.assignment import LARGEST_CONTROL, assign, choose_unit, in_control_slice, share_in_force
from serve.experiments.metrics import (
    Observation,
    is_explicit,
    is_failed,
    of_feedback,
    of_grade,
    of_interaction,
    of_outcome,
)

log = logging.getLogger(__name__)

CURSOR = "experiments"
REACTIONS = ("feedback", "grade", "outcome")
KINDS = ("interaction", *REACTIONS)
FIRST_REQUESTS = "first_requests"
"""Pseudo-metric: the candidate's first requests of an experiment and the errors among them, user ''."""
RAMP = "ramp"
"""Period of all shares up to one half."""

StatisticKey = tuple[str, str, str, str, str]
"""experiment, metric, period, arm, user"""


def period_of(share: float) -> str:
    """The period whose numbers a share belongs to."""
    return RAMP if share <= LARGEST_CONTROL else f"{share:.6g}"


@dataclass(frozen=True, slots=True)
class Exposure:
    """One interaction of an experiment, as far as counting needs it."""

    seq: int
    experiment_id: str
    user: str
    arm: str
    bucket: float
    share: float
    at_us: int
    by_hand: bool
    """The arm is not what the bucket says: somebody moved this user."""
    body: dict[str, Any]

    @property
    def side(self) -> str | None:
        """`candidate`, `control`, or neither."""
        if self.arm == "candidate":
            return "candidate"
        return "control" if in_control_slice(self.share, self.bucket) else None


def exposure_of(recorded: RecordedEvent) -> Exposure | None:
    """The exposure an interaction event records; `None` when it belongs to no experiment."""
    event, body = recorded.event, recorded.event.body
    arm, place, chance = body.get("arm"), body.get("bucket"), body.get("propensity")
    experiment_id = body.get("experiment_id")
    if experiment_id is None or arm not in ("stable", "candidate") or place is None or chance is None:
        return None
    share = share_in_force(arm, chance)
    if not 0 < share < 1 or body.get("flags", {}).get("shadow"):
        return None
    kind, unit = choose_unit(event.user_id, event.session_id, event.interaction_id or event.event_id)
    user = unit if kind == "user" else f"{kind}:{unit}"
    by_hand = arm != assign(share, place)
    return Exposure(recorded.seq, experiment_id, user, arm, place, share, event.occurred_at_us, by_hand, body)


@dataclass(slots=True)
class Fold:
    """What one page adds to the tables."""

    exposures: list[Exposure]
    statistics: dict[StatisticKey, list[float]]

    def add(self, exposure: Exposure, observations: Iterable[Observation]) -> None:
        """Count observations for the side of the exposure, if it is on one."""
        side = exposure.side
        if side is None or exposure.by_hand:
            return
        for metric, value in observations:
            key = (exposure.experiment_id, metric, period_of(exposure.share), side, exposure.user)
            sums = self.statistics[key]
            sums[0] += 1.0
            sums[1] += value
            sums[2] += value * value


class Projection:
    """The reader that keeps `experiment_users` and `arm_statistics` up to the log."""

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
                self._apply(connection, self._fold(after, page))
            is_last = len(page) < self.settings.projection_page
            reached = page[-1].seq if page else after
            save_cursor(connection, CURSOR, max(reached, newest) if is_last else reached)
        return len(page)

    def rebuild(self) -> int:
        """Forget everything counted and count again from the first event."""
        with write(self.engine).begin() as connection:
            connection.execute(experiment_users.delete())
            connection.execute(arm_statistics.delete())
            save_cursor(connection, CURSOR, 0)
        return self.catch_up()

    def _fold(self, after: int, page: list[RecordedEvent]) -> Fold:
        """Count each interaction at its own seq, and its reactions at the later of the two."""
        upto = page[-1].seq
        fold = Fold([], defaultdict(lambda: [0.0, 0.0, 0.0]))
        for group in self._groups(page, upto):
            interaction = next((r for r in group if r.event.kind == "interaction"), None)
            exposure = exposure_of(interaction) if interaction else None
            if exposure is None:
                continue
            if exposure.seq > after:
                fold.exposures.append(exposure)
                fold.add(exposure, of_interaction(exposure.body, self.settings))
                fold.add(exposure, [("feedback_response_rate", 0.0)])
            responded = False
            for reaction in group:
                first = reaction.event.kind == "feedback" and is_explicit(reaction.event.body) and not responded
                if max(reaction.seq, exposure.seq) > after:
                    fold.add(exposure, _of_reaction(reaction))
                    if first:
                        _count_response(fold, exposure)
                responded = responded or first
        fold.exposures.sort(key=lambda e: e.seq)
        return fold

    def _groups(self, page: list[RecordedEvent], upto: int) -> Iterator[list[RecordedEvent]]:
        """All events about each interaction that the page touches, up to the page's end, in order."""
        wanted: dict[str, set[str]] = defaultdict(set)
        for recorded in page:
            event = recorded.event
            outside = event.kind == "interaction" and event.body.get("experiment_id") is None
            if event.interaction_id and not outside:
                wanted[event.tenant].add(event.interaction_id)
        for tenant, ids in sorted(wanted.items()):
            groups: dict[str, list[RecordedEvent]] = defaultdict(list)
            for recorded in self.log.about(tenant, sorted(ids), kinds=KINDS, upto=upto):
                groups[str(recorded.event.interaction_id)].append(recorded)
            yield from groups.values()

    def _apply(self, connection: Connection, fold: Fold) -> None:
        _save_users(connection, fold.exposures)
        _save_first_requests(connection, fold.exposures, self.first_requests)
        _save_statistics(connection, fold.statistics)


def _of_reaction(recorded: RecordedEvent) -> Iterator[Observation]:
    body = recorded.event.body
    if recorded.erased or not body:
        return
    reader = {"feedback": of_feedback, "grade": of_grade, "outcome": of_outcome}.get(recorded.event.kind)
    if reader is not None:
        yield from reader(body)


def _count_response(fold: Fold, exposure: Exposure) -> None:
    """Turn the interaction's counted 0 of the response rate into a 1."""
    side = exposure.side
    if side is not None and not exposure.by_hand:
        key = (
            exposure.experiment_id,
            "feedback_response_rate",
            period_of(exposure.share),
            side,
            exposure.user,
        )
        sums = fold.statistics[key]
        sums[1] += 1.0
        sums[2] += 1.0


def _locked_cursor(connection: Connection) -> int:
    """The cursor, locked until the transaction ends so that nobody folds the same page."""
    query = sa.select(cursors.c.seq).where(cursors.c.name == CURSOR).with_for_update()
    seq = connection.execute(query).scalar()
    if seq is None:
        save_cursor(connection, CURSOR, 0)
    return seq or 0


def _save_users(connection: Connection, exposures: list[Exposure]) -> None:
    """Note users met for the first time, who moved to the candidate, and who was moved by hand."""
    grouped: dict[str, dict[str, list[Exposure]]] = defaultdict(lambda: defaultdict(list))
    for exposure in exposures:
        grouped[exposure.experiment_id][exposure.user].append(exposure)
    for experiment_id, by_user in grouped.items():
        known = _known_users(connection, experiment_id, list(by_user))
        rows = [
            {"experiment_id": experiment_id, "user_id": user, **_user_after(known.get(user), own)}
            for user, own in by_user.items()
        ]
        statement = _insert(connection, experiment_users)
        changing = ("arm", "excluded", "first_seen_us", "last_seen_us")
        keys = [experiment_users.c.experiment_id, experiment_users.c.user_id]
        update = {name: statement.excluded[name] for name in changing}
        connection.execute(statement.on_conflict_do_update(index_elements=keys, set_=update), rows)


def _known_users(connection: Connection, experiment_id: str, users: list[str]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for start in range(0, len(users), LOOKUP_CHUNK):
        query = sa.select(experiment_users).where(
            experiment_users.c.experiment_id == experiment_id,
            experiment_users.c.user_id.in_(users[start : start + LOOKUP_CHUNK]),
        )
        found |= {row["user_id"]: dict(row) for row in connection.execute(query).mappings()}
    return found


def _insert(connection: Connection, table: sa.Table) -> Any:
    """An insert that can say what to do on conflict; the two dialects have it under one name."""
    return (postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert)(table)


def _user_after(known: dict[str, Any] | None, own: list[Exposure]) -> dict[str, Any]:
    first = own[0]
    arm = known["arm"] if known else first.arm
    excluded = bool(known["excluded"]) if known else False
    for exposure in own:
        moved_back = arm == "candidate" and exposure.arm == "stable"
        excluded = excluded or exposure.by_hand or moved_back
        arm = exposure.arm
    times = [exposure.at_us for exposure in own]
    return {
        "arm": arm,
        "first_arm": known["first_arm"] if known else first.arm,
        "first_share": known["first_share"] if known else first.share,
        "bucket": first.bucket,
        "excluded": excluded,
        "first_seen_us": min(times + ([known["first_seen_us"]] if known else [])),
        "last_seen_us": max(times + ([known["last_seen_us"]] if known else [])),
    }


def _save_first_requests(connection: Connection, exposures: list[Exposure], limit: int) -> None:
    """Count the candidate's first requests in order, up to the limit."""
    table = arm_statistics.c
    by_experiment: dict[str, list[Exposure]] = defaultdict(list)
    for exposure in exposures:
        if exposure.arm == "candidate":
            by_experiment[exposure.experiment_id].append(exposure)
    for experiment_id, own in by_experiment.items():
        where = (table.experiment_id == experiment_id) & (table.metric == FIRST_REQUESTS)
        counted = connection.execute(sa.select(table.count).where(where)).scalar() or 0.0
        errors = [float(is_failed(e.body)) for e in own[: max(0, limit - int(counted))]]
        if errors:
            key = (experiment_id, FIRST_REQUESTS, RAMP, "candidate", "")
            _save_statistics(connection, {key: [float(len(errors)), sum(errors), sum(errors)]})


def _save_statistics(connection: Connection, statistics: dict[StatisticKey, list[float]]) -> None:
    """Add the sums to the rows there are."""
    if not statistics:
        return
    rows = [
        dict(
            zip(
                ("experiment_id", "metric", "period", "arm", "user_id", "count", "total", "total_squares"),
                (*key, *sums),
                strict=True,
            )
        )
        for key, sums in statistics.items()
    ]
    statement = _insert(connection, arm_statistics)
    table = arm_statistics.c
    added = {n: table[n] + statement.excluded[n] for n in ("count", "total", "total_squares")}
    keys = [table.experiment_id, table.metric, table.period, table.arm, table.user_id]
    connection.execute(statement.on_conflict_do_update(index_elements=keys, set_=added), rows)
