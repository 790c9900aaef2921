"""The append-only event log on SQLite or PostgreSQL.

`EventLog.append` writes a batch in one transaction and returns when it is on disk. Sequence numbers are
given out under the write lock (SQLite's own, an advisory lock on PostgreSQL), so they have no holes and
become visible in order: a reader that remembers the last `seq` it saw misses nothing.

`GroupCommit` gathers what many threads or coroutines append into few transactions.
"""

import hashlib
import logging
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import orjson
import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from cluster.clock import now_us
from cluster.database import is_postgres, write
from cluster.tables import cursors, event_bodies, event_ids, events
from data.events import Event, RecordedEvent

log = logging.getLogger(__name__)

APPEND_LOCK = 7_213_002  # pg_advisory_xact_lock key: one writer numbers events at a time
LOOKUP_CHUNK = 500  # bound on variables in one IN (…)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one appended event."""

    event_id: str
    status: Literal["accepted", "duplicate"]
    seq: int | None = None
    """Its place in the log; `None` for a duplicate."""


class EventLog:
    """The log behind one database engine. Thread-safe; cheap to construct."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._writer = write(engine)

    def append(self, batch: Sequence[Event]) -> list[Verdict]:
        """Write a batch; durable when this returns. One verdict an event, in order.

        An event whose `(tenant, event_id)` is already known, in the log or earlier in the batch, is a
        duplicate and changes nothing.
        """
        if not batch:
            return []
        with self._writer.begin() as connection:
            return self.append_in(connection, batch)

    def append_in(self, connection: Connection, batch: Sequence[Event]) -> list[Verdict]:
        """`append` as part of the caller's transaction (which must come from `database.write`)."""
        if is_postgres(self.engine):
            connection.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": APPEND_LOCK})
        known = _known_ids(connection, batch)
        seq = connection.execute(sa.select(sa.func.max(events.c.seq))).scalar() or 0
        recorded_at_us = now_us()
        verdicts, envelopes, bodies, ids = [], [], [], []
        for event in batch:
            key = (event.tenant, event.event_id)
            if key in known:
                verdicts.append(Verdict(event.event_id, "duplicate"))
                continue
            known.add(key)
            seq += 1
            body = _encode(seq, event.body)
            envelopes.append(_envelope(seq, event, recorded_at_us, _digest(body)))
            bodies.append(body)
            ids.append({"tenant": event.tenant, "event_id": event.event_id, "recorded_at_us": recorded_at_us})
            verdicts.append(Verdict(event.event_id, "accepted", seq))
        if envelopes:
            connection.execute(event_ids.insert(), ids)
            connection.execute(events.insert(), envelopes)
            connection.execute(event_bodies.insert(), bodies)
        return verdicts

    def read(
        self, after: int = 0, limit: int = 1000, *, kinds: Sequence[str] = (), tenant: str | None = None
    ) -> list[RecordedEvent]:
        """Up to `limit` events with `seq > after`, in order. Empty at the end of the log."""
        query = sa.select(events, event_bodies.c.body, event_bodies.c.arrays).select_from(
            events.outerjoin(event_bodies, events.c.seq == event_bodies.c.seq)
        )
        query = query.where(events.c.seq > after).order_by(events.c.seq).limit(limit)
        if kinds:
            query = query.where(events.c.kind.in_(kinds))
        if tenant is not None:
            query = query.where(events.c.tenant == tenant)
        with self.engine.connect() as connection:
            return [_recorded(row) for row in connection.execute(query).mappings()]

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
    ) -> list[RecordedEvent]:
        """Events about these interactions with `seq <= upto`, in order."""
        found: list[RecordedEvent] = []
        source = events.outerjoin(event_bodies, events.c.seq == event_bodies.c.seq)
        with self.engine.connect() as connection:
            for start in range(0, len(interaction_ids), LOOKUP_CHUNK):
                query = sa.select(events, event_bodies.c.body, event_bodies.c.arrays).select_from(source)
                chunk = interaction_ids[start : start + LOOKUP_CHUNK]
                query = query.where(events.c.tenant == tenant, events.c.interaction_id.in_(chunk))
                if kinds:
                    query = query.where(events.c.kind.in_(kinds))
                if upto is not None:
                    query = query.where(events.c.seq <= upto)
                found += [_recorded(row) for row in connection.execute(query).mappings()]
        return sorted(found, key=lambda recorded: recorded.seq)


