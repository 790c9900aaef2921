from collections.abc import Callable

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from cluster.settings import Settings
from cluster.tables import event_bodies, event_ids, events
from data.events import Event, parse_body
from data.log import EventLog
from data.verify import Fault, verify_log

Tamper = Callable[[Connection], object]


@pytest.fixture
def filled(database: Engine) -> Engine:
    log = EventLog(database)
    body = parse_body(
        "interaction", {"messages": [{"role": "user", "content": "x" * 2000}], "prompt_token_ids": [1, 2]}
    )
    log.append([Event("interaction", "acme", "main", body, event_id="e1", interaction_id="e1", user_id="ada")])
    log.append([Event("feedback", "acme", "main", {"type": "thumbs_up"}, event_id=f"e{n}") for n in range(2, 7)])
    return database


def test_untouched_log_has_no_faults(filled: Engine, settings: Settings) -> None:
    report = verify_log(filled, settings)
    assert (report.events, report.erased, report.fault_count) == (6, 0, 0)


def test_empty_log_has_no_faults(database: Engine, settings: Settings) -> None:
    assert verify_log(database, settings).as_dict() == {
        "events": 0,
        "erased": 0,
        "fault_count": 0,
        "faults": [],
    }


def at(seq: int) -> sa.ColumnElement[bool]:
    return events.c.seq == seq


ALTERED = "altered: its digest does not fit"


@pytest.mark.parametrize(
    ("tamper", "faults"),
    [
        (
            lambda c: c.execute(
                event_bodies.update().where(event_bodies.c.seq == 3).values(body=b'{"type":"thumbs_down"}')
            ),
            [Fault(3, f"event 'e3' (feedback): {ALTERED}")],
        ),
        (
            lambda c: c.execute(events.update().where(at(1)).values(user_id="eve")),
            [Fault(1, f"event 'e1' (interaction): {ALTERED}")],
        ),
        (
            lambda c: c.execute(events.update().where(at(4)).values(occurred_at_us=7)),
            [Fault(4, f"event 'e4' (feedback): {ALTERED}")],
        ),
        (
            lambda c: c.execute(events.delete().where(at(2) | at(3))),
            [
                Fault(2, "missing up to 3"),
                Fault(None, "event 'e2' of tenant 'acme' was taken in and is gone"),
                Fault(None, "event 'e3' of tenant 'acme' was taken in and is gone"),
                Fault(None, "the body of seq 2 has no event"),
                Fault(None, "the body of seq 3 has no event"),
            ],
        ),
        (
            lambda c: c.execute(event_bodies.delete().where(event_bodies.c.seq == 5)),
            [Fault(5, "event 'e5' (feedback): its body is missing")],
        ),
        (
            lambda c: c.execute(events.update().where(at(5)).values(erased=True)),
            [Fault(5, "event 'e5' (feedback): marked erased, but its body is there")],
        ),
        (
            lambda c: c.execute(event_ids.delete().where(event_ids.c.event_id == "e6")),
            [Fault(6, "event 'e6' (feedback): its id is not remembered, so a retry would count twice")],
        ),
    ],
)
def test_tampering_is_found_and_named(filled: Engine, settings: Settings, tamper: Tamper, faults: list[Fault]) -> None:
    with filled.begin() as connection:
        tamper(connection)
    found = verify_log(filled, settings).faults
    assert found[:1] == faults[:1]
    assert sorted(f.what for f in found) == sorted(f.what for f in faults)


def test_swapped_records_are_found(filled: Engine, settings: Settings) -> None:
    with filled.begin() as connection:
        for table in (events, event_bodies):
            for old, new in ((2, 99), (3, 2), (99, 3)):
                connection.execute(table.update().where(table.c.seq == old).values(seq=new))
    assert [f.seq for f in verify_log(filled, settings).faults] == [2, 3]


def test_erased_event_is_no_fault(filled: Engine, settings: Settings) -> None:
    with filled.begin() as connection:
        connection.execute(event_bodies.delete().where(event_bodies.c.seq == 1))
        connection.execute(events.update().where(at(1)).values(erased=True, user_id=None))
    report = verify_log(filled, settings)
    assert (report.erased, report.fault_count) == (1, 0)
