"""Spans of instrumented agents: every form the conventions have had, and whatever else may come."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from cluster.errors import InputError
from data.traces.genai import items_of
from data.traces.messages import conversation
from data.traces.otlp import Span, SpanEvent, from_json, from_protobuf
from tests.data.traces.spans import AGENT_RUN, TRACE, export_json, export_protobuf, span_json

ASKED = [{"role": "user", "parts": [{"type": "text", "content": "Where is it?"}]}]
ANSWERED = [{"role": "assistant", "parts": [{"type": "text", "content": "Here."}], "finish_reason": "stop"}]


def chat(attributes: dict[str, Any] = {}, events: tuple[SpanEvent, ...] = (), **more: Any) -> Span:  # noqa: B006
    named = {"gen_ai.operation.name": "chat"} | attributes
    return Span(TRACE, "b" * 16, None, "chat m", 10**18, 10**18 + 5 * 10**8, named, {}, events, **more)


def item(span: Span) -> dict[str, Any]:
    (found,) = items_of([span])
    assert found.error is None
    return found.item


def test_protobuf_and_json_give_the_same_spans() -> None:
    assert from_protobuf(export_protobuf(AGENT_RUN)).spans == from_json(export_json(AGENT_RUN)).spans
    assert from_json(json.loads(json.dumps(export_json(AGENT_RUN)))).problems == []


def test_agent_run_becomes_interactions_a_tool_call_and_a_trajectory() -> None:
    found = items_of(from_json(export_json(AGENT_RUN)).spans)
    assert [f.kind for f in found] == ["trajectory", "interaction", "tool_call", "interaction"]
    trajectory, first, call, second = (f.item for f in found)
    assert first["response"]["tool_calls"][0]["function"] == {"name": "find_order", "arguments": '{"order":7}'}
    assert (first["finish_reason"], second["finish_reason"]) == ("tool_calls", "stop")
    assert [m["role"] for m in second["messages"]] == ["system", "user", "assistant", "tool"]
    assert second["messages"][3] == {"role": "tool", "tool_call_id": "call_1", "content": '{"status":"shipped"}'}
    assert second["response"] == {"role": "assistant", "content": "Yes, it was shipped."}
    assert second["parameters"] == {"temperature": 0.2, "max_tokens": 64}
    assert (second["requested"], second["served_version"], second["interaction_id"]) == ("orders", "orders/3", "resp-2")
    assert second["tools"] == [{"type": "function", "function": {"name": "find_order", "parameters": {}}}]
    assert second["context"] == ["Orders ship within a day."]
    # what the agent's span says holds for the spans below it
    assert {(f.item["user"], f.item["session"], f.item["agent"]) for f in found} == {("ada", "c-1", "Order-Helper")}
    assert (call["arguments"], call["result"], call["latency_s"]) == ({"order": 7}, {"status": "shipped"}, 0.25)
    assert (call["interaction_id"], call["call_id"]) == (first["interaction_id"], "call_1")
    assert trajectory["messages"] == [*second["messages"], second["response"]]
    assert [c["call_id"] for c in trajectory["tool_calls"]] == ["call_1"]


def test_failed_tool_keeps_its_error() -> None:
    failed = Span(TRACE, "c" * 16, None, "execute_tool f", 1, 2, {"gen_ai.operation.name": "execute_tool"}, {},
                  error="no such order")  # fmt: skip
    assert (item(failed)["name"], item(failed)["error"]) == ("f", "no such order")


@pytest.mark.parametrize(
    "span",
    [
        chat({"gen_ai.input.messages": json.dumps(ASKED), "gen_ai.output.messages": json.dumps(ANSWERED)}),
        chat({"gen_ai.input.messages": ASKED, "gen_ai.output.messages": ANSWERED}),
        chat(
            events=(
                SpanEvent(
                    "gen_ai.client.inference.operation.details",
                    {"gen_ai.input.messages": ASKED, "gen_ai.output.messages": ANSWERED},
                ),
            )
        ),
        chat(
            events=(
                SpanEvent("gen_ai.user.message", {"content": "Where is it?"}),
                SpanEvent("gen_ai.choice", {"index": 0, "finish_reason": "stop", "message": '{"content":"Here."}'}),
            )
        ),
        chat(
            {
                "gen_ai.prompt.0.role": "user",
                "gen_ai.prompt.0.content": "Where is it?",
                "gen_ai.completion.0.role": "assistant",
                "gen_ai.completion.0.content": "Here.",
                "gen_ai.completion.0.finish_reason": "stop",
            }
        ),
    ],
    ids=["json-text", "structured", "details-event", "message-events", "flat"],
)
def test_every_form_of_messages_is_read(span: Span) -> None:
    talk = conversation(span)
    assert talk.messages == [{"role": "user", "content": "Where is it?"}]
    assert talk.response == {"role": "assistant", "content": "Here."}
    assert talk.finish_reason == "stop"


def test_span_without_content_says_what_to_switch_on() -> None:
    (found,) = items_of([chat()])
    assert found.error is not None
    assert "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT=true" in str(found.error)


def test_interaction_is_named_by_the_agent_else_by_the_answer_else_by_the_span() -> None:
    said = {"gen_ai.input.messages": ASKED}
    assert item(chat(said))["interaction_id"] == f"span-{TRACE}-{'b' * 16}"
    assert item(chat(said | {"gen_ai.response.id": "r1"}))["interaction_id"] == "r1"
    both = said | {"gen_ai.response.id": "r1", "rayloop.interaction_id": "mine"}
    assert item(chat(both))["interaction_id"] == "mine"


def test_other_spans_are_passed_over() -> None:
    assert items_of([Span(TRACE, "b" * 16, None, "GET /", 1, 2, {"http.request.method": "GET"}, {})]) == []


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"traceId": "xyz"}, "traceId"),
        ({"traceId": "0" * 32}, "traceId"),
        ({"spanId": None}, "spanId"),
        ({"startTimeUnixNano": "soon"}, "startTimeUnixNano"),
        ({"startTimeUnixNano": str(2**64)}, "startTimeUnixNano"),
        ({"name": 7}, "name"),
        ({"attributes": {"a": 1}}, "attributes"),
        ({"attributes": [{"key": "a", "value": {"intValue": "x"}}]}, "a"),
        ({"attributes": [{"key": "a", "value": {"bytesValue": "!"}}]}, "a"),
        ({"events": [3]}, "events"),
        ({"status": []}, "status"),
    ],
)
def test_bad_span_is_told_apart_and_the_others_are_kept(change: dict[str, Any], field: str) -> None:
    if change == {"status": []}:
        change = {"status": ["x"]}
    document = export_json(AGENT_RUN)
    document["resourceSpans"][0]["scopeSpans"][0]["spans"].append(span_json(AGENT_RUN[1]) | change)
    export = from_json(document)
    assert len(export.spans) == len(AGENT_RUN)
    assert [problem.field for problem in export.problems] == [field]


def test_body_that_is_no_export_is_refused_whole() -> None:
    with pytest.raises(InputError, match="resourceSpans"):
        from_json({"resourceSpans": 3})
    with pytest.raises(InputError, match="protobuf"):
        from_protobuf(b"\xff\xff\xff\xff")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=10,
)
attribute_names = st.sampled_from(
    [
        "gen_ai.input.messages",
        "gen_ai.output.messages",
        "gen_ai.system_instructions",
        "gen_ai.tool.definitions",
        "gen_ai.tool.call.arguments",
        "gen_ai.tool.call.id",
        "gen_ai.tool.call.result",
        "gen_ai.response.finish_reasons",
        "gen_ai.response.id",
        "gen_ai.retrieval.documents",
        "gen_ai.prompt.0.content",
        "gen_ai.completion.0.tool_calls.0.name",
        "gen_ai.agent.name",
        "rayloop.context",
        "rayloop.metadata.x",
    ]
)
message_values = st.lists(
    st.fixed_dictionaries(
        {"role": json_values},
        optional={
            "parts": json_values
            | st.lists(
                st.fixed_dictionaries(
                    {"type": st.sampled_from(["text", "tool_call", "tool_call_response", "reasoning", "x"])},
                    optional={"content": json_values, "id": json_values, "arguments": json_values},
                ),
                max_size=3,
            ),
            "content": json_values,
            "tool_calls": json_values,
        },
    ),
    max_size=3,
)


@given(
    st.sampled_from(["chat", "execute_tool", "invoke_agent", "retrieval"]),
    st.dictionaries(attribute_names, json_values | message_values, max_size=6),
)
def test_any_attributes_give_an_item_or_an_error(operation: str, attributes: dict[str, Any]) -> None:
    above = Span(TRACE, "a" * 16, "a" * 16, "agent", 1, 9, {"gen_ai.operation.name": "invoke_agent"}, {})
    span = Span(TRACE, "b" * 16, "a" * 16, "x", 1, 2, attributes | {"gen_ai.operation.name": operation}, {})
    for found in items_of([above, span]):
        assert found.error is None or str(found.error)


@given(st.dictionaries(st.just("resourceSpans"), json_values) | st.just({"resourceSpans": [{"scopeSpans": [{}]}]}))
def test_any_json_is_read_or_refused(document: dict[str, Any]) -> None:
    try:
        from_json(document)
    except InputError as error:
        assert str(error)


@given(st.binary(max_size=200), st.integers(0, 600))
def test_any_bytes_are_read_or_refused(noise: bytes, cut: int) -> None:
    for body in (noise, export_protobuf(AGENT_RUN)[:cut] + noise):
        try:
            items_of(from_protobuf(body).spans)
        except InputError as error:
            assert str(error)


def test_request_type_is_the_one_exporters_send() -> None:
    assert ExportTraceServiceRequest.FromString(export_protobuf(AGENT_RUN)).resource_spans
