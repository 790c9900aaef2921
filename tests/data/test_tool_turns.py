"""Tools that an agent reports beside its conversation end as turns of what is learned from it."""

from typing import Any

import orjson
import pyarrow as pa
import pytest

from data.events import Event, parse_body
from data.filter import reason_against
from data.join import join_events, name_trajectories
from data.tool_turns import with_tool_turns
from tests.data.test_join import block
from tests.data.traffic import START_US, feedback, interaction

ASKED = [{"role": "user", "content": "Where is order 7?"}]
SAID = {"role": "assistant", "content": "It was sent."}
FIND = {"name": "find", "call_id": "c1", "arguments": {"order": 7}, "result": {"state": "sent"}}
WISH = {"id": "c1", "type": "function", "function": {"name": "find", "arguments": '{"order":7}'}}
TURN = [
    {"role": "assistant", "content": None, "tool_calls": [WISH]},
    {"role": "tool", "tool_call_id": "c1", "content": '{"state":"sent"}'},
]


def call(number: int, about: str | None, **body: Any) -> Event:
    ids = {"event_id": f"t{number}", "occurred_at_us": START_US + number, "interaction_id": about}
    return Event("tool_call", "default", "default", parse_body("tool_call", {"name": "find"} | body), **ids)


def test_a_call_gets_a_turn_of_its_own_before_the_answer() -> None:
    assert with_tool_turns(ASKED, SAID, [FIND]) == [*ASKED, *TURN]
    plain = with_tool_turns(ASKED, SAID, [{"name": "f", "result": "so"}, {"name": "g", "arguments": "{x"}])
    assert [m.get("tool_call_id") for m in plain] == [None, None, "call_1", None, "call_2"]
    assert [m["content"] for m in plain if m["role"] == "tool"] == ["so", "null"]
    assert plain[3]["tool_calls"][0]["function"]["arguments"] == "{x"


def test_a_result_goes_behind_the_turn_that_asks_for_it() -> None:
    both = {"role": "assistant", "content": None, "tool_calls": [WISH, WISH | {"id": "c2"}]}
    other = {"role": "tool", "tool_call_id": "c2", "content": "2"}
    last = {"role": "user", "content": "and?"}
    assert with_tool_turns([*ASKED, both, other, last], SAID, [FIND]) == [*ASKED, both, other, TURN[1], last]


@pytest.mark.parametrize(
    ("messages", "response", "calls"),
    [
        ([*ASKED, *TURN], SAID, [FIND]),
        ([*ASKED, *TURN], SAID, [{k: v for k, v in FIND.items() if k != "call_id"}]),
        (ASKED, TURN[0], [FIND]),
        (ASKED, SAID, []),
    ],
    ids=["told", "told without an id", "asked for by the answer", "none"],
)
def test_what_is_told_already_is_left_alone(messages: Any, response: Any, calls: Any) -> None:
    assert with_tool_turns(messages, response, calls) == messages


def test_tool_events_join_their_interaction_in_order_of_time() -> None:
    events = [
        call(2, "i1", call_id="b", result=2),
        call(1, "i1", call_id="a", result=1),
        call(3, "i9", call_id="z"),
        call(4, None),
        interaction(1, "q", "a", user="ada"),
    ]
    table, dropped = join_events(block(*events))
    messages = orjson.loads(table["messages"][0].as_py())
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "tool", "assistant", "tool"]
    assert [m["tool_call_id"] for m in messages if m["role"] == "tool"] == ["a", "b"]
    assert dropped == {"interaction unknown": 1, "no interaction id": 1}


def test_calls_in_the_body_count_once_beside_their_events() -> None:
    told = interaction(1, "q", "a", user="ada", tool_calls=[{"name": "find", "call_id": "a", "result": 1}])
    table, _ = join_events(block(told, call(1, "i1", call_id="a", result=1), call(2, "i1", result=2)))
    assert [m["role"] for m in orjson.loads(table["messages"][0].as_py())][2:] == ["assistant", "tool"]


def test_a_failed_call_marks_the_row_as_a_failed_run() -> None:
    from cluster.settings.curation import FilterSettings

    table, _ = join_events(block(interaction(1, "q", "a", user="ada"), call(1, "i1", error="no such order")))
    (row,) = table.to_pylist()
    parsed = row | {name: orjson.loads(row[name]) for name in ("messages", "response", "flags")}
    assert reason_against(parsed, FilterSettings()) == "tool run failed"


def test_a_run_of_several_turns_takes_only_calls_it_asks_for() -> None:
    steps = [*ASKED, {"role": "assistant", "content": "Which?"}, {"role": "user", "content": "7"}, TURN[0], SAID]
    body = {"messages": steps, "reward": 1.0, "tool_calls": [FIND, {"name": "log", "call_id": "x"}]}
    run = Event("trajectory", "default", "default", parse_body("trajectory", body), event_id="t1")
    rows, _ = join_events(name_trajectories(pa.Table.from_batches(block(run).to_batches())))
    messages = orjson.loads(rows["messages"][0].as_py())
    assert [m["role"] for m in messages] == ["user", "assistant", "user", "assistant", "tool"]


def test_a_signal_keeps_its_reason() -> None:
    said = feedback(1, "thumbs_down", -1.0, user="ada", reason="wrong owner")
    table, _ = join_events(block(interaction(1, "q", "a", user="ada"), said))
    assert orjson.loads(table["signals"][0].as_py())[0]["reason"] == "wrong owner"
