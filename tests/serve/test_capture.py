"""Interactions when the log is away: nobody notices, the spool keeps them, and they come home."""

import errno
import functools
import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Engine as Database

from cluster import metrics
from cluster.clock import now_us
from cluster.settings import Settings
from cluster.settings.capture import LogSettings
from cluster.settings.serving import CaptureQueueSettings
from data.alerts import alert
from data.group_commit import GroupCommit
from data.log import EventLog
from data.spool import SpoolFile, spool_files
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


def wait(condition, within_s: float = 30.0) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def started(home: Path, **settings: Any) -> Capture:
    return Capture(CaptureQueueSettings(**{"retry_s": 0.1, "linger_ms": 1} | settings), LOG, home)


def spooled_by_one_that_ended(home: Path, *numbers: int) -> Path:
    """The file of a router that never reached the log."""
    capture, before = started(home), set(spool_files(home))
    for number in numbers:
        capture.offer(record(number))
    capture.close()
    (path,) = set(spool_files(home)) - before
    return path


@pytest.fixture
def capture(tmp_path: Path) -> Iterator[Capture]:
    made = started(tmp_path)
    yield made
    made.close()


def test_interactions_go_to_the_spool_while_the_log_is_away_and_come_home(
    capture: Capture, sqlite_database: Database, tmp_path: Path
) -> None:
    log = BrokenLog(sqlite_database)
    with GroupCommit(log, LOG) as commit:
        capture.commit = commit
        for number in range(10):
            capture.offer(record(number))
        wait(lambda: sum(path.read_text().count("\n") for path in spool_files(tmp_path)) == 10)
        assert logged(sqlite_database) == []
        log.down = False
        wait(lambda: len(logged(sqlite_database)) == 10)
        capture.offer(record(10))
        wait(lambda: len(logged(sqlite_database)) == 11)
        assert sorted(logged(sqlite_database)) == sorted(f"i{n}" for n in range(11))  # type: ignore[type-var]
        wait(lambda: spool_files(tmp_path) == [])


def test_what_a_dead_router_left_comes_home_once_and_its_half_line_spoils_no_other(
    sqlite_database: Database, tmp_path: Path
) -> None:
    torn = spooled_by_one_that_ended(tmp_path, 1, 2)
    torn.write_bytes(b'{"kind": "interac\n' + torn.read_bytes()[:-9])
    spooled_by_one_that_ended(tmp_path / "other", 3).rename(tmp_path / "spool" / "router-7.jsonl")
    twice = (tmp_path / "spool" / "router-7.jsonl").read_bytes()
    (tmp_path / "spool" / "router-8.jsonl").write_bytes(twice)  # was being brought home when its router died
    second = started(tmp_path)
    with GroupCommit(EventLog(sqlite_database), LOG) as commit:
        second.commit = commit
        wait(lambda: spool_files(tmp_path) == [])
        second.close()
    assert sorted(filter(None, logged(sqlite_database))) == ["i1", "i3"]


def test_spool_of_a_living_router_is_left_alone_whatever_its_process_is(tmp_path: Path) -> None:
    first, second = started(tmp_path), started(tmp_path)  # as in two pods: one folder, one process number
    for number, capture in enumerate((first, second)):
        capture.offer(record(number))
    wait(lambda: len(spool_files(tmp_path)) == 2)
    third = started(tmp_path)
    third.offer(record(2))
    wait(lambda: len(spool_files(tmp_path)) == 3)
    assert [capture._spool._left for capture in (first, second, third)] == [[], [], []]
    second.close()
    third._spool.adopt()
    assert len(third._spool._left) == 1
    for capture in (first, third):
        capture.close()


def test_router_that_dies_while_it_brings_a_spool_home_leaves_it_to_the_next(tmp_path: Path) -> None:
    path = spooled_by_one_that_ended(tmp_path, 1)
    dying = SpoolFile.claim(path)
    assert dying is not None
    assert len(dying.read(10)[0]) == 1
    assert SpoolFile.claim(path) is None
    dying.close()  # as the kernel does
    assert SpoolFile.claim(path) is not None


