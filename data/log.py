"""The append-only event log on SQLite or PostgreSQL.

`EventLog.append` writes a batch in one transaction and returns when it is on disk. Sequence numbers are
given out under the write lock (SQLite's own, an advisory lock on PostgreSQL), so they have no holes and
become visible in order: a reader that remembers the last `seq` it saw misses nothing. Bodies that have left
the database with their sealed day are read from its Parquet, so readers need not know.

Whoever was erased stays out: an event of theirs is refused, in the same transaction that would have written it.

Many small appends belong behind `data.group_commit.GroupCommit`.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import orjson
import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from cluster.bulk import driver_errors, insert_rows
from cluster.clock import now_us
from cluster.database import write
from cluster.tables import cursors, event_bodies, event_ids, events, tombstones
from data.encoding import SALT_BYTES, body_digest, compress, decode_body, encode_body, event_digest
from data.events import Event, RecordedEvent, routers_report

APPEND_LOCK = 7_213_002  # pg_advisory_xact_lock key: one writer numbers events at a time
LOOKUP_CHUNK = 500  # bound on the variables of one statement
IDS_CURSOR = "event_ids.forgotten_before_us"
"""A cursor whose value is a time: ids of events recorded earlier are not remembered."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one appended event."""

    event_id: str
    status: Literal["accepted", "duplicate", "refused"]
    """`refused`: its user, session or interaction was erased."""
    seq: int | None = None
    """Its place in the log; `None` unless accepted."""


class StoredEvent(NamedTuple):
    """An event with its body as it is kept; null when erased."""

    seq: int
    kind: str
    event_id: str
    interaction_id: str | None
    user_id: str | None
    session_id: str | None
    agent: str | None
    occurred_at_us: int
    recorded_at_us: int
    workspace: str
    erased: bool
    body: bytes | None
    arrays: bytes | None


