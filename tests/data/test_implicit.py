import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.settings import Settings, load_settings
from data.events import Event
from data.implicit import (
    Action,
    Session,
    Signal,
    Turn,
    implicit_reward,
    session_signals,
    signals_of,
    split_sessions,
)

SECOND = 1_000_000
SETTINGS = load_settings()[0]
ONE_MINUTE = "word " * 238  # expected reading time: 60 s
QUESTIONS = {"a": "Where is my parcel?", "b": "Who sells chairs?", "c": "Why so late?", "d": "How much?"}


def turn(name: str, at_s: float, query: str = "", answer: str = ONE_MINUTE, asked_s: float | None = None) -> Turn:
    began_s = at_s if asked_s is None else asked_s
    return Turn(name, query or QUESTIONS[name], answer, round(at_s * SECOND), round(began_s * SECOND))


def act(
    action: str, at_s: float, on: str | None = None, duration_s: float | None = None, text: str | None = None
) -> Action:
    return Action(action, round(at_s * SECOND), on, duration_s, text)


def types(
    turns: list[Turn], actions: list[Action], explicit: dict[str, set[str]] | None = None
) -> dict[str, list[str]]:
    session = Session(tuple(turns), tuple(actions))
    found = session_signals(session, explicit or {}, SETTINGS.implicit)
    return {name: [s.type for s in signals] for name, signals in found.items()}


END = act("session_end", 100)


def test_copy_within_three_seconds_is_a_quick_accept_too() -> None:
    assert types([turn("a", 0)], [act("copy", 3), END]) == {"a": ["quick_accept", "copy_response"]}
    assert types([turn("a", 0)], [act("copy", 3.1), END]) == {"a": ["copy_response"]}


def test_a_session_begins_with_its_first_question() -> None:
    brief = [act("copy", 2), act("session_end", 4)]
    assert types([turn("a", 0)], brief) == {"a": ["copy_response"]}
    assert types([turn("a", 0, asked_s=-6)], brief) == {"a": ["quick_accept", "copy_response"]}


def test_time_measured_by_the_client_beats_the_clocks() -> None:
    assert types([turn("a", 0)], [act("copy", 50, duration_s=2), END]) == {"a": ["quick_accept", "copy_response"]}


def test_several_copies_count_once_and_each_source_counts() -> None:
    actions = [act("copy", 5), act("copy", 6), act("citation_click", 7), act("citation_click", 8), END]
    assert types([turn("a", 0)], actions) == {"a": ["copy_response", "citation_click", "citation_click"]}


def test_reading_four_fifths_of_the_expected_time_is_thorough() -> None:
    assert types([turn("a", 0)], [act("read", 60, duration_s=48), END]) == {"a": ["thorough_read"]}
    assert types([turn("a", 0)], [act("read", 60, duration_s=47.9), END]) == {}
    parts = [act("read", 30, duration_s=24), act("read", 60, duration_s=24), END]
    assert types([turn("a", 0)], parts) == {"a": ["thorough_read"]}


def test_empty_answer_is_never_read_thoroughly() -> None:
    assert types([turn("a", 0, answer="")], [act("read", 60, duration_s=48), END]) == {}


def test_asking_the_same_again_counts_against_the_first_answer() -> None:
    turns = [turn("a", 0, "How do I reset my password?"), turn("b", 20, "how can i reset my password")]
    assert types(turns, [END]) == {"a": ["reformulation"]}
    turns[1] = turn("b", 20, "Do you sell garden chairs?")
    assert types(turns, [END]) == {}


def test_a_message_says_it_before_the_next_turn_does() -> None:
    question = "How do I reset my password?"
    said = act("message", 5, text="how can i reset my password")
    assert types([turn("a", 0, question)], [said, END]) == {"a": ["reformulation"]}


def test_leaving_before_half_the_reading_time_is_abandonment() -> None:
    assert types([turn("a", 0)], [act("leave", 29.9)]) == {"a": ["abandonment"]}
    assert types([turn("a", 0)], [act("leave", 30)]) == {}
    assert types([turn("a", 0), turn("b", 20)], [act("leave", 21)]) == {"b": ["abandonment"]}


def test_abandonment_counts_once_and_gives_way_to_any_other_sign() -> None:
    assert types([turn("a", 0)], [act("leave", 20), act("leave", 21)]) == {"a": ["abandonment"]}
    assert types([turn("a", 0)], [act("copy", 10), act("leave", 20)]) == {"a": ["copy_response"]}
    assert types([turn("a", 0)], [act("leave", 20)], {"a": {"abandonment"}}) == {}
    assert types([turn("a", 0)], [act("leave", 20)], {"a": {"thumbs_up"}}) == {}


