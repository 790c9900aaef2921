"""Erasure: everything a person left is removed, and their return refused.

In this order, each step safe to repeat, so that an erasure that was killed is finished by the next call: the
tombstone, from which on nothing of theirs is taken in; the records of the log with what was counted from them,
in one transaction; sealed partitions; spools, datasets and caches (`data.erasure.files`); the versions trained on
them (`data.erasure.versions`); deleted bytes in the database's files; the event that says so.

Envelopes stay, marked erased, without personal ids: Merkle roots and the order of the log still hold.
"""

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from cluster.clock import now_us, to_iso
from cluster.database import exclusive, remove_traces, write
from cluster.errors import ConflictError, NotFoundError
from cluster.settings import Settings
from cluster.tables import (
    arm_statistics,
    erasures,
    event_bodies,
    events,
    experiment_users,
    tombstones,
    user_baselines,
)
from data.encoding import body_digest, decompress
from data.events import Event, parse_body
from data.log import LOOKUP_CHUNK, EventLog, recorded_event, subject, take_append_lock
from data.partitions.bodies import forget_cached
from data.partitions.files import ROWS, read_batches, remove_file, write_file
from data.partitions.partition import Partition, next_path, older_paths, read_partitions
from data.seal import LOCK, update_partition
from data.traces.genai import trace_session

log = logging.getLogger(__name__)

Report = dict[str, Any]
OWN_KINDS = ("interaction", "trajectory")
"""Kinds that make an interaction a person's own; what others said about it then goes with it."""
RUN = re.compile(r"trajectory-([0-9a-f]{32})-")
"""The event id of an agent's span, with its trace; steps of it that came without a user are its user's."""
TABLES_WITH_TRACES = ("events", "event_bodies", "experiment_users", "arm_statistics", "user_baselines")
UNKNOWN_BODY = bytes(32)
"""Stands in for the digest of a body that was damaged or lost before."""


@dataclass(frozen=True, slots=True)
class Person:
    """Who is erased."""

    tenant: str
    user_id: str
    """The pseudonym (`data.feedback.pseudonym`)."""


def erase(engine: Engine, settings: Settings, person: Person) -> Report:
    """Remove a person; the same call again gives the same report.

    Raises:
        NotFoundError: nothing in the log is theirs.
        ConflictError: a seal or another erasure is at work, or a partition was tampered with.
        UnavailableError: a store does not answer; call again to go on where it stopped.
    """
    if (done := _finished(engine, person)) is not None:
        return done
    with exclusive(engine, LOCK, settings.erasure.wait_s):
        if (done := _finished(engine, person)) is not None:
            return done
        _raise_tombstone(engine, settings, person)
        seqs = _erase_records(engine, settings, person)
        rewritten = list(_rewrite_partitions(engine, seqs))
        report = _erase_files(engine, settings, person, seqs)
        remove_traces(engine, TABLES_WITH_TRACES if settings.erasure.rewrite_tables else (), settings.erasure.wait_s)
        return _finish(engine, settings, person, report, rewritten)


def _finished(engine: Engine, person: Person) -> Report | None:
    row = _row(engine, person)
    return None if row is None or row["state"] != "done" else row["report"]


def _row(engine: Engine, person: Person) -> Any:
    with engine.connect() as connection:
        return connection.execute(sa.select(erasures).where(_this(person))).mappings().first()


def _this(person: Person) -> sa.ColumnElement[bool]:
    return sa.and_(erasures.c.tenant == person.tenant, erasures.c.user_id == person.user_id)


