"""Checks the event log: every record in its place, unaltered, once; its sealed days as they were sealed.

Three readings, each in pages: the records of the database (place, digest, body), the event ids (orphans,
doubles), and the sealed partitions (`data.verify.partitions`). Faults name `seq` and event id.

What no reading can tell: records after the last seal that somebody rewrote together with their digests, or
cut off at the end together with their ids. From the seal on, the roots hold them.
"""

import bisect
import hmac
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from cluster.clock import DAY_US
from cluster.errors import RayloopError
from cluster.settings import Settings
from cluster.tables import erasures, event_bodies, event_ids, events
from data.encoding import body_digest, decompress, event_digest
from data.log import IDS_CURSOR, EventLog, recorded_event
from data.partitions.partition import read_partitions, sealed_upto
from data.verify.partitions import check_partitions
from data.verify.report import VerifyReport

NEAR = 8
"""Places to either side in which a record that does not fit its own is looked for first."""
SEARCHES = 20
"""Records that are looked for in the whole log; each costs a hash for every place."""


def verify_log(engine: Engine, settings: Settings, on_progress: Callable[[int], None] = lambda _: None) -> VerifyReport:
    """Read the whole log and its partitions, and name every record that is not as it was written."""
    report = VerifyReport(settings.log.verify_shown_faults)
    _Records(engine, settings, report).check(on_progress)
    for seq, problem in itertools.chain(_doubles(engine, settings), _orphans(engine)):
        report.add(seq, problem)
    check_partitions(engine, settings, report)
    return report


class _Records:
    """The reading of the records: one after the other, with a look at the next."""

    def __init__(self, engine: Engine, settings: Settings, report: VerifyReport) -> None:
        self.engine, self.settings, self.report = engine, settings, report
        self._last = EventLog(engine).last_seq()
        self._erased = ErasedRanges(_erased_ranges(engine, report))
        self._searches = SEARCHES
        with engine.connect() as connection:
            self._sealed_upto = sealed_upto(read_partitions(connection, state=None))
        self._ids_since_us = EventLog(engine).cursor(IDS_CURSOR)

    def check(self, on_progress: Callable[[int], None]) -> None:
        expected, shift, page = 1, 0, self.settings.log.verify_page_events
        for row, following in _with_next(_rows(self.engine, page)):
            if row["seq"] != expected:
                last = row["seq"] - 1
                self.report.add(expected, f"missing{'' if last == expected else f' up to {last}'}")
            expected = row["seq"] + 1
            self.report.events += 1
            self.report.erased += bool(row["erased"])
            shift = self._check(row, following, shift)
            if self.report.events % page == 0:
                on_progress(self.report.events)

    def _check(self, row: Any, following: Any, shift: int) -> int:
        """Note what is wrong with a record; returns how far the records from here on are shifted."""
        problem = self._form(row)
        if problem is None and _fits(row, shift) is False:
            moved = self._offset(row, shift)
            if moved is not None and _fits(following, moved):
                self._add(row, _renumbered(row, shift, moved))
                return moved
            if moved is None and _fits(following, shift) is False and _fits(following, shift - 1):
                self._add(row, "inserted: what follows was renumbered")
                return shift - 1
            problem = "altered: its digest does not fit" if moved is None else f"moved: it was seq {row['seq'] + moved}"
        if problem is None and not row["known_id"] and row["recorded_at_us"] >= self._ids_since_us:
            problem = "its id is not remembered, so a retry would count twice"
        if problem is not None:
            self._add(row, problem)
        return shift

    def _form(self, row: Any) -> str | None:
        """What is wrong before any digest is taken."""
        if not row["erased"]:
            gone = row["body"] is None and row["seq"] > self._sealed_upto
            return "its body is missing" if gone else None
        if row["body"] is not None:
            return "marked erased, but its body is there"
        if row["body_digest"] is None or row["user_id"] is not None:
            return "marked erased, but not as an erasure does it"
        return None if row["seq"] in self._erased else "marked erased, but no erasure names it"

    def _offset(self, row: Any, shift: int) -> int | None:
        """How far away the place is that the record's digest fits; `None` when there is none."""
        near = [shift + step for size in range(1, NEAR + 1) for step in (size, -size)]
        found = next((offset for offset in [0, *near] if _fits(row, offset)), None)
        if found is not None or not self._searches:
            return found
        self._searches -= 1
        places = range(1 - row["seq"], self._last - row["seq"] + NEAR)
        return next((offset for offset in places if _fits(row, offset)), None)

    def _add(self, row: Any, problem: str) -> None:
        self.report.add(row["seq"], f"event {row['event_id']!r} ({row['kind']}): {problem}")


