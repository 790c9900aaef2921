"""Spans as OpenTelemetry's exporters send them (OTLP/HTTP): protobuf or its JSON form become `Span`.

A body that is no export request is refused as a whole; one bad span is told apart and the others are kept.
Source: OTLP 1.x, https://opentelemetry.io/docs/specs/otlp/ (JSON: ids in hex, 64-bit integers as text,
unknown fields ignored).
"""

import base64
import binascii
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from cluster.errors import InputError

Attributes = dict[str, Any]
MAX_DEPTH = 64
ERROR_STATUS = 2
REMEDY = "send an ExportTraceServiceRequest"


@dataclass(frozen=True, slots=True)
class SpanEvent:
    """Something that happened within a span."""

    name: str
    attributes: Attributes


@dataclass(frozen=True, slots=True)
class Span:
    """One span, with the attributes of the resource it comes from."""

    trace_id: str
    """32 hex digits."""
    span_id: str
    """16 hex digits."""
    parent_id: str | None
    name: str
    start_ns: int
    end_ns: int
    attributes: Attributes
    resource: Attributes
    events: tuple[SpanEvent, ...] = ()
    error: str | None = None
    """The status message where the span failed."""

    @property
    def latency_s(self) -> float:
        """From start to end; 0 where the clock went backwards."""
        return max(0, self.end_ns - self.start_ns) / 1e9


@dataclass(slots=True)
class Export:
    """What one request holds."""

    spans: list[Span] = field(default_factory=list)
    problems: list[InputError] = field(default_factory=list)
    """Spans that could not be read."""


def from_protobuf(body: bytes) -> Export:
    """The spans of a binary export request.

    Raises:
        InputError: the body is none.
    """
    from google.protobuf.message import DecodeError
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    request = ExportTraceServiceRequest()
    try:
        request.ParseFromString(body)
    except DecodeError as error:
        raise InputError("body", body[:40], f"is not valid protobuf ({error})", REMEDY) from None
    export = Export()
    for group in request.resource_spans:
        resource = _message_attributes(group.resource.attributes)
        for scope in group.scope_spans:
            for message in scope.spans:
                _keep(export, lambda m=message, r=resource: _of_message(m, r))
    return export


def from_json(document: dict[str, Any]) -> Export:
    """The spans of an export request in JSON.

    Raises:
        InputError: `resourceSpans` is not what it should be.
    """
    export = Export()
    for group in _objects(document.get("resourceSpans"), "resourceSpans"):
        resource = _json_attributes((_object(group.get("resource"), "resource")).get("attributes"))
        for scope in _objects(group.get("scopeSpans"), "scopeSpans"):
            for span in _list(scope.get("spans"), "spans"):
                _keep(export, lambda s=span, r=resource: _of_json(_object(s, "span"), r))
    return export


def _keep(export: Export, read: Any) -> None:
    try:
        export.spans.append(read())
    except InputError as error:
        export.problems.append(error)


# protobuf


def _of_message(message: Any, resource: Attributes) -> Span:
    return Span(
        trace_id=_id(message.trace_id.hex(), 32, "trace_id"),
        span_id=_id(message.span_id.hex(), 16, "span_id"),
        parent_id=_parent(message.parent_span_id.hex(), "parent_span_id"),
        name=message.name,
        start_ns=message.start_time_unix_nano,
        end_ns=message.end_time_unix_nano,
        attributes=_message_attributes(message.attributes),
        resource=resource,
        events=tuple(SpanEvent(e.name, _message_attributes(e.attributes)) for e in message.events),
        error=(message.status.message or "error") if message.status.code == ERROR_STATUS else None,
    )


def _message_attributes(pairs: Any) -> Attributes:
    return {pair.key: _message_value(pair.value) for pair in pairs}


def _message_value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind is None:
        return None
    if kind == "array_value":
        return [_message_value(inner) for inner in value.array_value.values]
    if kind == "kvlist_value":
        return _message_attributes(value.kvlist_value.values)
    if kind == "bytes_value":
        return base64.b64encode(value.bytes_value).decode()
    return getattr(value, kind)


# JSON


