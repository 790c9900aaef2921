"""One run of an instrumented agent as spans, in both encodings of OTLP."""

import json
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span as SpanMessage

from data.traces.otlp import Span

TRACE = "0af7651916cd43dd8448eb211c80319c"
START_NS = 1_790_000_000_000_000_000
QUESTION = {"role": "user", "parts": [{"type": "text", "content": "Is order 7 on its way?"}]}
WISH = {
    "role": "assistant",
    "parts": [{"type": "tool_call", "id": "call_1", "name": "find_order", "arguments": {"order": 7}}],
}
RESULT = {
    "role": "tool",
    "parts": [{"type": "tool_call_response", "id": "call_1", "response": {"status": "shipped"}}],
}
SAID = {"role": "assistant", "parts": [{"type": "text", "content": "Yes, it was shipped."}], "finish_reason": "stop"}
CHAT = {"gen_ai.operation.name": "chat", "gen_ai.provider.name": "openai", "gen_ai.request.model": "orders"}


def _span(number: int, parent: int | None, name: str, at_s: float, for_s: float, attributes: dict[str, Any]) -> Span:
    return Span(
        trace_id=TRACE,
        span_id=f"{number:016x}",
        parent_id=None if parent is None else f"{parent:016x}",
        name=name,
        start_ns=START_NS + round(at_s * 1e9),
        end_ns=START_NS + round((at_s + for_s) * 1e9),
        attributes=attributes,
        resource={"service.name": "order-agent"},
    )


AGENT_RUN = [
    _span(
        1, None, "invoke_agent Order Helper", 0, 4,
        {"gen_ai.operation.name": "invoke_agent", "gen_ai.agent.name": "Order Helper", "user.id": "ada",
         "gen_ai.conversation.id": "c-1"},
    ),
    _span(
        2, 1, "retrieval docs", 0.1, 0.1,
        {"gen_ai.operation.name": "retrieval",
         "gen_ai.retrieval.documents": json.dumps([{"id": "d1", "content": "Orders ship within a day."}])},
    ),
    _span(
        3, 1, "chat orders", 0.5, 1,
        CHAT | {
            "gen_ai.response.id": "resp-1",
            "gen_ai.input.messages": json.dumps([QUESTION]),
            "gen_ai.output.messages": json.dumps([WISH | {"finish_reason": "tool_call"}]),
        },
    ),
    _span(
        4, 1, "execute_tool find_order", 1.6, 0.25,
        {"gen_ai.operation.name": "execute_tool", "gen_ai.tool.name": "find_order", "gen_ai.tool.call.id": "call_1",
         "gen_ai.tool.call.arguments": '{"order": 7}', "gen_ai.tool.call.result": '{"status": "shipped"}'},
    ),
    _span(
        5, 1, "chat orders", 2, 1.5,
        CHAT | {
            "gen_ai.response.id": "resp-2",
            "gen_ai.response.model": "orders/3",
            "gen_ai.request.temperature": 0.2,
            "gen_ai.request.max_tokens": 64,
            "gen_ai.response.finish_reasons": ["stop"],
            "gen_ai.system_instructions": json.dumps([{"type": "text", "content": "You help."}]),
            "gen_ai.tool.definitions": json.dumps([{"type": "function", "name": "find_order", "parameters": {}}]),
            "gen_ai.input.messages": json.dumps([QUESTION, WISH, RESULT]),
            "gen_ai.output.messages": json.dumps([SAID]),
        },
    ),
]  # fmt: skip
"""An agent that retrieves, asks, calls a tool and answers."""


def _json_value(value: Any) -> dict[str, Any]:
    if isinstance(value, bool):
        return {"boolValue": value}
    if isinstance(value, int):
        return {"intValue": str(value)}
    if isinstance(value, float):
        return {"doubleValue": value}
    if isinstance(value, list):
        return {"arrayValue": {"values": [_json_value(one) for one in value]}}
    return {"stringValue": value}


def _json_attributes(attributes: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"key": name, "value": _json_value(value)} for name, value in attributes.items()]


def span_json(span: Span) -> dict[str, Any]:
    return {
        "traceId": span.trace_id,
        "spanId": span.span_id,
        "parentSpanId": span.parent_id or "",
        "name": span.name,
        "kind": 3,
        "startTimeUnixNano": str(span.start_ns),
        "endTimeUnixNano": str(span.end_ns),
        "attributes": _json_attributes(span.attributes),
        "status": {},
        "unheardOf": [1],
    }


def export_json(spans: list[Span]) -> dict[str, Any]:
    resource = {"attributes": _json_attributes(spans[0].resource)}
    return {"resourceSpans": [{"resource": resource, "scopeSpans": [{"spans": [span_json(s) for s in spans]}]}]}


def _any_value(value: Any) -> AnyValue:
    made = AnyValue()
    if isinstance(value, list):
        made.array_value.values.extend(_any_value(one) for one in value)
    else:
        names = {bool: "bool_value", int: "int_value", float: "double_value", str: "string_value"}
        setattr(made, names[type(value)], value)
    return made


def _pairs(attributes: dict[str, Any]) -> list[KeyValue]:
    return [KeyValue(key=name, value=_any_value(value)) for name, value in attributes.items()]


def export_protobuf(spans: list[Span]) -> bytes:
    request = ExportTraceServiceRequest()
    group = request.resource_spans.add()
    group.resource.attributes.extend(_pairs(spans[0].resource))
    scope = group.scope_spans.add()
    for span in spans:
        scope.spans.append(
            SpanMessage(
                trace_id=bytes.fromhex(span.trace_id),
                span_id=bytes.fromhex(span.span_id),
                parent_span_id=bytes.fromhex(span.parent_id or ""),
                name=span.name,
                start_time_unix_nano=span.start_ns,
                end_time_unix_nano=span.end_ns,
                attributes=_pairs(span.attributes),
            )
        )
    return request.SerializeToString()