def save_cursor(connection: Connection, name: str, seq: int) -> None:
    """Move a reader's cursor, in the same transaction as the projection it feeds."""
    values = {"seq": seq, "updated_at_us": now_us()}
    changed = connection.execute(cursors.update().where(cursors.c.name == name).values(values))
    if not changed.rowcount:
        connection.execute(cursors.insert().values(name=name, **values))


def _known_ids(connection: Connection, batch: Sequence[Event]) -> set[tuple[str, str]]:
    known: set[tuple[str, str]] = set()
    for tenant in {event.tenant for event in batch}:
        ids = [event.event_id for event in batch if event.tenant == tenant]
        for start in range(0, len(ids), LOOKUP_CHUNK):
            query = sa.select(event_ids.c.event_id).where(
                event_ids.c.tenant == tenant, event_ids.c.event_id.in_(ids[start : start + LOOKUP_CHUNK])
            )
            known |= {(tenant, event_id) for event_id in connection.execute(query).scalars()}
    return known


def _envelope(seq: int, event: Event, recorded_at_us: int, digest: bytes) -> dict[str, Any]:
    return {
        "seq": seq,
        "event_id": event.event_id,
        "kind": event.kind,
        "tenant": event.tenant,
        "workspace": event.workspace,
        "occurred_at_us": event.occurred_at_us,
        "recorded_at_us": recorded_at_us,
        "user_id": event.user_id,
        "session_id": event.session_id,
        "agent": event.agent,
        "interaction_id": event.interaction_id,
        "digest": digest,
        "erased": False,
    }


ARRAYS = (("prompt_token_ids", "<i4"), ("completion_token_ids", "<i4"), ("completion_logprobs", "<f4"))
"""Fields of a body that are stored as packed little-endian arrays, in this order."""


def _encode(seq: int, body: dict[str, Any]) -> dict[str, Any]:
    """One row of `event_bodies`: the body as compressed canonical JSON, its arrays packed."""
    plain = body
    arrays = None
    if any(body.get(name) for name, _ in ARRAYS):
        plain = {k: v for k, v in body.items() if k not in dict(ARRAYS)}
        packed = [np.asarray(body.get(name, []), dtype=dtype) for name, dtype in ARRAYS]
        arrays = struct.pack("<3I", *(len(a) for a in packed)) + b"".join(a.tobytes() for a in packed)
    text = orjson.dumps(plain, option=orjson.OPT_SORT_KEYS)
    return {"seq": seq, "salt": os.urandom(16), "body": zlib.compress(text, 1), "arrays": arrays}


def _decode(body: bytes, arrays: bytes | None) -> dict[str, Any]:
    plain: dict[str, Any] = orjson.loads(zlib.decompress(body))
    if arrays is None:
        return plain
    lengths, offset = struct.unpack_from("<3I", arrays), 12
    for (name, dtype), length in zip(ARRAYS, lengths, strict=True):
        plain[name] = np.frombuffer(arrays, dtype, length, offset).tolist()
        offset += 4 * length
    return plain


def _digest(row: dict[str, Any]) -> bytes:
    return hashlib.sha256(row["salt"] + zlib.decompress(row["body"]) + (row["arrays"] or b"")).digest()


def _recorded(row: Any) -> RecordedEvent:
    body = {} if row["body"] is None else _decode(row["body"], row["arrays"])
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