def _raise_tombstone(engine: Engine, settings: Settings, person: Person) -> None:
    """Refuse what comes in from now on; the first thing that is durable."""
    from data.erasure.files import spooled

    if _row(engine, person) is not None:
        return
    theirs = sa.select(events.c.seq).where(events.c.tenant == person.tenant, events.c.user_id == person.user_id)
    waiting = spooled(settings, person.tenant, person.user_id)
    with write(engine).begin() as connection:
        take_append_lock(connection)
        if connection.execute(theirs.limit(1)).first() is None and not waiting:
            raise NotFoundError(
                f"no event of this user in tenant {person.tenant!r}; nothing to erase: check the spelling"
            )
        _bury(connection, person, [subject("user", person.user_id)])
        own = [event for event in waiting if event.kind in OWN_KINDS]
        _bury(connection, person, (subject("interaction", e.interaction_id) for e in own if e.interaction_id))
        _bury(connection, person, (subject("session", e.session_id) for e in own if e.session_id))
        values = {"state": "begun", "events": [], "started_at_us": now_us()}
        connection.execute(erasures.insert().values(tenant=person.tenant, user_id=person.user_id, **values))


def _bury(connection: Connection, person: Person, subjects: Iterable[str]) -> None:
    for start in range(0, len(listed := sorted(set(subjects))), LOOKUP_CHUNK):
        chunk = listed[start : start + LOOKUP_CHUNK]
        query = sa.select(tombstones.c.subject).where(
            tombstones.c.tenant == person.tenant, tombstones.c.subject.in_(chunk)
        )
        known = set(connection.execute(query).scalars())
        fresh = [s for s in chunk if s not in known]
        if fresh:
            rows = [{"tenant": person.tenant, "subject": s, "erased_at_us": now_us()} for s in fresh]
            connection.execute(tombstones.insert(), rows)


# records


def _erase_records(engine: Engine, settings: Settings, person: Person) -> list[int]:
    """Take body, salt and personal ids out of the person's records; returns the `seq` of all of them."""
    row = _row(engine, person)
    if row["state"] != "begun":
        return [seq for first, last in row["events"] for seq in range(first, last + 1)]
    with write(engine).begin() as connection:
        take_append_lock(connection)
        found = _Found.of(connection, person)
        digests = _body_digests(engine, connection, found.seqs)
        for chunk in _chunks(found.seqs):
            connection.execute(_mark_erased(), [{"at_seq": seq, "of_body": digests[seq]} for seq in chunk])
            connection.execute(event_bodies.delete().where(event_bodies.c.seq.in_(chunk)))
        projected = _erase_projections(connection, person, found)
        _bury(connection, person, (subject("interaction", name) for name in found.interactions))
        _bury(connection, person, (subject("session", name) for name in found.sessions))
        counts = {"events": found.kinds, "interactions": len(found.interactions), "projected_rows": projected}
        values = {"state": "records_erased", "events": as_ranges(found.seqs), "report": counts}
        connection.execute(erasures.update().where(_this(person)).values(values))
    return found.seqs


def _mark_erased() -> sa.Update:
    values: dict[str, Any] = {
        "erased": True,
        "user_id": None,
        "session_id": None,
        "body_digest": sa.bindparam("of_body"),
    }
    return events.update().where(events.c.seq == sa.bindparam("at_seq")).values(values)


@dataclass(frozen=True, slots=True)
class _Found:
    """What of the log is a person's."""

    seqs: list[int]
    kinds: dict[str, int]
    interactions: list[str]
    sessions: list[str]

    @classmethod
    def of(cls, connection: Connection, person: Person) -> "_Found":
        columns = (events.c.seq, events.c.kind, events.c.event_id, events.c.interaction_id, events.c.session_id)
        base = sa.select(*columns).where(events.c.tenant == person.tenant, events.c.erased.is_(False))
        rows = list(connection.execute(base.where(events.c.user_id == person.user_id)).all())
        interactions = sorted({r.interaction_id for r in rows if r.kind in OWN_KINDS and r.interaction_id})
        traces = (RUN.match(r.event_id) for r in rows if r.kind == "trajectory")
        sessions = {r.session_id for r in rows if r.session_id} | {trace_session(m[1]) for m in traces if m}
        for chunk in _chunks(interactions):
            about = events.c.interaction_id.in_(chunk) & (events.c.kind != "interaction")
            rows += connection.execute(base.where(about)).all()
        for chunk in _chunks(sorted(sessions)):
            nobody = events.c.session_id.in_(chunk) & events.c.user_id.is_(None)
            rows += connection.execute(base.where(nobody)).all()
        unique = {row.seq: row.kind for row in rows}
        kinds = {kind: list(unique.values()).count(kind) for kind in sorted(set(unique.values()))}
        return cls(sorted(unique), kinds, interactions, sorted(sessions))


