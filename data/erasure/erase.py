"""Erasure: everything a person left is removed, and their return refused.

In this order, each step safe to repeat, so that an erasure that was killed is finished by the next call: the
tombstone, from which on nothing of theirs is taken in; the records of the log with what was counted from them,
in one transaction; sealed partitions; spools, datasets and caches; the versions trained on them; deleted bytes in the
database's files; the event that says so. Each step is a file of this folder.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from cluster.clock import now_us, to_iso
from cluster.database import exclusive, write
from cluster.deleted_bytes import remove_traces
from cluster.settings import Settings
from cluster.tables import erasures, events
from data.erasure.partitions import rewrite_partitions
from data.erasure.person import PUBLISH, Person, is_of, read_erasure
from data.erasure.records import chunks, erase_records
from data.erasure.tombstones import raise_tombstone
from data.events import Event, parse_body
from data.log import EventLog
from data.partitions.partition import Partition
from data.seal import LOCK

Report = dict[str, Any]
TABLES_WITH_TRACES = (
    "events", "event_bodies", "experiment_users", "arm_statistics", "user_baselines", "judged_answers", "tool_replies",
)  # fmt: skip


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
        raise_tombstone(engine, settings, person)
        seqs = erase_records(engine, settings, person)
        rewritten = list(rewrite_partitions(engine, seqs))
        report = _erase_files(engine, settings, person, seqs)
        tables = TABLES_WITH_TRACES if settings.erasure.rewrite_tables else ()
        report["write_ahead_log"] = remove_traces(
            engine, tables, settings.erasure.wait_s, settings.erasure.overwrite_wal_mb * 2**20
        )
        return _finish(engine, settings, person, report, rewritten)


def _finished(engine: Engine, person: Person) -> Report | None:
    row = read_erasure(engine, person)
    return None if row is None or row["state"] != "done" else row["report"]


def _erase_files(engine: Engine, settings: Settings, person: Person, seqs: Sequence[int]) -> Report:
    from data.erasure.files import clean_datasets, clean_spools, datasets_with, drop_caches
    from data.erasure.versions import mark_versions

    report: Report = dict(read_erasure(engine, person)["report"])
    touched = set(_interactions(engine, seqs))
    if "datasets" not in report:  # noted before anything changes, for afterwards nothing tells
        with exclusive(engine, PUBLISH, settings.erasure.wait_s):  # what is published later looks for this erasure
            found = datasets_with(settings, engine, person.tenant, person.user_id, touched)
        report["datasets"] = [manifest.path for manifest in found]
        with write(engine).begin() as connection:
            connection.execute(erasures.update().where(is_of(person)).values(report=report))
    clean_spools(settings, engine)
    names = clean_datasets(report["datasets"], person.user_id, touched)
    if names:
        drop_caches(settings)
    return report | {"datasets": names} | mark_versions(engine, settings, person.tenant, names)


def _interactions(engine: Engine, seqs: Sequence[int]) -> Iterator[str]:
    """Interactions that the erased records are, or are about."""
    with engine.connect() as connection:
        for chunk in chunks(seqs):
            query = sa.select(events.c.interaction_id).where(
                events.c.seq.in_(chunk), events.c.interaction_id.is_not(None)
            )
            yield from connection.execute(query).scalars()


def _finish(
    engine: Engine, settings: Settings, person: Person, report: Report, rewritten: Sequence[Partition]
) -> Report:
    row = read_erasure(engine, person)
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
        connection.execute(erasures.update().where(is_of(person)).values(values))
    return answer
