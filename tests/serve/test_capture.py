"""Interactions when the log is away: nobody notices, the spool keeps them, and they come home."""

import functools
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Engine as Database

from cluster.clock import now_us
from cluster.database import connect
from cluster.settings import Settings
from cluster.settings.capture import LogSettings
from cluster.settings.serving import CaptureQueueSettings
from data.alerts import alert
from data.group_commit import GroupCommit
from data.log import EventLog
from serve.arms import Plan
from serve.capture import Capture, Record
from serve.keys import Key

KEY = Key("d", "k", "test", "default", "default", frozenset({"chat"}), None, 0, None, None)
LOG = LogSettings(retry_for_s=0.1)


def record(number: int) -> Record:
    request = {"messages": [{"role": "user", "content": "?"}]}
    return Record(
        f"i{number}",
        KEY,
        Plan("triage", "triage", "triage/1", None, "stable"),
        request,
        "text",
        None,
        None,
        None,
        at_us=now_us(),
    )


def test_a_filter_is_a_safety_flag_and_a_refusal_is_none() -> None:
    filtered, refused = record(1), record(2)
    filtered.answer.finish_reason = "content_filter"
    refused.answer.message = {"role": "assistant", "refusal": "I cannot help with that."}
    flags = [made.event().body["flags"]["safety"] for made in (filtered, refused)]
    assert flags == [True, False]


class BrokenLog(EventLog):
    """A log that can be out of reach."""

    down = True

    def append(self, batch):  # type: ignore[no-untyped-def]
        if self.down:
            raise sa.exc.OperationalError("insert", {}, Exception("the server is away"))
        return super().append(batch)


def logged(database: Database) -> list[str | None]:
    return [r.event.interaction_id for r in EventLog(database).scan(kinds=["interaction"])]


def wait(condition, within_s: float = 10.0) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    return tmp_path / "spool" / "router-0.jsonl"


@pytest.fixture
def capture(spool: Path) -> Iterator[Capture]:
    made = Capture(CaptureQueueSettings(retry_s=0.1), LOG, spool)
    yield made
    made.close()


def test_interactions_go_to_the_spool_while_the_log_is_away_and_come_home(
    capture: Capture, sqlite_database: Database, spool: Path
) -> None:
    log = BrokenLog(sqlite_database)
    with GroupCommit(log, LOG) as commit:
        capture.commit = commit
        for number in range(10):
            capture.offer(record(number))
        wait(lambda: spool.exists() and spool.read_text().count("\n") == 10)
        assert logged(sqlite_database) == []
        log.down = False
        wait(lambda: len(logged(sqlite_database)) == 10)
        capture.offer(record(10))
        wait(lambda: len(logged(sqlite_database)) == 11)
        assert sorted(logged(sqlite_database)) == sorted(f"i{n}" for n in range(11))  # type: ignore[type-var]
        wait(lambda: not spool.exists())


def test_spool_of_a_dead_router_is_taken_over(settings: Settings, spool: Path) -> None:
    first = Capture(CaptureQueueSettings(retry_s=0.1), LOG, spool.with_name("router-999999999.jsonl"))
    first.offer(record(1))
    first.close()
    database = connect(settings)
    second = Capture(CaptureQueueSettings(retry_s=0.1), LOG, spool)
    with GroupCommit(EventLog(database), LOG) as commit:
        second.commit = commit
        wait(lambda: logged(database) == ["i1"])
        second.close()
    assert list(spool.parent.iterdir()) == []
    database.dispose()


@pytest.mark.parametrize("claimant", [999999999, os.getpid()], ids=["gone", "alive"])
def test_claim_of_a_router_that_died_while_taking_over_is_taken_over(
    sqlite_database: Database, spool: Path, claimant: int
) -> None:
    first = Capture(CaptureQueueSettings(retry_s=0.1), LOG, spool.with_name("router-999999998.jsonl"))
    first.offer(record(1))
    first.offer(record(2))
    first.close()
    left = spool.with_name("router-999999998.jsonl")
    left.rename(spool.with_name(f"router-999999998.x.router-{claimant}.claimed"))
    spool.with_name("router-1.jsonl").write_bytes(b"")  # process 1 lives: its file is left alone
    second = Capture(CaptureQueueSettings(retry_s=0.1), LOG, spool)
    with GroupCommit(EventLog(sqlite_database), LOG) as commit:
        second.commit = commit
        wait(lambda: logged(sqlite_database) == ["i1", "i2"])
        second.close()
    assert [p.name for p in spool.parent.iterdir()] == ["router-1.jsonl"]