def test_short_session_gives_no_accept_or_read_signals() -> None:
    short = turn("a", 0, answer="word " * 10)
    assert types([short], [act("copy", 1), act("read", 9, duration_s=9)]) == {"a": ["copy_response"]}


def test_action_without_an_interaction_is_about_the_last_answer() -> None:
    assert types([turn("a", 0), turn("b", 20)], [act("copy", 10), END]) == {"a": ["copy_response"]}
    assert types([turn("a", 0), turn("b", 20)], [act("copy", 30, on="a"), END]) == {"a": ["copy_response"]}


def test_session_ends_by_word_or_by_thirty_idle_minutes() -> None:
    turns = [turn("a", 0), turn("b", 1800), turn("c", 1800 + 1801), turn("d", 3700)]
    sessions = split_sessions(turns, [act("session_end", 3650)], SETTINGS.implicit)
    assert [[t.interaction_id for t in s.turns] for s in sessions] == [["a", "b"], ["c"], ["d"]]


def test_rewards_are_summed_and_clamped() -> None:
    def total(*names: str) -> float:
        return implicit_reward([Signal(n, "") for n in names], SETTINGS)

    assert total("quick_accept", "reformulation") == pytest.approx(0.1)
    assert total("quick_accept", "copy_response", "thorough_read") == 1.0
    assert total("reformulation", "abandonment") == -1.0
    assert total() == 0.0


def event(kind: str, at_s: float, body: dict[str, object], interaction: str | None = None, **ids: str) -> Event:
    at_us = round(at_s * SECOND)
    return Event(kind, "acme", "main", body, occurred_at_us=at_us, interaction_id=interaction, **ids)


def interaction(name: str, at_s: float, query: str, **ids: str) -> Event:
    messages = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": [{"type": "text", "text": query}]},
    ]
    body = {"messages": messages, "response": {"role": "assistant", "content": ONE_MINUTE}, "latency_s": 1.0}
    return event("interaction", at_s, body, name, **ids)


def test_events_become_signals_by_session() -> None:
    events = [
        interaction("a", 0, "How do I reset my password?", session_id="s1"),
        interaction("b", 30, "how can i reset my password", session_id="s1"),
        interaction("c", 30, "how can i reset my password", session_id="s2"),
        event("behaviour", 90, {"action": "copy"}, session_id="s1"),
        event("behaviour", 31, {"action": "leave", "duration_s": 2.0}, "c"),
        event("feedback", 99, {"type": "thumbs_up", "source": "explicit"}, "a"),
    ]
    found = signals_of(reversed(events), SETTINGS)
    assert {n: [s.type for s in signals] for n, signals in found.items()} == {
        "a": ["reformulation"],
        "b": ["copy_response"],
        "c": ["abandonment"],
    }
    assert found["c"][0].reason == "the user left after 2.0 s of 60.0 s expected"


def test_two_tenants_with_one_session_name_stay_apart() -> None:
    question = "How do I reset my password?"
    mine = interaction("a", 0, question, session_id="s1")
    body = mine.body
    theirs = Event("interaction", "other", "main", body, occurred_at_us=SECOND, interaction_id="b", session_id="s1")
    assert signals_of([mine, theirs], SETTINGS) == {}


def test_answer_nobody_saw_gives_no_signal(settings: Settings) -> None:
    shadow = interaction("a", 0, "question", session_id="s1")
    shadow.body["flags"] = {"shadow": True}
    assert signals_of([shadow, event("behaviour", 2, {"action": "leave"}, "a")], settings) == {}


actions = st.builds(
    act,
    st.sampled_from(["message", "copy", "citation_click", "read", "leave", "session_end"]),
    st.floats(0, 10_000),
    st.none() | st.sampled_from("abc"),
    st.none() | st.floats(0, 1000),
    st.none() | st.sampled_from(["question a", "other"]),
)


@given(st.lists(st.floats(0, 10_000), min_size=1, max_size=3), st.lists(actions, max_size=8))
def test_any_behaviour_gives_bounded_rewards_and_at_most_one_abandonment(
    times: list[float], done: list[Action]
) -> None:
    turns = [turn(name, at) for name, at in zip("abc", times, strict=False)]
    for session in split_sessions(turns, done, SETTINGS.implicit):
        found = session_signals(session, {}, SETTINGS.implicit)
        assert sum(s.type == "abandonment" for signals in found.values() for s in signals) <= 1
        assert all(-1 <= implicit_reward(signals, SETTINGS) <= 1 for signals in found.values())
