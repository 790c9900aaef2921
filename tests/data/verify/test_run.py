from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from cluster.settings import Settings, load_settings
from cluster.tables import event_bodies, event_ids, events, partitions
from data.events import Event, parse_body
from data.log import EventLog
from data.seal import seal as seal_days
from data.verify.report import Fault, VerifyReport
from data.verify.run import verify_log
from tests.data.days import AFTER_US, three_days
from tests.data.verify import tampers

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
        "partitions": 0,
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


def test_event_marked_erased_without_an_erasure_is_found(filled: Engine, settings: Settings) -> None:
    with filled.begin() as connection:
        connection.execute(event_bodies.delete().where(event_bodies.c.seq == 1))
        connection.execute(events.update().where(at(1)).values(erased=True, user_id=None, body_digest=b"x" * 32))
    report = verify_log(filled, settings)
    assert report.faults == [Fault(1, "event 'e1' (interaction): marked erased, but no erasure names it")]


VICTIM = 31


@pytest.fixture
def small_pages(tmp_path: Path) -> Settings:
    return load_settings(home=tmp_path / "home", seal={"page_events": 13}, log={"verify_page_events": 17})[0]


def named(report: VerifyReport) -> set[int]:
    return {fault.seq for fault in report.faults if fault.seq is not None}


def named_after_each(database: Engine, settings: Settings, tamper_all: Iterable[Any]) -> dict[str, set[int]]:
    """What is named after each way of tampering with the victim, the tables put back in between."""
    tables = (events, event_bodies, event_ids)
    with database.connect() as connection:
        kept = [(table, [dict(row) for row in connection.execute(sa.select(table)).mappings()]) for table in tables]
    found = {}
    for tamper in tamper_all:
        with database.begin() as connection:
            tamper(connection, VICTIM)
        report = verify_log(database, settings)
        assert report.fault_count <= 12, tamper.__name__
        found[tamper.__name__] = named(report)
        with database.begin() as connection:
            for table, rows in kept:
                connection.execute(table.delete())
                connection.execute(table.insert(), rows)
    assert verify_log(database, settings).fault_count == 0
    return found


def expected(tamper: Any) -> set[int]:
    """Where the fault lies; a record more or less is noticed at the next, and a swap has two places."""
    special: dict[Any, set[int]] = {
        tampers.drop_and_close_the_gap: {VICTIM},
        tampers.duplicate: {VICTIM + 1},
        tampers.swap: {VICTIM, VICTIM + 1},
        tampers.swap_bodies: {VICTIM, VICTIM + 1},
        tampers.swap_far: {VICTIM, VICTIM // 2},
    }
    return special.get(tamper, {VICTIM})


def test_one_tampered_record_of_the_open_log_is_named(database: Engine, small_pages: Settings) -> None:
    three_days(database, 30)
    found = named_after_each(database, small_pages, tampers.IN_DATABASE)
    assert found == {t.__name__: expected(t) for t in tampers.IN_DATABASE}


@pytest.mark.parametrize("keep_days", [7, 0], ids=["bodies kept", "bodies gone"])
def test_one_tampered_record_of_a_sealed_day_is_named(database: Engine, small_pages: Settings, keep_days: int) -> None:
    three_days(database, 30)
    seal = small_pages.seal.model_copy(update={"keep_days": keep_days})
    seal_days(database, small_pages.model_copy(update={"seal": seal}), AFTER_US)
    found = named_after_each(database, small_pages, tampers.IN_DATABASE)
    print(found)
    harmless = {tampers.drop_body, *(tampers.OF_BODIES if keep_days == 0 else ())}
    for tamper in tampers.IN_DATABASE:
        if tamper in harmless:
            assert found[tamper.__name__] == set()
        else:
            assert expected(tamper) & found[tamper.__name__], tamper.__name__


def test_one_tampered_record_of_a_file_is_named(database: Engine, small_pages: Settings) -> None:
    three_days(database, 30)
    seal_days(database, small_pages, AFTER_US)
    victim = VICTIM + 5
    partition = tampers.partition_of(database, victim)
    path = Path(partition.location, partition.path)
    content = path.read_bytes()
    for tamper in tampers.IN_FILE:
        tampers.tamper_with_file(partition, tamper, victim)
        report = verify_log(database, small_pages)
        print(tamper.__name__, report.faults)
        places = {victim, victim - 1} if tamper is tampers.file_swap else {victim}
        assert named(report) <= places and named(report), tamper.__name__
        assert any("is not the one that was sealed" in fault.what for fault in report.faults)
        path.write_bytes(content)


def test_record_rewritten_with_its_digest_is_told_by_the_roots(database: Engine, small_pages: Settings) -> None:
    three_days(database, 30)
    seal_days(database, small_pages, AFTER_US)
    with database.begin() as connection:
        tampers.rewrite_in_database(connection, VICTIM)
    whats = [f.what for f in verify_log(database, small_pages).faults]
    assert any("file and log differ in digest" in what for what in whats)
    assert any("the records of the log do not have its Merkle root" in what for what in whats)


def test_file_rewritten_with_its_digests_is_told_by_the_roots(database: Engine, small_pages: Settings) -> None:
    three_days(database, 30)
    seal_days(database, small_pages, AFTER_US)
    tampers.tamper_with_file(tampers.partition_of(database, VICTIM), tampers.rewrite_in_file, VICTIM)
    report = verify_log(database, small_pages)
    assert named(report) == {VICTIM}
    assert any("the records of the file do not have its Merkle root" in f.what for f in report.faults)


def test_missing_file_and_damaged_file_are_named_and_the_rest_is_read(database: Engine, small_pages: Settings) -> None:
    three_days(database, 30)
    first, second, _ = seal_days(database, small_pages, AFTER_US).partitions
    Path(first.location, first.path).unlink()
    path = Path(second.location, second.path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    report = verify_log(database, small_pages)
    assert report.partitions == 3
    text = " ".join(f.what for f in report.faults)
    assert f"partition {first.name}" in text
    assert f"partition {second.name}: the file {second.path} is not the one that was sealed" in text


def test_partition_that_is_registered_no_more_is_missed(database: Engine, small_pages: Settings) -> None:
    three_days(database, 30)
    first = seal_days(database, small_pages, AFTER_US).partitions[0]
    with database.begin() as connection:
        connection.execute(partitions.delete().where(partitions.c.day == first.day))
    whats = [f.what for f in verify_log(database, small_pages).faults]
    assert whats == [f"partition {first.day} after seq 0 was sealed and is no longer registered"]
