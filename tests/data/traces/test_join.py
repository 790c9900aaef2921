"""Spans of one trace, in one request or in many, in any order: the dataset sees one trajectory."""

import random
from typing import Any

import orjson
import pyarrow as pa
import pytest
from sqlalchemy.engine import Engine

from cluster.settings import Settings, load_settings
from data.events import Event
from data.intake.items import Identity, Parser
from data.join import join_events, name_trajectories
from data.log import EventLog
from data.traces.genai import items_of
from data.traces.join import TRACE, add_trace, join_traces
from data.traces.otlp import Span, from_json
from tests.data.test_join import block
from tests.data.traces.spans import AGENT_RUN, _span, export_json
from tests.data.traces.spans import TRACE as TRACE_ID

NOW_US = 1_890_000_000_000_000
AGENT, RETRIEVAL, FIRST, TOOL, SECOND = AGENT_RUN


def events_of(*requests: list[Span]) -> list[Event]:
    """What the log holds after these requests; a span that is refused fails the test."""
    parser = Parser(load_settings()[0], b"k" * 16)
    events = []
    for spans in requests:
        for found in items_of(from_json(export_json(spans)).spans):
            assert found.error is None, found.error
            events.append(parser.parse(found.item, found.kind, Identity("default", "default"), NOW_US))
    return events


def joined(*requests: list[Span]) -> list[dict[str, Any]]:
    """Rows after the join."""
    table = name_trajectories(join_traces(add_trace(block(*events_of(*requests)))))
    return join_events(table)[0].to_pylist()  # type: ignore[no-any-return]


WHOLE = joined(AGENT_RUN)


@pytest.mark.parametrize(
    "requests",
    [
        [[span] for span in AGENT_RUN],
        [[span] for span in reversed(AGENT_RUN)],
        [[RETRIEVAL, FIRST], [TOOL], [SECOND, AGENT]],
        [[FIRST, TOOL, RETRIEVAL, SECOND], [AGENT]],
    ],
    ids=["one by one", "the agent last", "in three", "the agent alone"],
)
def test_requests_make_no_difference_to_the_trajectory(requests: list[list[Span]]) -> None:
    rows = joined(*requests)
    (run,) = [row for row in rows if row["tail"] is not None]
    (whole,) = [row for row in WHOLE if row["tail"] is not None]
    assert run == whole
    assert [m["role"] for m in orjson.loads(run["messages"])] == ["system", "user", "assistant", "tool"]
    assert orjson.loads(run["response"])["content"] == "Yes, it was shipped."
    assert orjson.loads(run["tools"])[0]["function"]["name"] == "find_order"
    assert {(row["user_id"], row["session_id"], row["agent"]) for row in rows} == {
        (whole["user_id"], "c-1", "Order-Helper")
    }


def test_a_tool_span_alone_finds_the_answer_that_asked_for_it() -> None:
    events = {e.kind: e for e in events_of([TOOL])}
    assert events["tool_call"].interaction_id is None
    table = join_traces(add_trace(block(*events_of([TOOL], [FIRST], [SECOND]))))
    calls = [row for row in table.to_pylist() if row["kind"] == "tool_call"]
    assert [row["interaction_id"] for row in calls] == ["resp-1"]
    assert TRACE not in table.column_names


def test_two_agents_of_a_trace_keep_their_own_steps() -> None:
    def said(number: int, parent: int, text: str, at_s: float) -> Span:
        talk = [{"role": "user", "parts": [{"type": "text", "content": f"to {text}"}]}]
        answer = [{"role": "assistant", "parts": [{"type": "text", "content": text}]}]
        messages = {"gen_ai.input.messages": orjson.dumps(talk).decode()}
        messages["gen_ai.output.messages"] = orjson.dumps(answer).decode()
        return _span(number, parent, "chat", at_s, 0.5, {"gen_ai.operation.name": "chat"} | messages)

    def agent(number: int, parent: int | None) -> Span:
        return _span(number, parent, "agent", 0, 5, {"gen_ai.operation.name": "invoke_agent"})

    spans = [agent(1, None), agent(2, 1), agent(3, 1), said(4, 2, "left", 1), said(5, 3, "right", 2)]
    runs = [row for row in joined(*([span] for span in reversed(spans))) if row["tail"] is not None]
    answers = {row["interaction_id"][-1]: orjson.loads(row["response"])["content"] for row in runs}
    assert answers == {"1": "left", "2": "left", "3": "right"}