class ErasedRanges:
    """Which `seq` some ranges `[first, last]` name; ranges of different erasures do not overlap."""

    def __init__(self, ranges: Sequence[Sequence[int]]) -> None:
        self._ranges = sorted((first, last) for first, last in ranges)

    def __contains__(self, seq: int) -> bool:
        place = bisect.bisect_right(self._ranges, (seq, 1 << 62)) - 1
        return place >= 0 and seq <= self._ranges[place][1]


def _erased_ranges(engine: Engine, report: VerifyReport) -> list[Sequence[int]]:
    """Of finished erasures as the log tells them, of others as the database does."""
    with engine.connect() as connection:
        query = sa.select(erasures.c.events).where(erasures.c.state != "done")
        ranges = [r for found in connection.execute(query).scalars() for r in found]
    try:
        for recorded in EventLog(engine).scan(kinds=["erasure"]):
            ranges += recorded.event.body.get("events", ())
    except RayloopError as error:
        report.add(None, f"erasures cannot be read: {error}")
    return ranges


def _renumbered(row: Any, shift: int, moved: int) -> str:
    was = f"renumbered from seq {row['seq'] + moved}"
    if moved < shift:
        return f"{was}: {shift - moved} records were inserted before it"
    first = row["seq"] + shift
    lost = f"seq {first}" if moved == shift + 1 else f"seq {first} to {first + moved - shift - 1}"
    return f"{was}: {lost} was dropped before it"


def _fits(row: Any, offset: int) -> bool | None:
    """Whether a record's digest fits its content, were its `seq` this much larger; `None`: that cannot be told."""
    if row is None:
        return None
    recorded = recorded_event(row, body={})
    if row["erased"]:
        of_body = row["body_digest"]
        if of_body is None:
            return None
    elif row["body"] is None:
        return None
    else:
        try:
            of_body = body_digest(bytes(row["salt"]), recorded.event, decompress(bytes(row["body"])), row["arrays"])
        except ValueError:
            return False
    found = event_digest(recorded.seq + offset, recorded.recorded_at_us, recorded.event, bytes(of_body))
    return hmac.compare_digest(found, recorded.digest)


def _with_next(rows: Iterator[Any]) -> Iterator[tuple[Any, Any]]:
    return itertools.pairwise(itertools.chain(rows, [None]))


def _rows(engine: Engine, page: int) -> Iterator[Any]:
    """Every event with its body and whether its id is remembered, read in short pages."""
    same_id = (event_ids.c.tenant == events.c.tenant) & (event_ids.c.event_id == events.c.event_id)
    query = (
        sa.select(events, event_bodies.c.salt, event_bodies.c.body, event_bodies.c.arrays)
        .add_columns(event_ids.c.event_id.is_not(None).label("known_id"))
        .select_from(events.outerjoin(event_bodies, events.c.seq == event_bodies.c.seq).outerjoin(event_ids, same_id))
        .order_by(events.c.seq)
        .limit(page)
    )
    after = 0
    while True:
        with engine.connect() as connection:
            rows = connection.execute(query.where(events.c.seq > after)).mappings().all()
        if not rows:
            return
        yield from rows
        after = rows[-1]["seq"]


def _doubles(engine: Engine, settings: Settings) -> Iterator[tuple[int, str]]:
    """Events that carry an id another one carried within the window in which that may not be."""
    first, last = sa.func.min(events.c.recorded_at_us), sa.func.max(events.c.recorded_at_us)
    window_us = settings.log.event_id_window_days * DAY_US
    query = (
        sa.select(events.c.event_id, sa.func.min(events.c.seq), sa.func.max(events.c.seq))
        .group_by(events.c.tenant, events.c.event_id)
        .having((sa.func.count() > 1) & (last - first < window_us))
    )
    with engine.connect() as connection:
        for event_id, earlier, later in connection.execute(query):
            yield later, f"event {event_id!r}: duplicated: seq {earlier} has its id"


def _orphans(engine: Engine) -> Iterator[tuple[int | None, str]]:
    """Ids and bodies whose event is gone."""
    there = sa.select(events.c.tenant, events.c.event_id)
    ids = sa.select(event_ids.c.tenant, event_ids.c.event_id).except_(there)
    bodies = sa.select(event_bodies.c.seq).except_(sa.select(events.c.seq))
    with engine.connect() as connection:
        for tenant, event_id in connection.execute(ids):
            yield None, f"event {event_id!r} of tenant {tenant!r} was taken in and is gone"
        for (seq,) in connection.execute(bodies):
            yield None, f"the body of seq {seq} has no event"