def _of_json(span: dict[str, Any], resource: Attributes) -> Span:
    status = _object(span.get("status"), "status")
    failed = status.get("code") in (ERROR_STATUS, "STATUS_CODE_ERROR")
    return Span(
        trace_id=_id(span.get("traceId"), 32, "traceId"),
        span_id=_id(span.get("spanId"), 16, "spanId"),
        parent_id=_parent(span.get("parentSpanId"), "parentSpanId"),
        name=_text(span.get("name", ""), "name"),
        start_ns=_integer(span.get("startTimeUnixNano", 0), "startTimeUnixNano"),
        end_ns=_integer(span.get("endTimeUnixNano", 0), "endTimeUnixNano"),
        attributes=_json_attributes(span.get("attributes")),
        resource=resource,
        events=tuple(
            SpanEvent(_text(e.get("name", ""), "events.name"), _json_attributes(e.get("attributes")))
            for e in _objects(span.get("events"), "events")
        ),
        error=(_text(status.get("message") or "error", "status.message")) if failed else None,
    )


def _json_attributes(pairs: Any, depth: int = 0) -> Attributes:
    read = {}
    for pair in _objects(pairs, "attributes"):
        name = _text(pair.get("key"), "attributes.key")
        read[name] = _json_value(_object(pair.get("value"), name), name, depth)
    return read


def _json_value(value: dict[str, Any], place: str, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise InputError(place, "…", f"is nested deeper than {MAX_DEPTH} levels", "flatten it")
    for kind, inner in value.items():
        if kind == "stringValue":
            return _text(inner, place)
        if kind == "intValue":
            return _integer(inner, place, signed=True)
        if kind == "doubleValue":
            return _double(inner, place)
        if kind == "boolValue":
            return _boolean(inner, place)
        if kind == "bytesValue":
            return _base64(inner, place)
        if kind == "arrayValue":
            values = _objects(_object(inner, place).get("values"), place)
            return [_json_value(one, place, depth + 1) for one in values]
        if kind == "kvlistValue":
            return _json_attributes(_object(inner, place).get("values"), depth + 1)
    return None


def _objects(value: Any, place: str) -> Iterator[dict[str, Any]]:
    for one in _list(value, place):
        yield _object(one, place)


def _list(value: Any, place: str) -> list[Any]:
    if value is not None and not isinstance(value, list):
        raise InputError(place, value, "must be a list", REMEDY)
    return value or []


def _object(value: Any, place: str) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise InputError(place, value, "must be an object", REMEDY)
    return value or {}


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise InputError(place, value, "must be text", REMEDY)
    return value


def _boolean(value: Any, place: str) -> bool:
    if not isinstance(value, bool):
        raise InputError(place, value, "must be true or false", REMEDY)
    return value


def _integer(value: Any, place: str, *, signed: bool = False) -> int:
    """A 64-bit integer, which JSON carries as text; numbers are taken too."""
    try:
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise ValueError
        number = int(value)
    except ValueError:
        raise InputError(place, value, "must be an integer, as text", REMEDY) from None
    if not (-(2**63) if signed else 0) <= number < 2**64:
        raise InputError(place, value, "must fit 64 bits", REMEDY)
    return number


def _double(value: Any, place: str) -> float:
    try:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ValueError
        return float(value)
    except (ValueError, OverflowError):
        raise InputError(place, value, "must be a number", REMEDY) from None


def _base64(value: Any, place: str) -> str:
    try:
        base64.b64decode(_text(value, place), validate=True)
    except (binascii.Error, ValueError):
        raise InputError(place, value, "must be base64", REMEDY) from None
    return str(value)


def _parent(value: Any, place: str) -> str | None:
    """The id of the span above; zeros stand for none, as does nothing."""
    return None if not value or value == "0" * 16 else _id(value, 16, place)


def _id(value: Any, digits: int, place: str) -> str:
    text = value.lower() if isinstance(value, str) else ""
    if len(text) != digits or set(text) - set("0123456789abcdef") or not text.strip("0"):
        raise InputError(place, value, f"must be {digits} hex digits, not all 0", REMEDY)
    return text
