from typing import Any

from sqlalchemy.engine import Engine

from cluster.settings import Settings, load_settings
from data.events import Event, parse_body
from data.log import EventLog
from data.signals import record_signals

SECOND = 1_000_000
HOUR = 3600 * SECOND
START = 1_800_000_000 * SECOND


def event(
    kind: str, at_s: float, body: dict[str, Any], session: str, interaction: str | None = None
) -> Event:
    return Event(
        kind,
        "default",
        "default",
        parse_body(kind, body),
        occurred_at_us=START + round(at_s * SECOND),
        session_id=session,
        interaction_id=interaction,
        user_id="u1",
        agent="triage",
    )


def interaction(name: str, at_s: float, session: str, query: str = "Where is my parcel?") -> Event:
    body = {
        "messages": [{"role": "user", "content": query}],
        "response": {"role": "assistant", "content": "word " * 238},
    }
    return event("interaction", at_s, body, session, name)


def behaviour(action: str, at_s: float, session: str, **fields: Any) -> Event:
    return event("behaviour", at_s, {"action": action, **fields}, session)


def found(log: EventLog) -> list[tuple[str | None, str, float]]:
    feedback = [r.event for r in log.scan(kinds=["feedback"])]
    assert all(e.body["source"] == "implicit" and e.body["reason"] and e.user_id == "u1" for e in feedback)
    return sorted((e.interaction_id, e.body["type"], e.body["reward"]) for e in feedback)


def test_ended_sessions_become_feedback_once(database: Engine, settings: Settings) -> None:
    log = EventLog(database)
    log.append([interaction("a", 0, "s1"), interaction("b", 1, "s2"), behaviour("copy", 20, "s1")])
    log.append(
        [
            behaviour("citation_click", 21, "s1"),
            behaviour("citation_click", 22, "s1"),
            behaviour("leave", 5, "s2"),
        ]
    )
    assert record_signals(log, settings, at_us=START + 60 * SECOND) == 0  # both may go on
    log.append([behaviour("session_end", 30, "s1")])
    assert record_signals(log, settings, at_us=START + 60 * SECOND) == 3
    assert record_signals(log, settings, at_us=START + 60 * SECOND) == 0
    assert record_signals(log, settings, at_us=START + HOUR) == 1  # s2 has been idle for too long
    assert record_signals(log, settings, at_us=START + 2 * HOUR) == 0
    expected = [
        ("a", "citation_click", 0.3),
        ("a", "citation_click", 0.3),
        ("a", "copy_response", 0.4),
        ("b", "abandonment", -0.8),
    ]
    assert found(log) == expected


def test_explicit_abandonment_is_not_counted_again(database: Engine, settings: Settings) -> None:
    log = EventLog(database)
    body = {"type": "abandonment", "source": "explicit", "reward": -0.8}
    log.append(
        [interaction("a", 0, "s1"), event("feedback", 4, body, "s1", "a"), behaviour("leave", 5, "s1")]
    )
    assert record_signals(log, settings, at_us=START + HOUR) == 0


def test_sessions_that_span_pages_are_seen_whole(database: Engine, settings: Settings) -> None:
    paged = load_settings(home=settings.home, log={"reader_page_events": 2})[0]
    log = EventLog(database)
    for n in range(5):
        session = f"s{n}"
        log.append(
            [interaction(f"a{n}", n, session), interaction(f"b{n}", n + 20, session, "where's my parcel")]
        )
    log.append([behaviour("session_end", 40 + n, f"s{n}") for n in range(5)])
    assert record_signals(log, paged, at_us=START + 60 * SECOND) == 5
    assert found(log) == [(f"a{n}", "reformulation", -0.5) for n in range(5)]


def test_long_log_is_read_with_few_sessions_open(sqlite_database: Engine, settings: Settings) -> None:
    paged = load_settings(home=settings.home, log={"reader_page_events": 10})[0]
    log = EventLog(sqlite_database)
    for n in range(50):
        log.append([interaction(f"a{n}", n * 3600, f"s{n}"), behaviour("leave", n * 3600 + 2, f"s{n}")])
    assert record_signals(log, paged, at_us=START + 49 * HOUR + 3 * SECOND) == 49
    assert log.cursor("signals/default") == 98  # only the last session is still open
    assert record_signals(log, paged, at_us=START + 60 * HOUR) == 1


def test_other_tenants_are_left_alone(sqlite_database: Engine, settings: Settings) -> None:
    log = EventLog(sqlite_database)
    log.append([interaction("a", 0, "s1"), behaviour("leave", 2, "s1")])
    other = load_settings(home=settings.home, tenant="other")[0]
    assert record_signals(log, other, at_us=START + HOUR) == 0
