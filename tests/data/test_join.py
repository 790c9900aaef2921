import random
from dataclasses import replace

import orjson
import pyarrow as pa

from data.events import ROUTER, Event, interaction_event_id
from data.join import join_events
from data.source import EVENTS
from tests.data.traffic import feedback, interaction


def block(*events: Event) -> pa.Table:
    return pa.Table.from_pylist(
        [
            {
                "kind": e.kind,
                "event_id": e.event_id,
                "interaction_id": e.interaction_id,
                "user_id": e.user_id,
                "session_id": e.session_id,
                "agent": e.agent,
                "at_us": e.occurred_at_us,
                "logged_us": e.occurred_at_us,
                "body": orjson.dumps(e.body).decode() if e.body else None,
            }
            for e in events
        ],
        EVENTS,
    )


def test_log_order_does_not_matter() -> None:
    events = [
        feedback(1, "thumbs_up", 1.0, user="ada"),
        interaction(1, "q", "a", user="ada"),
        feedback(1, "rating", 0.5, user="bob", value=4),
        interaction(2, "q2", "b", user="bob"),
    ]
    expected, _ = join_events(block(*events))
    for seed in range(5):
        random.Random(seed).shuffle(events)
        assert join_events(block(*events))[0].equals(expected)
    assert [s["type"] for s in orjson.loads(expected["signals"][0].as_py())] == ["rating", "thumbs_up"]


def test_feedback_without_a_user_is_that_of_the_interaction_or_of_its_session() -> None:
    anonymous = replace(interaction(2, "q", "a", user="bob"), user_id=None, session_id="s2")
    said = [replace(feedback(n, "thumbs_up", 1.0, user="x"), user_id=None) for n in (1, 2)]
    table, _ = join_events(block(interaction(1, "q", "a", user="ada"), anonymous, *said))
    assert [orjson.loads(text)[0]["user"] for text in table["signals"].to_pylist()] == ["ada", "session:s2"]


def test_the_routers_report_of_an_answer_counts_whatever_a_client_said_first() -> None:
    claimed = replace(interaction(1, "q", "Better than it was.", user="mallory"), occurred_at_us=0)
    routed = replace(interaction(1, "q", "a", user="ada", arm="stable"), event_id=interaction_event_id("i1", ROUTER))
    table, dropped = join_events(block(claimed, routed))
    (row,) = table.to_pylist()
    assert (row["user_id"], row["arm"], orjson.loads(row["response"])["content"]) == ("ada", "stable", "a")
    assert dropped == {"interaction repeated": 1}


def test_a_grade_of_a_clients_report_is_none_of_the_routers_answer() -> None:
    claimed = replace(interaction(1, "q", "Better than it was.", user="mallory"), occurred_at_us=0)
    routed = replace(interaction(1, "q", "a", user="ada", arm="stable"), event_id=interaction_event_id("i1", ROUTER))

    def grade(grader: str, reward: float, judged: str | None) -> Event:
        body = {"grader": grader, "grader_version": "1", "reward": reward} | ({"judged": judged} if judged else {})
        return Event("grade", "default", "default", body, event_id=f"g-{grader}-{reward}", interaction_id="i1")

    grades = [grade("rubric", 1.0, claimed.event_id), grade("rubric", 0.2, routed.event_id), grade("people", 0.5, None)]
    alone, nothing = join_events(block(claimed, grades[0]))
    assert [g["reward"] for g in orjson.loads(alone["grades"][0].as_py())] == [1.0] and not nothing
    table, dropped = join_events(block(claimed, routed, *grades))
    assert [(g["grader"], g["reward"]) for g in orjson.loads(table["grades"][0].as_py())] == [
        ("people", 0.5),
        ("rubric", 0.2),
    ]
    assert dropped == {"interaction repeated": 1, "grade of another report": 1}


def test_what_is_lost_is_counted_by_reason() -> None:
    erased = Event("feedback", "default", "default", {}, event_id="x", interaction_id="i1")
    table, dropped = join_events(
        block(
            interaction(1, "q", "a", user="ada"),
            interaction(2, "q", "a", user="ada", agent="other"),
            feedback(9, "thumbs_up", 1.0, user="ada"),
            erased,
        ),
        agent="triage",
    )
    assert table["interaction_id"].to_pylist() == ["i1"]
    assert dropped == {"other agent": 1, "interaction unknown": 1, "erased": 1}


def test_later_label_of_a_reviewer_supersedes() -> None:
    labels = [
        Event("label", "default", "default", {"reviewer": "rita", "scores": {"success": s}},
              event_id=f"l{at}", occurred_at_us=at, interaction_id="i1")
        for at, s in ((2, 1.0), (1, 0.0))
    ]  # fmt: skip
    table, _ = join_events(block(interaction(1, "q", "a", user="ada"), *labels))
    assert orjson.loads(table["labels"][0].as_py()) == [{"reviewer": "rita", "scores": {"success": 1.0}}]


def test_behaviour_of_which_only_the_session_is_known_becomes_a_row_of_its_own() -> None:
    left = [
        Event(
            "behaviour", "default", "default", {"action": action}, event_id=action, occurred_at_us=at, session_id="s1"
        )
        for at, action in ((2, "leave"), (1, "copy"))
    ]
    nowhere = Event("behaviour", "default", "default", {"action": "copy"}, event_id="x")
    table, dropped = join_events(block(*left, interaction(1, "q", "a", user="ada"), nowhere))
    assert table["interaction_id"].to_pylist() == [None, None, "i1"]
    assert [orjson.loads(text)[0]["body"]["action"] for text in table["behaviours"].to_pylist()[:2]] == [
        "copy",
        "leave",
    ]
    assert table["session_key"].to_pylist()[:2] == ["session:s1"] * 2
    assert dropped == {"no interaction id": 1}
