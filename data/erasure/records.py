"""What an erasure takes out of the log: bodies, salts and personal ids, with what was counted from them.

Envelopes stay, marked erased, so Merkle roots and the order of the log still hold.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from cluster.bulk import merge_rows
from cluster.database import write
from cluster.settings import Settings
from cluster.tables import (
    arm_moments,
    arm_statistics,
    erasures,
    event_bodies,
    events,
    experiment_users,
    judged_answers,
    tool_replies,
    user_baselines,
)
from data.encoding import body_digest, decompress
from data.erasure.person import Person, is_of, read_erasure
from data.erasure.tombstones import OWN_KINDS, bury
from data.log import LOOKUP_CHUNK, recorded_event, subject, take_append_lock
from data.moments import TERMS, SumChanges
from data.partitions.files import read_batches
from data.partitions.partition import Partition, read_partitions
from data.traces.genai import trace_session

RUN = re.compile(r"trajectory-([0-9a-f]{32})-")
"""The event id of an agent's span, with its trace; steps of it that came without a user are its user's."""
UNKNOWN_BODY = bytes(32)
"""Stands in for the digest of a body that was damaged or lost before."""


def erase_records(engine: Engine, settings: Settings, person: Person) -> list[int]:
    """Take body, salt and personal ids out of the person's records; returns the `seq` of all of them."""
    row = read_erasure(engine, person)
    if row["state"] != "begun":
        return [seq for first, last in row["events"] for seq in range(first, last + 1)]
    with write(engine).begin() as connection:
        take_append_lock(connection)
        found = _Found.of(connection, person)
        digests = _body_digests(engine, connection, found.seqs)
        for chunk in chunks(found.seqs):
            connection.execute(_mark_erased(), [{"at_seq": seq, "of_body": digests[seq]} for seq in chunk])
            connection.execute(event_bodies.delete().where(event_bodies.c.seq.in_(chunk)))
        projected = _erase_projections(connection, person, found)
        _erase_kept_texts(connection, person)
        bury(connection, person, (subject("interaction", name) for name in found.interactions))
        bury(connection, person, (subject("session", name) for name in found.sessions))
        counts = {"events": found.kinds, "interactions": len(found.interactions), "projected_rows": projected}
        values = {"state": "records_erased", "events": as_ranges(found.seqs), "report": counts}
        connection.execute(erasures.update().where(is_of(person)).values(values))
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
        for chunk in chunks(interactions):
            about = events.c.interaction_id.in_(chunk) & (events.c.kind != "interaction")
            rows += connection.execute(base.where(about)).all()
        for chunk in chunks(sorted(sessions)):
            nobody = events.c.session_id.in_(chunk) & events.c.user_id.is_(None)
            rows += connection.execute(base.where(nobody)).all()
        unique = {row.seq: row.kind for row in rows}
        kinds = {kind: list(unique.values()).count(kind) for kind in sorted(set(unique.values()))}
        return cls(sorted(unique), kinds, interactions, sorted(sessions))


def _body_digests(engine: Engine, connection: Connection, seqs: Sequence[int]) -> dict[int, bytes]:
    """What stands in for each body once it is gone, from the database or from sealed partitions."""
    found: dict[int, bytes] = {}
    joined = events.outerjoin(event_bodies, events.c.seq == event_bodies.c.seq)
    for chunk in chunks(seqs):
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
    _take_off_sums(connection, names)
    deleted = 0
    for table in (experiment_users, arm_statistics, user_baselines):
        for chunk in chunks(names):
            deleted += connection.execute(table.delete().where(table.c.user_id.in_(chunk))).rowcount
    return deleted


def _take_off_sums(connection: Connection, names: list[str]) -> None:
    """Take what the person contributed off the sums over users, which a rebuild would not count either."""
    s, u = arm_statistics.c, experiment_users.c
    same = (u.experiment_id == s.experiment_id) & (u.user_id == s.user_id)
    query = sa.select(s.experiment_id, s.user_id, s.period, s.arm, s.sums, u.segments, u.covariates)
    counted = query.join_from(arm_statistics, experiment_users, same).where(u.excluded.is_(False))
    changes = SumChanges()
    for chunk in chunks(names):
        for *key, sums, segments, covariates in connection.execute(counted.where(s.user_id.in_(chunk))):
            for metric, (count, total, *_) in orjson.loads(sums).items():
                own = (key[0], key[1], key[2], key[3])
                changes.add(own, metric, segments, (count, total, 0.0, 0.0), covariates.get(metric))
    merge_rows(connection, arm_moments, changes.rows(), add=TERMS)


def _erase_kept_texts(connection: Connection, person: Person) -> None:
    """Take texts out of what is kept for repeated calls, which names nobody: any of it may quote the person.

    A judged answer keeps its grade. A tool's call that is repeated is not made again, and has no reply any more.
    """
    connection.execute(judged_answers.update().values(reason=""))
    theirs = tool_replies.c.tenant == person.tenant, tool_replies.c.state == "done"
    connection.execute(tool_replies.update().where(*theirs).values(reply={"reply": None}))


def as_ranges(seqs: Iterable[int]) -> list[list[int]]:
    """Ascending numbers as `[first, last]` ranges."""
    ranges: list[list[int]] = []
    for seq in seqs:
        if ranges and seq == ranges[-1][1] + 1:
            ranges[-1][1] = seq
        else:
            ranges.append([seq, seq])
    return ranges


def chunks(values: Sequence[Any]) -> Iterator[list[Any]]:
    """As many as one query may name at once."""
    for start in range(0, len(values), LOOKUP_CHUNK):
        yield list(values[start : start + LOOKUP_CHUNK])