def test_claim_copied_but_not_removed_counts_once(sqlite_database: Database, spool: Path) -> None:
    first = Capture(CaptureQueueSettings(retry_s=0.1), LOG, spool)
    first.offer(record(1))
    first.close()
    spool.with_name("router-999999998.x.router-999999999.claimed").write_bytes(spool.read_bytes())
    second = Capture(CaptureQueueSettings(retry_s=0.1), LOG, spool)
    with GroupCommit(EventLog(sqlite_database), LOG) as commit:
        second.commit = commit
        wait(lambda: list(spool.parent.iterdir()) == [])
        second.close()
    assert logged(sqlite_database) == ["i1"]


def test_claim_that_ends_in_half_a_line_spoils_no_other(sqlite_database: Database, spool: Path) -> None:
    for number in (1, 2):
        made = Capture(CaptureQueueSettings(retry_s=0.1), LOG, spool.parent / str(number) / "router-0.jsonl")
        made.offer(record(number))
        made.close()
    for number, tail in ((1, b'{"kind": "inter'), (2, b"")):
        lines = (spool.parent / str(number) / "router-0.jsonl").read_bytes()
        spool.with_name(f"router-99999999{number}.jsonl").write_bytes(lines + tail)
    second = Capture(CaptureQueueSettings(retry_s=0.1), LOG, spool)
    with GroupCommit(EventLog(sqlite_database), LOG) as commit:
        second.commit = commit
        wait(lambda: sorted(filter(None, logged(sqlite_database))) == ["i1", "i2"])
        second.close()


def test_interaction_the_log_cannot_hold_takes_no_other_with_it(capture: Capture, sqlite_database: Database) -> None:
    deep: object = "x"
    for _ in range(400):
        deep = [deep]
    with GroupCommit(EventLog(sqlite_database), LOG) as commit:
        for number in range(3):
            made = record(number)
            if number == 1:
                made.request = {"messages": [{"role": "user", "content": deep}]}
            capture.offer(made)
        capture.commit = commit
        wait(lambda: logged(sqlite_database) == ["i0", "i2"])


def test_half_a_line_in_the_spool_does_not_stop_the_rest(settings: Settings, spool: Path) -> None:
    first = Capture(CaptureQueueSettings(retry_s=0.1), LOG, spool)
    first.offer(record(1))
    first.offer(record(2))
    first.close()
    spool.write_bytes(b'{"kind": "interac\n' + spool.read_bytes()[:-9])
    database = connect(settings)
    second = Capture(CaptureQueueSettings(retry_s=0.1), LOG, spool)
    with GroupCommit(EventLog(database), LOG) as commit:
        second.commit = commit
        wait(lambda: logged(database) == ["i1"])
        wait(lambda: not spool.exists())
        second.close()
    database.dispose()


def test_full_ring_loses_and_counts_but_never_waits(spool: Path) -> None:
    from cluster import metrics

    lost = metrics.CAPTURED.labels("lost")
    before = lost._value.get()
    capture = Capture(CaptureQueueSettings(queue_events=3, spool_max_mb=1), LOG, spool)
    capture._closing = True
    capture._wake.set()
    capture._thread.join()
    for number in range(5):
        capture.offer(record(number))
    assert lost._value.get() - before == 2


def test_a_spool_that_begins_and_interactions_that_are_lost_are_told_in_the_log(
    sqlite_database: Database, spool: Path, settings: Settings
) -> None:
    log = BrokenLog(sqlite_database)
    tell = functools.partial(alert, settings)
    capture = Capture(CaptureQueueSettings(retry_s=0.1, queue_events=5, linger_ms=200), LOG, spool, tell)
    with GroupCommit(log, LOG) as commit:
        capture.commit = commit
        for number in range(8):
            capture.offer(record(number))
        wait(lambda: spool.exists() and spool.stat().st_size > 0)
        log.down = False
        wait(lambda: len(logged(sqlite_database)) == 5)
        capture.offer(record(9))
        wait(lambda: len(logged(sqlite_database)) == 6)
        capture.close()
    told = {r.event.body["name"]: r.event.body for r in log.scan(kinds=["operator.alert"])}
    assert set(told) == {"spool", "interactions_lost"}
    assert told["interactions_lost"]["facts"] == {"lost": 3}
    assert str(spool) in told["spool"]["reason"]