def test_file_that_was_replaced_is_not_claimed_by_its_old_self(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = spooled_by_one_that_ended(tmp_path, 1)
    other = spooled_by_one_that_ended(tmp_path / "other", 2)
    real_open = os.open

    def open_and_lose(name: Any, *more: Any) -> int:
        descriptor = real_open(name, *more)
        os.replace(other, path)
        return descriptor

    with monkeypatch.context() as patched:
        patched.setattr("data.spool.os.open", open_and_lose)
        assert SpoolFile.claim(path) is None
    assert SpoolFile.claim(path) is not None


def test_full_disk_loses_and_counts_and_what_follows_is_kept(
    tmp_path: Path, settings: Settings, sqlite_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = True
    real_write = os.pwrite

    def write_half(descriptor: int, data: Any, offset: int) -> int:
        if full and len(data) > 10:
            return real_write(descriptor, data[:10], offset)
        if full:
            raise OSError(errno.ENOSPC, "no space left on device")
        return real_write(descriptor, data, offset)

    monkeypatch.setattr("data.spool.os.pwrite", write_half)
    capture = Capture(CaptureQueueSettings(retry_s=0.1), LOG, tmp_path, functools.partial(alert, settings))
    lost = metrics.CAPTURED.labels("lost")
    before = lost._value.get()
    capture.offer(record(1))
    wait(lambda: lost._value.get() > before)
    full = False
    capture.offer(record(2))
    wait(lambda: capture._spool.size > 0)
    with GroupCommit(EventLog(sqlite_database), LOG) as commit:
        capture.commit = commit
        wait(lambda: logged(sqlite_database) == ["i2"])
        capture.offer(record(3))
        wait(lambda: len(logged(sqlite_database)) == 2)
        capture.close()
    told = {r.event.body["name"] for r in EventLog(sqlite_database).scan(kinds=["operator.alert"])}
    assert told == {"spool", "interactions_lost"}


@pytest.mark.parametrize("place", ["adopt", "add", "read", "forget"])
def test_thread_outlives_any_failure_of_the_spool_and_says_so(
    place: str, tmp_path: Path, settings: Settings, sqlite_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("surprise")

    log, numbers = BrokenLog(sqlite_database), itertools.count()
    limits = CaptureQueueSettings(retry_s=0.05, linger_ms=1)

    def told_while_more_comes() -> set[str]:
        capture.offer(record(next(numbers)))
        return {r.event.body["name"] for r in log.scan(kinds=["operator.alert"])}

    with monkeypatch.context() as patched, GroupCommit(log, LOG) as commit:
        patched.setattr(f"serve.capture.Spool.{place}", fail)
        capture = Capture(limits, LOG, tmp_path, functools.partial(alert, settings))
        capture.commit = commit
        capture.offer(record(next(numbers)))
        wait(lambda: capture._retry_at > 0)  # the log was asked, so the spool is next
        log.down = False
        wait(lambda: "capture_failed" in told_while_more_comes())
        patched.undo()
        capture.offer(record(1_000_000))
        wait(lambda: "i1000000" in logged(sqlite_database))
        capture.close()


def test_file_that_cannot_be_read_is_put_back_and_the_others_come_home(
    tmp_path: Path, sqlite_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, _ = sorted([spooled_by_one_that_ended(tmp_path, 1), spooled_by_one_that_ended(tmp_path, 2)])
    real_read = SpoolFile.read

    def read(self: SpoolFile, limit: int) -> Any:
        if self.path == bad:
            raise OSError(errno.EIO, "input/output error")
        return real_read(self, limit)

    monkeypatch.setattr(SpoolFile, "read", read)
    capture = started(tmp_path)
    with GroupCommit(EventLog(sqlite_database), LOG) as commit:
        capture.commit = commit
        wait(lambda: spool_files(tmp_path) == [bad])
        monkeypatch.undo()
        capture._adopt_at = 0.0
        wait(lambda: spool_files(tmp_path) == [])
        capture.close()
    assert sorted(filter(None, logged(sqlite_database))) == ["i1", "i2"]


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


def test_full_ring_loses_and_counts_but_never_waits(tmp_path: Path) -> None:
    lost = metrics.CAPTURED.labels("lost")
    before = lost._value.get()
    capture = started(tmp_path, queue_events=3, spool_max_mb=1)
    capture._closing = True
    capture._wake.set()
    capture._thread.join()
    for number in range(5):
        capture.offer(record(number))
    assert lost._value.get() - before == 2


def test_a_spool_that_begins_and_interactions_that_are_lost_are_told_in_the_log(
    sqlite_database: Database, tmp_path: Path, settings: Settings
) -> None:
    log = BrokenLog(sqlite_database)
    tell = functools.partial(alert, settings)
    capture = Capture(CaptureQueueSettings(retry_s=0.1, queue_events=5, linger_ms=200), LOG, tmp_path, tell)
    with GroupCommit(log, LOG) as commit:
        capture.commit = commit
        for number in range(8):
            capture.offer(record(number))
        wait(lambda: spool_files(tmp_path) != [])
        log.down = False
        wait(lambda: len(logged(sqlite_database)) == 5)
        capture.offer(record(9))
        wait(lambda: len(logged(sqlite_database)) == 6)
        capture.close()
    told = {r.event.body["name"]: r.event.body for r in log.scan(kinds=["operator.alert"])}
    assert set(told) == {"spool", "interactions_lost"}
    assert told["interactions_lost"]["facts"] == {"lost": 3}
    assert str(tmp_path / "spool") in told["spool"]["reason"]