class EventLog:
    """The log behind one database engine. Thread-safe; cheap to construct."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._writer = write(engine)

    def append(self, batch: Sequence[Event]) -> list[Verdict]:
        """Write a batch; durable when this returns. One verdict an event, in order.

        An event whose `(tenant, event_id)` is already known, in the log or earlier in the batch, is a
        duplicate and changes nothing, and so is a report of an answer that the router has recorded; one about
        somebody who was erased is refused.
        """
        if not batch:
            return []
        with self._writer.begin() as connection:
            return self.append_in(connection, batch)

    def append_in(self, connection: Connection, batch: Sequence[Event]) -> list[Verdict]:
        """`append` as part of the caller's transaction (which must come from `database.write`)."""
        take_append_lock(connection)
        refused = refused_subjects(connection, batch)
        known = _known_ids(connection, batch)
        last = connection.execute(sa.select(sa.func.max(events.c.seq))).scalar() or 0
        verdicts: list[Verdict] = []
        fresh: list[Event] = []
        for event in batch:
            key = (event.tenant, event.event_id)
            if refused and is_refused(event, refused):
                verdicts.append(Verdict(event.event_id, "refused"))
                continue
            if key in known or (event.tenant, routers_report(event)) in known:
                verdicts.append(Verdict(event.event_id, "duplicate"))
                continue
            known.add(key)
            fresh.append(event)
            verdicts.append(Verdict(event.event_id, "accepted", last + len(fresh)))
        if fresh:
            _insert(connection, fresh, last + 1)
        return verdicts

    def read(
        self, after: int = 0, limit: int = 1000, *, kinds: Sequence[str] = (), tenant: str | None = None
    ) -> list[RecordedEvent]:
        """Up to `limit` events with `seq > after`, in order. Empty at the end of the log."""
        with self.engine.connect() as connection:
            rows = connection.execute(self._page(after, limit, kinds, tenant)).mappings().all()
        return self._recorded(rows)

    def read_stored(self, after: int, limit: int, *, kinds: Sequence[str], tenant: str) -> list[StoredEvent]:
        """`read` without opening anything.

        A body that left the database with its sealed day comes as from `encode_body`.
        """
        columns = [event_bodies.c[n] if n in ("body", "arrays") else events.c[n] for n in StoredEvent._fields]
        query = self._page(after, limit, kinds, tenant).with_only_columns(*columns, maintain_column_froms=True)
        with self.engine.connect() as connection:
            rows = [StoredEvent._make(row) for row in connection.execute(query).all()]
        gone = [row.seq for row in rows if row.body is None and not row.erased]
        if not gone:
            return rows
        from data.partitions.bodies import sealed_bodies

        sealed = {seq: encode_body(body) for seq, body in sealed_bodies(self.engine, gone).items()}
        return [
            row._replace(body=sealed[row.seq][0], arrays=sealed[row.seq][1]) if row.seq in sealed else row
            for row in rows
        ]

    def _page(self, after: int, limit: int, kinds: Sequence[str], tenant: str | None) -> sa.Select[Any]:
        """The next events in order. SQLite walks along `seq`: it would rather sort all events of the tenant, or of
        several kinds, for every page."""
        query = _with_bodies().where(events.c.seq > after).order_by(events.c.seq).limit(limit)
        walks = self.engine.dialect.name == "sqlite"
        if kinds:
            kind = events.c.kind.concat("") if walks and len(kinds) > 1 else events.c.kind
            query = query.where(kind.in_(kinds))
        if tenant is not None:
            query = query.where((events.c.tenant.concat("") if walks else events.c.tenant) == tenant)
        return query

    def scan(
        self, after: int = 0, *, kinds: Sequence[str] = (), tenant: str | None = None, page: int = 1000
    ) -> Iterator[RecordedEvent]:
        """All events after `after`, read in short pages so that no transaction stays open."""
        while batch := self.read(after, page, kinds=kinds, tenant=tenant):
            yield from batch
            after = batch[-1].seq

    def last_seq(self) -> int:
        """`seq` of the newest event; 0 for an empty log."""
        with self.engine.connect() as connection:
            return connection.execute(sa.select(sa.func.max(events.c.seq))).scalar() or 0

    def agents(self, tenant: str, workspace: str, named: str | None = None) -> list[str]:
        """The agents that interactions and trajectories are of, in order; at most this one where one is named."""
        kinds = ("interaction", "trajectory")
        mine = sa.and_(events.c.kind.in_(kinds), events.c.tenant == tenant, events.c.workspace == workspace)
        query = sa.select(events.c.agent).where(mine, events.c.agent.is_not(None))
        query = query.distinct() if named is None else query.where(events.c.agent == named).limit(1)
        with self.engine.connect() as connection:
            return sorted(connection.execute(query).scalars())

    def cursor(self, name: str) -> int:
        """Where the reader `name` has got to; 0 at first."""
        with self.engine.connect() as connection:
            return connection.execute(sa.select(cursors.c.seq).where(cursors.c.name == name)).scalar() or 0

    def about(
        self,
        tenant: str,
        interaction_ids: Sequence[str],
        *,
        kinds: Sequence[str] = (),
        upto: int | None = None,
    ) -> Iterator[RecordedEvent]:
        """Events about these interactions with `seq <= upto`, in order within each short read."""
        for start in range(0, len(interaction_ids), LOOKUP_CHUNK):
            chunk = list(interaction_ids[start : start + LOOKUP_CHUNK])
            query = _with_bodies().where(events.c.tenant == tenant, events.c.interaction_id.in_(chunk))
            if kinds:
                query = query.where(events.c.kind.in_(kinds))
            if upto is not None:
                query = query.where(events.c.seq <= upto)
            with self.engine.connect() as connection:
                rows = connection.execute(query.order_by(events.c.seq)).mappings().all()
            yield from self._recorded(rows)

    def at(self, seqs: Sequence[int], *, kinds: Sequence[str] = ()) -> Iterator[RecordedEvent]:
        """The events at these places of the log that are of one of the kinds, in order within each short read."""
        for start in range(0, len(seqs), LOOKUP_CHUNK):
            query = _with_bodies().where(events.c.seq.in_(seqs[start : start + LOOKUP_CHUNK]))
            if kinds:
                query = query.where(events.c.kind.in_(kinds))
            with self.engine.connect() as connection:
                rows = connection.execute(query.order_by(events.c.seq)).mappings().all()
            yield from self._recorded(rows)

    def _recorded(self, rows: Sequence[Any]) -> list[RecordedEvent]:
        gone = [row["seq"] for row in rows if row["body"] is None and not row["erased"]]
        if not gone:
            return [recorded_event(row) for row in rows]
        from data.partitions.bodies import sealed_bodies

        sealed = sealed_bodies(self.engine, gone)
        return [recorded_event(row, sealed.get(row["seq"])) for row in rows]


def take_append_lock(connection: Connection) -> None:
    """Keep every other writer of the log out until the transaction (of `database.write`) ends."""
    if connection.dialect.name == "postgresql":
        connection.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": APPEND_LOCK})


def subjects_of(event: Event) -> list[str]:
    """The names under which an erasure may have forbidden this event."""
    session_id = event.session_id if event.user_id is None else None
    named = (("user", event.user_id), ("interaction", event.interaction_id), ("session", session_id))
    return [subject(kind, name) for kind, name in named if name is not None]


def subject(kind: str, name: str) -> str:
    """What a tombstone says of a user, an interaction or a session: clients choose names, so only a hash."""
    return f"{kind}:{hashlib.sha256(name.encode()).hexdigest()}"


def save_cursor(connection: Connection, name: str, seq: int) -> None:
    """Move a reader's cursor, in the same transaction as the projection it feeds."""
    values = {"seq": seq, "updated_at_us": now_us()}
    changed = connection.execute(cursors.update().where(cursors.c.name == name).values(values))
    if not changed.rowcount:
        connection.execute(cursors.insert().values(name=name, **values))