def _body_digests(engine: Engine, connection: Connection, seqs: Sequence[int]) -> dict[int, bytes]:
    """What stands in for each body once it is gone, from the database or from sealed partitions."""
    found: dict[int, bytes] = {}
    joined = events.outerjoin(event_bodies, events.c.seq == event_bodies.c.seq)
    for chunk in _chunks(seqs):
        query = sa.select(events, event_bodies.c.salt, event_bodies.c.body, event_bodies.c.arrays).select_from(joined)
        for row in connection.execute(query.where(events.c.seq.in_(chunk))).mappings():
            if row["body"] is not None:
                found[row["seq"]] = _body_digest(row, bytes(row["body"]))
    gone = set(seqs) - found.keys()
    if gone:
        for partition in read_partitions(connection):
            if any(partition.after_seq < seq <= partition.upto_seq for seq in gone):
                for sealed in _rows(partition):
                    if sealed["seq"] in gone and sealed["body"] is not None:
                        found[sealed["seq"]] = _body_digest(sealed, sealed["body"].encode())
    return dict.fromkeys(seqs, UNKNOWN_BODY) | found


def _body_digest(row: Any, stored: bytes) -> bytes:
    try:
        return body_digest(bytes(row["salt"]), recorded_event(row, body={}).event, decompress(stored), row["arrays"])
    except ValueError:
        return UNKNOWN_BODY


def _rows(partition: Partition) -> Iterator[dict[str, Any]]:
    for batch in read_batches(partition):
        yield from batch.to_pylist()


def _erase_projections(connection: Connection, person: Person, found: _Found) -> int:
    """Delete what experiments counted for the person, under every name they were assigned by."""
    names = [person.user_id, *(f"session:{s}" for s in found.sessions), *(f"request:{i}" for i in found.interactions)]
    deleted = 0
    for table in (experiment_users, arm_statistics, user_baselines):
        for chunk in _chunks(names):
            deleted += connection.execute(table.delete().where(table.c.user_id.in_(chunk))).rowcount
    return deleted


# partitions


def _rewrite_partitions(engine: Engine, seqs: Sequence[int]) -> Iterator[Partition]:
    """Bring every partition that holds the person's records in line with the database."""
    if not seqs:
        return
    with engine.connect() as connection:
        known = read_partitions(connection, state=None)
    for partition in known:
        if not any(partition.after_seq < seq <= partition.upto_seq for seq in seqs):
            continue
        if partition.state != "sealed":  # a seal that was killed left what it had read; it will read again
            remove_file(partition.location, partition.path)
            continue
        digests = _erased_in(engine, partition)
        if digests:
            yield _rewrite(engine, partition, digests)


def _erased_in(engine: Engine, partition: Partition) -> dict[int, bytes]:
    marked = events.c.erased.is_(True) & events.c.body_digest.is_not(None)
    query = sa.select(events.c.seq, events.c.body_digest).where(partition.holds(), marked)
    with engine.connect() as connection:
        return {seq: bytes(of_body) for seq, of_body in connection.execute(query)}


