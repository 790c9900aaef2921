"""Checks the event log: sequence numbers without holes, digests that fit, ids and bodies in step.

What no single table can tell, for example that the newest events were cut off together with their ids,
needs the sealed partitions' roots.
"""

import hmac
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from cluster.settings import Settings
from cluster.tables import event_bodies, event_ids, events
from data.encoding import digest
from data.log import recorded_event


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong."""

    seq: int | None
    """Where; `None` for an id whose event is gone."""
    what: str


@dataclass(slots=True)
class VerifyReport:
    """What a check of the log found."""

    shown: int
    """How many faults are kept in words; all are counted."""
    events: int = 0
    erased: int = 0
    fault_count: int = 0
    faults: list[Fault] = field(default_factory=list)

    def add(self, seq: int | None, what: str) -> None:
        """Note a fault."""
        self.fault_count += 1
        if len(self.faults) < self.shown:
            self.faults.append(Fault(seq, what))

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "events": self.events,
            "erased": self.erased,
            "fault_count": self.fault_count,
            "faults": [{"seq": f.seq, "what": f.what} for f in self.faults],
        }


def verify_log(engine: Engine, settings: Settings, on_progress: Callable[[int], None] = lambda _: None) -> VerifyReport:
    """Read the whole log and name every record that was dropped or altered."""
    report = VerifyReport(settings.log.verify_shown_faults)
    expected = 1
    for row in _rows(engine, settings.log.verify_page_events):
        if row["seq"] != expected:
            last = row["seq"] - 1
            report.add(expected, f"missing{'' if last == expected else f' up to {last}'}")
        expected = row["seq"] + 1
        report.events += 1
        report.erased += bool(row["erased"])
        if problem := _problem(row):
            report.add(row["seq"], f"event {row['event_id']!r} ({row['kind']}): {problem}")
        if report.events % settings.log.verify_page_events == 0:
            on_progress(report.events)
    for problem in _orphans(engine):
        report.add(None, problem)
    return report


def _problem(row: Any) -> str | None:
    if row["erased"]:
        return None if row["body"] is None else "marked erased, but its body is there"
    if row["body"] is None:
        return "its body is missing"
    recorded = recorded_event(row, body={})
    salt, body, arrays = bytes(row["salt"]), bytes(row["body"]), row["arrays"]
    found = digest(recorded.seq, recorded.recorded_at_us, recorded.event, salt, body, arrays)
    if not hmac.compare_digest(found, bytes(row["digest"])):
        return "altered: its digest does not fit"
    return None if row["known_id"] else "its id is not remembered, so a retry would count twice"


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


def _orphans(engine: Engine) -> Iterator[str]:
    """Ids and bodies whose event is gone."""
    there = sa.select(events.c.tenant, events.c.event_id)
    ids = sa.select(event_ids.c.tenant, event_ids.c.event_id).except_(there)
    bodies = sa.select(event_bodies.c.seq).except_(sa.select(events.c.seq))
    with engine.connect() as connection:
        for tenant, event_id in connection.execute(ids):
            yield f"event {event_id!r} of tenant {tenant!r} was taken in and is gone"
        for (seq,) in connection.execute(bodies):
            yield f"the body of seq {seq} has no event"