def _with_bodies() -> sa.Select[Any]:
    joined = events.outerjoin(event_bodies, events.c.seq == event_bodies.c.seq)
    return sa.select(events, event_bodies.c.body, event_bodies.c.arrays).select_from(joined)


def is_refused(event: Event, refused: Set[tuple[str, str]]) -> bool:
    """Whether the event is about somebody among `refused_subjects`."""
    return not refused.isdisjoint((event.tenant, name) for name in subjects_of(event))


def refused_subjects(connection: Connection, batch: Sequence[Event]) -> set[tuple[str, str]]:
    """Tenant and subject of what was erased, among the subjects of the batch."""
    found: set[tuple[str, str]] = set()
    if connection.execute(sa.select(tombstones.c.tenant).limit(1)).first() is None:
        return found
    for tenant in {event.tenant for event in batch}:
        subjects = sorted({name for event in batch if event.tenant == tenant for name in subjects_of(event)})
        for start in range(0, len(subjects), LOOKUP_CHUNK):
            chunk = subjects[start : start + LOOKUP_CHUNK]
            query = sa.select(tombstones.c.subject).where(
                tombstones.c.tenant == tenant, tombstones.c.subject.in_(chunk)
            )
            found |= {(tenant, name) for name in connection.execute(query).scalars()}
    return found


def _known_ids(connection: Connection, batch: Sequence[Event]) -> set[tuple[str, str | None]]:
    lookup = _known_on_postgres if connection.dialect.name == "postgresql" else _known_on_sqlite
    known: set[tuple[str, str | None]] = set()
    for tenant in {event.tenant for event in batch}:
        mine = [event for event in batch if event.tenant == tenant]
        ids = [event.event_id for event in mine]
        ids += [twin for event in mine if (twin := routers_report(event)) is not None]
        known |= {(tenant, event_id) for event_id in lookup(connection, tenant, ids)}
    return known


def _known_on_sqlite(connection: Connection, tenant: str, ids: list[str]) -> list[str]:
    # One aggregated row: fetching row by row hands the interpreter's lock away at every row.
    query = (
        "SELECT json_group_array(event_id) FROM event_ids "
        "WHERE tenant = ? AND event_id IN (SELECT value FROM json_each(?))"
    )
    found: str = connection.exec_driver_sql(query, (tenant, orjson.dumps(ids).decode())).scalar_one()
    return list(orjson.loads(found))


def _known_on_postgres(connection: Connection, tenant: str, ids: list[str]) -> list[str]:
    # Never prepared: a plan made while the table was small scans all of it for ever.
    query = "SELECT event_id FROM event_ids WHERE tenant = %s AND event_id = ANY(%s)"
    driver: Any = connection.connection.driver_connection
    with driver_errors(connection, query):
        return [row[0] for row in driver.execute(query, (tenant, ids), prepare=False)]


def _insert(connection: Connection, fresh: Sequence[Event], first_seq: int) -> None:
    """Write new events, numbered from `first_seq`, into the three tables."""
    recorded_at_us = now_us()
    salts = os.urandom(SALT_BYTES * len(fresh))
    ids, envelopes, bodies = [], [], []
    for number, event in enumerate(fresh):
        seq, salt = first_seq + number, salts[number * SALT_BYTES : (number + 1) * SALT_BYTES]
        text, arrays = encode_body(event.body)
        of_body = body_digest(salt, event, text, arrays)
        ids.append((event.tenant, event.event_id, recorded_at_us))
        envelopes.append(_envelope(seq, event, recorded_at_us, event_digest(seq, recorded_at_us, event, of_body)))
        bodies.append((seq, salt, compress(text), arrays))
    insert_rows(connection, event_ids, ids)
    insert_rows(connection, events, envelopes)
    insert_rows(connection, event_bodies, bodies)


def _envelope(seq: int, event: Event, recorded_at_us: int, digest: bytes) -> tuple[Any, ...]:
    """A row of `events`, in the order of its columns."""
    return (
        seq,
        event.event_id,
        event.kind,
        event.tenant,
        event.workspace,
        event.occurred_at_us,
        recorded_at_us,
        event.user_id,
        event.session_id,
        event.agent,
        event.interaction_id,
        digest,
        False,
        None,
    )


def recorded_event(row: Any, body: dict[str, Any] | None = None) -> RecordedEvent:
    """An event from a row of `events` joined with `event_bodies`; `body` stands in for the row's own."""
    if body is None:
        body = {} if row["body"] is None else decode_body(row["body"], row["arrays"])
    event = Event(
        kind=row["kind"],
        tenant=row["tenant"],
        workspace=row["workspace"],
        body=body,
        event_id=row["event_id"],
        occurred_at_us=row["occurred_at_us"],
        user_id=row["user_id"],
        session_id=row["session_id"],
        agent=row["agent"],
        interaction_id=row["interaction_id"],
    )
    return RecordedEvent(row["seq"], event, row["recorded_at_us"], bytes(row["digest"]), row["erased"])