def _rewrite(engine: Engine, partition: Partition, digests: dict[int, bytes]) -> Partition:
    marks = (row for batch in read_batches(partition, ["seq", "erased"]) for row in batch.to_pylist())
    pending = any(row["seq"] in digests and not row["erased"] for row in marks)
    if pending:
        path = next_path(partition)
        written = write_file(partition.location, path, (_without(batch, digests) for batch in read_batches(partition)))
        if (written.root, written.num_events) != (partition.root, partition.num_events):
            remove_file(partition.location, path)
            raise ConflictError(f"partition {partition.name} is not as it was sealed; run `rayloop verify`")
        values = {"path": path, "sha256": written.sha256, "num_bytes": written.num_bytes}
        with write(engine).begin() as connection:
            update_partition(connection, partition, values)
        with engine.connect() as connection:
            known = read_partitions(connection)
        partition = next(p for p in known if (p.after_seq, p.day) == (partition.after_seq, partition.day))
        forget_cached()
    for old in older_paths(partition):
        remove_file(partition.location, old)
    return partition


def _without(batch: pa.Table, digests: dict[int, bytes]) -> pa.Table:
    rows = batch.to_pylist()
    for row in rows:
        if row["seq"] in digests:
            row |= {"erased": True, "body_digest": digests[row["seq"]]}
            row |= dict.fromkeys(("user_id", "session_id", "salt", "body", "arrays"))
    return pa.Table.from_pylist(rows, ROWS)


# files and versions


def _erase_files(engine: Engine, settings: Settings, person: Person, seqs: Sequence[int]) -> Report:
    from data.erasure.files import clean_datasets, clean_spools, datasets_with, drop_caches
    from data.erasure.versions import mark_versions

    report: Report = dict(_row(engine, person)["report"])
    touched = set(_interactions(engine, seqs))
    if "datasets" not in report:  # noted before anything changes, for afterwards nothing tells
        found = datasets_with(settings, engine, person.tenant, person.user_id, touched)
        report["datasets"] = [manifest.path for manifest in found]
        with write(engine).begin() as connection:
            connection.execute(erasures.update().where(_this(person)).values(report=report))
    clean_spools(settings, engine)
    names = clean_datasets(report["datasets"], person.user_id, touched)
    if names:
        drop_caches(settings)
    return report | {"datasets": names} | mark_versions(engine, settings, person.tenant, names)


def _interactions(engine: Engine, seqs: Sequence[int]) -> Iterator[str]:
    """Interactions that the erased records are, or are about."""
    with engine.connect() as connection:
        for chunk in _chunks(seqs):
            query = sa.select(events.c.interaction_id).where(
                events.c.seq.in_(chunk), events.c.interaction_id.is_not(None)
            )
            yield from connection.execute(query).scalars()


def _finish(
    engine: Engine, settings: Settings, person: Person, report: Report, rewritten: Sequence[Partition]
) -> Report:
    row = _row(engine, person)
    at_us = now_us()
    affected = report | {"partitions": [partition.name for partition in rewritten]}
    body = {"user_id": person.user_id, "events": row["events"], "affected": affected}
    event = Event(
        "erasure",
        person.tenant,
        settings.workspace,
        parse_body("erasure", body),
        event_id=f"erasure:{person.user_id}",
        occurred_at_us=at_us,
    )
    answer = {"user_id": person.user_id, "tenant": person.tenant, "erased_at": to_iso(at_us), **affected}
    with write(engine).begin() as connection:
        EventLog(engine).append_in(connection, [event])
        values = {"state": "done", "report": answer, "finished_at_us": at_us}
        connection.execute(erasures.update().where(_this(person)).values(values))
    return answer


def as_ranges(seqs: Iterable[int]) -> list[list[int]]:
    """Ascending numbers as `[first, last]` ranges."""
    ranges: list[list[int]] = []
    for seq in seqs:
        if ranges and seq == ranges[-1][1] + 1:
            ranges[-1][1] = seq
        else:
            ranges.append([seq, seq])
    return ranges


def _chunks(values: Sequence[Any]) -> Iterator[list[Any]]:
    for start in range(0, len(values), LOOKUP_CHUNK):
        yield list(values[start : start + LOOKUP_CHUNK])
