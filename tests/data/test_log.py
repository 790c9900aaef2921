import threading

from sqlalchemy.engine import Engine

from data.events import Event, parse_body
from data.log import EventLog


def thumbs(event_id: str, tenant: str = "acme") -> Event:
    body = parse_body("feedback", {"type": "thumbs_up"})
    return Event("feedback", tenant, "main", body, event_id=event_id, interaction_id="i1")


def test_append_gives_gapless_seq_and_reads_back_in_order(database: Engine) -> None:
    log = EventLog(database)
    verdicts = log.append([thumbs("a"), thumbs("b")]) + log.append([thumbs("c")])
    assert [v.seq for v in verdicts] == [1, 2, 3]
    assert [r.event.event_id for r in log.scan(page=2)] == ["a", "b", "c"]


def test_same_event_id_counts_once_per_tenant(database: Engine) -> None:
    log = EventLog(database)
    statuses = [v.status for v in log.append([thumbs("a"), thumbs("a"), thumbs("a", tenant="other")])]
    assert statuses == ["accepted", "duplicate", "accepted"]
    assert log.append([thumbs("a")])[0].status == "duplicate"
    assert log.last_seq() == 2


def test_token_arrays_survive_exactly(database: Engine) -> None:
    body = parse_body(
        "interaction",
        {
            "messages": [{"role": "user", "content": "naïve ✓"}],
            "prompt_token_ids": [1, 70_000],
            "completion_token_ids": [5],
            "completion_logprobs": [-0.5],
        },
    )
    log = EventLog(database)
    log.append([Event("interaction", "acme", "main", body)])
    assert log.read()[0].event.body == body


def test_cursor_reader_beside_many_writers_misses_nothing(database: Engine) -> None:
    log = EventLog(database)
    writers, per_writer = 4, 40

    def work(writer: int) -> None:
        for n in range(per_writer):
            log.append([thumbs(f"{writer}-{n}")])

    threads = [threading.Thread(target=work, args=(w,)) for w in range(writers)]
    for thread in threads:
        thread.start()
    seen: list[str] = []
    after = 0
    while any(t.is_alive() for t in threads) or after < log.last_seq():
        for recorded in log.read(after, 7):
            assert recorded.seq == after + 1
            after = recorded.seq
            seen.append(recorded.event.event_id)
    assert len(seen) == len(set(seen)) == writers * per_writer


def test_a_page_of_events_is_read_along_seq_without_sorting(sqlite_database: Engine) -> None:
    kinds = ("interaction", "feedback")
    page = EventLog(sqlite_database)._page(5, 10, kinds, "default")
    text = page.compile(sqlite_database, compile_kwargs={"literal_binds": True})
    with sqlite_database.connect() as connection:
        plan = [row[3] for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {text}")]
    assert not any("TEMP B-TREE" in step for step in plan), plan
