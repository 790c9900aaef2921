"""The daily seal: finished days of the log go to Parquet, old bodies and old event ids leave the database.

A run seals the log from where the last one ended up to the first event of a day that is not over. What is to
be written is planned and committed first, stretch by stretch and day by day; so a run that was killed is
finished by the next with the same files, and an event that came late for its day lands in a further file of
that day. Bodies leave only once their file has been read back.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from cluster.clock import DAY_US
from cluster.database import exclusive, write
from cluster.errors import ConflictError, UnavailableError
from cluster.settings import Settings
from cluster.tables import event_bodies, event_ids, events, partitions
from data.encoding import decompress
from data.events import Event
from data.log import IDS_CURSOR, EventLog, save_cursor
from data.partitions.files import ROWS, Written, hash_file, open_location, write_file
from data.partitions.partition import Partition, day_of, path_of, read_partitions, sealed_upto, update_partition

log = logging.getLogger(__name__)

LOCK = "sealed-partitions"
"""Held by whoever writes partitions: a seal or an erasure."""

KEPT_KINDS = ("rollout.decision", "dataset.ready", "model.updated", "prompt.changed")
"""Bodies of these stay in the database: they are few, and decisions are rebuilt from them."""

DAYS = events.c.occurred_at_us // DAY_US


@dataclass(slots=True)
class SealReport:
    """What a run did."""

    partitions: list[Partition]
    """Sealed in this run."""
    sealed_upto: int = 0
    """Every event up to this `seq` is in a sealed partition."""
    waiting: int = 0
    """Events whose day is not over, or that follow such an event."""
    bodies_left: int = 0
    """Bodies deleted from the database."""
    ids_forgotten: int = 0

    @property
    def events(self) -> int:
        """Events sealed in this run."""
        return sum(partition.num_events for partition in self.partitions)

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        shown = [{"name": p.name, **asdict(p)} for p in self.partitions]
        return asdict(self) | {"events": self.events, "partitions": shown}


def seal(
    engine: Engine, settings: Settings, now_us: int, on_progress: Callable[[int], None] = lambda _: None
) -> SealReport:
    """Seal what is finished, and let go of what is old; running it again changes nothing.

    Raises:
        ConfigError: `storage.events` is no location.
        ConflictError: another seal or an erasure is at work.
        UnavailableError: the location cannot be written, or a file there is not as it was sealed.
    """
    open_location(settings.events_root)
    report = SealReport([])
    with exclusive(engine, LOCK):
        for partition in _finish_planned(engine, settings, now_us):
            report.partitions.append(partition)
            on_progress(report.events)
        while _plan(engine, settings, now_us):
            for partition in _finish_planned(engine, settings, now_us):
                report.partitions.append(partition)
                on_progress(report.events)
        report.bodies_left = _drop_bodies(engine, settings, now_us)
    report.ids_forgotten = forget_ids(engine, settings, now_us)
    with engine.connect() as connection:
        report.sealed_upto = sealed_upto(read_partitions(connection, state=None))
    report.waiting = EventLog(engine).last_seq() - report.sealed_upto
    return report


def _plan(engine: Engine, settings: Settings, now_us: int) -> bool:
    """Commit to the next stretch of the log: one partition a day in it. `False` when nothing is finished."""
    today_us = now_us // DAY_US * DAY_US
    with write(engine).begin() as connection:
        after = sealed_upto(read_partitions(connection, state=None))
        unfinished = sa.select(sa.func.min(events.c.seq)).where(
            events.c.seq > after, events.c.occurred_at_us >= today_us
        )
        last = connection.execute(sa.select(sa.func.max(events.c.seq))).scalar() or 0
        first_unfinished = connection.execute(unfinished).scalar()
        horizon = last if first_unfinished is None else first_unfinished - 1
        upto = min(horizon, after + settings.seal.partition_events)
        if upto <= after:
            return False
        inside = (events.c.seq > after) & (events.c.seq <= upto)
        days = connection.execute(sa.select(DAYS, sa.func.count()).where(inside).group_by(DAYS).order_by(DAYS)).all()
        for number, count in days:
            day = day_of(number * DAY_US)
            path = path_of(day, after, upto)
            planned = Partition(after, day, upto, "writing", settings.events_root, path, count)
            connection.execute(partitions.insert().values(asdict(planned)))
        return bool(days)


def _finish_planned(engine: Engine, settings: Settings, now_us: int) -> Iterator[Partition]:
    """Write and register every partition that is planned."""
    with engine.connect() as connection:
        planned = read_partitions(connection, state="writing")
    for partition in planned:
        pages = _pages(engine, partition, settings.seal.page_events)
        written = write_file(partition.location, partition.path, pages)
        if written.num_events != partition.num_events:
            raise ConflictError(
                f"partition {partition.name} has {written.num_events} events, {partition.num_events} were there "
                "when it was planned; run `rayloop verify`"
            )
        yield _register(engine, settings, partition, written, now_us)


def _register(engine: Engine, settings: Settings, partition: Partition, written: Written, now_us: int) -> Partition:
    values = {"state": "sealed", "sealed_at_us": now_us, **asdict(written)}
    body = {name: getattr(partition, name) for name in ("day", "after_seq", "upto_seq", "num_events")}
    body |= {"root": written.root, "sha256": written.sha256}
    event = Event(
        "partition.sealed",
        settings.tenant,
        settings.workspace,
        body,
        event_id=f"partition.sealed:{partition.name}",
        occurred_at_us=now_us,
    )
    with write(engine).begin() as connection:
        update_partition(connection, partition, values)
        EventLog(engine).append_in(connection, [event])
    return Partition(**asdict(partition) | values)


def _pages(engine: Engine, partition: Partition, page: int) -> Iterator[pa.Table]:
    """The partition's rows as `ROWS`, read from the database in short pages."""
    joined = events.outerjoin(event_bodies, events.c.seq == event_bodies.c.seq)
    columns = (event_bodies.c.salt, event_bodies.c.body, event_bodies.c.arrays)
    query = sa.select(events, *columns).select_from(joined).where(partition.holds()).order_by(events.c.seq).limit(page)
    after = partition.after_seq
    while True:
        with engine.connect() as connection:
            rows = connection.execute(query.where(events.c.seq > after)).mappings().all()
        if not rows:
            return
        yield pa.Table.from_pylist([_sealed_row(row) for row in rows], ROWS)
        after = rows[-1]["seq"]