def test_a_step_below_a_foreign_span_belongs_to_the_only_run() -> None:
    step = Span(**{name: getattr(SECOND, name) for name in SECOND.__slots__} | {"parent_id": "f" * 16})
    (run,) = [row for row in joined([step], [AGENT]) if row["tail"] is not None]
    assert orjson.loads(run["response"])["content"] == "Yes, it was shipped."


def test_an_answer_that_the_router_reports_belongs_to_the_run_of_its_trace() -> None:
    from tests.data.traffic import interaction

    routed = interaction(1, "Is it open?", "Yes.", user="ada", trace_id=TRACE_ID)
    table = join_traces(add_trace(block(routed, *events_of([AGENT]))))
    (run,) = [row for row in table.to_pylist() if row["kind"] == "trajectory"]
    assert [m["role"] for m in orjson.loads(run["body"])["messages"]] == ["system", "user", "assistant"]


def test_other_events_pass_untouched_and_order_makes_no_difference() -> None:
    from tests.data.traffic import feedback, interaction

    events = [interaction(1, "q", "a", user="u", trace_id="f" * 32), feedback(1, "thumbs_up", 1.0, user="u")]
    plain = block(*events)
    assert join_traces(add_trace(plain)).sort_by("event_id").equals(plain.sort_by("event_id"))
    parts = events_of(*([span] for span in AGENT_RUN))
    expected = join_events(name_trajectories(join_traces(add_trace(block(*parts)))))[0]
    random.Random(1).shuffle(parts)
    assert join_events(name_trajectories(join_traces(add_trace(block(*parts)))))[0].equals(expected)


def test_an_agent_whose_chats_say_nothing_is_told_what_to_switch_on() -> None:
    silent = _span(3, 1, "chat", 1, 1, {"gen_ai.operation.name": "chat"})
    found = {f.kind: f for f in items_of([AGENT, silent])}
    assert "CAPTURE_MESSAGE_CONTENT=true" in str(found["trajectory"].error)


def test_empty_steps_are_taken_from_spans_only() -> None:
    from cluster.errors import InputError

    parser = Parser(load_settings()[0], b"k" * 16)
    with pytest.raises(InputError, match="messages"):
        parser.parse({"messages": []}, "trajectory", Identity("default", "default"), NOW_US)


def test_an_empty_block_keeps_its_schema() -> None:
    empty = block()
    assert join_traces(add_trace(empty)).schema.equals(empty.schema)
    assert isinstance(add_trace(empty), pa.Table)


def test_erasing_the_user_of_a_run_takes_steps_that_came_without_a_user(
    sqlite_database: Engine, settings: Settings
) -> None:
    from data.erasure.erase import erase
    from data.erasure.person import Person

    log = EventLog(sqlite_database)
    ada = next(e.user_id for e in events_of([AGENT]))
    assert ada is not None
    for request in ([RETRIEVAL, FIRST], [TOOL], [SECOND], [AGENT]):
        log.append(events_of(request))
    assert [r.event.user_id for r in log.scan()] == [None, None, None, ada]
    erase(sqlite_database, settings, Person("default", ada))
    assert all(r.erased for r in log.scan(kinds=["interaction", "tool_call", "trajectory"]))
    (late,) = log.append(events_of([_span(9, 1, "chat", 3, 1, SECOND.attributes | {"gen_ai.response.id": "resp-9"})]))
    assert late.status == "refused"
