import asyncio
import contextlib
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from cluster.database import connect
from cluster.errors import OverloadedError, UnavailableError
from cluster.settings import load_settings
from cluster.settings.capture import LogSettings
from data.events import Event
from data.group_commit import GroupCommit
from data.log import EventLog, Verdict


def event(event_id: str) -> Event:
    return Event("feedback", "acme", "main", {"type": "thumbs_up"}, event_id=event_id)


class Stuck(EventLog):
    """A log whose first write waits for `gate`, and whose first `failures` writes fail."""

    def __init__(self, engine: Engine, failures: int = 0) -> None:
        super().__init__(engine)
        self.gate = threading.Event()
        self.entered = threading.Event()
        self.failures = failures
        self.batches: list[int] = []

    def append(self, batch: Sequence[Event]) -> list[Verdict]:
        self.entered.set()
        self.gate.wait(10)
        if self.failures:
            self.failures -= 1
            raise sa.exc.OperationalError("INSERT", {}, Exception("database is locked"))
        self.batches.append(len(batch))
        return super().append(batch)


def test_many_threads_share_few_transactions(database: Engine) -> None:
    log = EventLog(database)
    with GroupCommit(log, LogSettings(group_commit_ms=20)) as commit:

        def work(thread: int) -> None:
            for n in range(20):
                assert commit.append([event(f"{thread}-{n}")])[0].status == "accepted"

        threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert commit.counts.events == 160
        assert commit.counts.transactions <= 80
    assert sorted(r.event.event_id for r in log.scan()) == sorted(f"{t}-{n}" for t in range(8) for n in range(20))


def test_coroutines_get_their_own_verdicts(database: Engine) -> None:
    async def main(commit: GroupCommit) -> list[list[Verdict]]:
        batches = [[event("a"), event("b")], [event("b")], [event("c")]]
        return await asyncio.gather(*(asyncio.wrap_future(commit.submit(b)) for b in batches))

    with GroupCommit(EventLog(database), LogSettings()) as commit:
        statuses = [[v.status for v in verdicts] for verdicts in asyncio.run(main(commit))]
    assert statuses == [["accepted", "accepted"], ["duplicate"], ["accepted"]]


def test_full_queue_refuses_at_once_and_keeps_what_it_took(sqlite_database: Engine) -> None:
    log = Stuck(sqlite_database)
    commit = GroupCommit(log, LogSettings(group_commit_ms=0, queue_events=3, retry_after_s=2))
    first = commit.submit([event("first")])
    log.entered.wait(10)
    waiting = commit.submit([event("a"), event("b")])
    with pytest.raises(OverloadedError, match=r"log\.queue_events=3") as refused:
        commit.submit([event("c"), event("d")])
    assert refused.value.retry_after_s == 2
    assert commit.counts.refused == 2
    log.gate.set()
    commit.close()
    assert [v.seq for v in first.result() + waiting.result()] == [1, 2, 3]


def test_a_queue_that_was_full_is_told_in_the_log(sqlite_database: Engine) -> None:
    log = Stuck(sqlite_database)
    settings = LogSettings(group_commit_ms=0, queue_events=1)
    commit = GroupCommit(log, settings, lambda refused: event(f"refused-{refused}"))
    commit.submit([event("first")])
    log.entered.wait(10)
    commit.submit([event("a")])
    for _ in range(2):
        with pytest.raises(OverloadedError):
            commit.submit([event("b"), event("c")])
    log.gate.set()
    commit.close()
    assert [r.event.event_id for r in log.scan()] == ["first", "a", "refused-4"]


def test_close_writes_what_waits_and_then_refuses(database: Engine) -> None:
    commit = GroupCommit(EventLog(database), LogSettings(group_commit_ms=60_000))
    future = commit.submit([event("a")])
    commit.close()
    commit.close()
    assert future.result(0)[0].status == "accepted"
    with pytest.raises(UnavailableError, match="closing"):
        commit.submit([event("b")])


def test_locked_database_is_tried_again(sqlite_database: Engine) -> None:
    log = Stuck(sqlite_database, failures=2)
    log.gate.set()
    with GroupCommit(log, LogSettings()) as commit:
        assert commit.append([event("a")])[0].status == "accepted"


def test_unreachable_database_fails_the_future_and_the_next_may_pass(sqlite_database: Engine) -> None:
    log = Stuck(sqlite_database, failures=1_000)
    log.gate.set()
    with GroupCommit(log, LogSettings(retry_for_s=0.2)) as commit:
        with pytest.raises(UnavailableError, match="send the events again"):
            commit.append([event("a")])
        assert commit.counts.failed == 1
        log.failures = 0
        assert commit.append([event("a")])[0].status == "accepted"


def test_bad_event_fails_alone(database: Engine) -> None:
    log = Stuck(database)
    bad = Event("feedback", "acme", "main", {"not JSON": object()}, event_id="bad")
    with GroupCommit(log, LogSettings(group_commit_ms=0)) as commit:
        held = commit.submit([event("held")])
        log.entered.wait(10)
        futures = [commit.submit([e]) for e in (event("a"), bad, event("b"))]
        log.gate.set()
        assert held.result()[0].status == "accepted"
        assert futures[0].result()[0].status == futures[2].result()[0].status == "accepted"
        with pytest.raises(TypeError):
            futures[1].result()
    assert [r.seq for r in log.scan()] == [1, 2, 3]


def test_transaction_stays_under_its_limit(sqlite_database: Engine) -> None:
    log = Stuck(sqlite_database)
    with GroupCommit(log, LogSettings(group_commit_ms=0, group_commit_max_events=10)) as commit:
        futures = [commit.submit([event("held")])]
        log.entered.wait(10)
        futures += [commit.submit([event(f"{b}-{n}") for n in range(4)]) for b in range(6)]
        log.gate.set()
        for future in futures:
            future.result()
    assert log.batches == [1, 8, 8, 8]


def test_cancelled_future_does_not_harm_the_others(sqlite_database: Engine) -> None:
    with GroupCommit(EventLog(sqlite_database), LogSettings(group_commit_ms=50)) as commit:
        gone, stays = commit.submit([event("a")]), commit.submit([event("b")])
        gone.cancel()
        assert stays.result()[0].seq == 2


@pytest.mark.postgres
def test_connections_cut_by_the_server_lose_and_double_nothing(postgres_url: str, tmp_path: Path) -> None:
    settings = load_settings(home=tmp_path, database={"url": postgres_url})[0]
    engine = connect(settings)
    cut = sa.text(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    with GroupCommit(EventLog(engine), settings.log) as commit:
        futures = []
        for n in range(60):
            futures.append(commit.submit([event(f"{n}-{i}") for i in range(20)]))
            if n % 15 == 7:
                with contextlib.suppress(sa.exc.OperationalError), engine.connect() as connection:
                    connection.execute(cut)
            time.sleep(0.005)
        for future in futures:
            assert len(future.result(30)) == 20
    kept = [recorded.event.event_id for recorded in EventLog(engine).scan()]
    engine.dispose()
    assert sorted(kept) == sorted(f"{n}-{i}" for n in range(60) for i in range(20))