def _sealed_row(row: Any) -> dict[str, Any]:
    sealed = {name: row[name] for name in ROWS.names}
    if row["body"] is not None:
        try:
            sealed["body"] = decompress(row["body"]).decode()
        except ValueError:
            log.warning("the body of seq %d is damaged and is sealed without it; run `rayloop verify`", row["seq"])
            sealed["body"] = None
    return sealed


def _drop_bodies(engine: Engine, settings: Settings, now_us: int) -> int:
    """Delete bodies that have been sealed for long enough, after a look at their file."""
    cutoff_us = now_us - round(settings.seal.keep_days * DAY_US)
    with engine.connect() as connection:
        known = read_partitions(connection)
    left = 0
    for partition in known:
        if partition.bodies_left_us is None and (partition.sealed_at_us or 0) <= cutoff_us:
            _require_whole(partition)
            left += _delete_bodies(engine, partition, settings.seal.page_events)
            with write(engine).begin() as connection:
                update_partition(connection, partition, {"bodies_left_us": now_us})
    return left


def _require_whole(partition: Partition) -> None:
    try:
        found, _ = hash_file(partition.location, partition.path)
    except OSError as error:
        cause = str(error).splitlines()[0]
        raise UnavailableError(f"partition {partition.name} cannot be read ({cause}); its bodies stay") from None
    if found != partition.sha256:
        raise UnavailableError(f"partition {partition.name} is not as it was sealed; its bodies stay: `rayloop verify`")


def _delete_bodies(engine: Engine, partition: Partition, page: int) -> int:
    deleted, after = 0, partition.after_seq
    while True:
        query = sa.select(events.c.seq).where(partition.holds(), events.c.seq > after).order_by(events.c.seq)
        with write(engine).begin() as connection:
            seqs = connection.execute(query.limit(page)).scalars().all()
            if not seqs:
                return deleted
            chosen = sa.and_(event_bodies.c.seq >= seqs[0], event_bodies.c.seq <= seqs[-1])
            leaving = sa.select(events.c.seq).where(partition.holds(), events.c.kind.not_in(KEPT_KINDS))
            inside = event_bodies.c.seq.in_(leaving)
            deleted += connection.execute(event_bodies.delete().where(chosen, inside)).rowcount
        after = seqs[-1]


def forget_ids(engine: Engine, settings: Settings, now_us: int) -> int:
    """Forget ids older than `log.event_id_window_days`, in short transactions; a retry of one counts anew."""
    cutoff_us = now_us - settings.log.event_id_window_days * DAY_US
    with write(engine).begin() as connection:
        save_cursor(connection, IDS_CURSOR, max(cutoff_us, 0))
    forgotten, last, page = 0, ("", ""), settings.seal.page_events
    key = sa.tuple_(event_ids.c.tenant, event_ids.c.event_id)
    while True:
        query = sa.select(event_ids).where(key > sa.tuple_(*map(sa.literal, last)))
        query = query.order_by(event_ids.c.tenant, event_ids.c.event_id).limit(page)
        with write(engine).begin() as connection:
            rows = connection.execute(query).all()
            if not rows:
                return forgotten
            until = (rows[-1].tenant, rows[-1].event_id)
            if any(row.recorded_at_us < cutoff_us for row in rows):
                between = (key > sa.tuple_(*map(sa.literal, last))) & (key <= sa.tuple_(*map(sa.literal, until)))
                old = event_ids.delete().where(between, event_ids.c.recorded_at_us < cutoff_us)
                forgotten += connection.execute(old).rowcount
        last = until
