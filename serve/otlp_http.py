"""OTLP/HTTP on `/v1/traces`, so that agents instrumented with OpenTelemetry need no change.

Answers are an ExportTraceServiceResponse in the request's own encoding, with `partial_success` where spans
were rejected. Errors of a protobuf request are a `google.rpc.Status`; all others have OpenAI's shape.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from data.intake.batches import ItemResult
from data.traces.genai import Found, items_of
from data.traces.otlp import Export, from_json, from_protobuf
from serve.openai import JSON, ApiError, Headers, Scope, Send, header, send_response

PATH = "/v1/traces"
PROTOBUF = (b"content-type", b"application/x-protobuf")
SHOWN_PROBLEMS = 5
MESSAGE_CHARACTERS = 300
GRPC_CODES = {400: 3, 401: 16, 403: 7, 404: 5, 405: 12, 408: 4, 413: 3, 415: 3, 429: 8, 503: 14}
"""HTTP status -> code of `google.rpc.Code`; 13 (internal) otherwise."""


@dataclass(frozen=True, slots=True)
class Read:
    """What one export request holds for us."""

    items: list[dict[str, Any]]
    """With their `kind`, for `Intake.take_in`."""
    names: list[str]
    """Of the spans behind the items."""
    problems: list[str]
    """Spans that give nothing, and why."""
    ignored: int
    """Spans that are no GenAI operation."""


def is_protobuf(scope: Scope) -> bool:
    """Whether a request carries protobuf."""
    kind = (header(scope, b"content-type") or b"").partition(b";")[0].strip().lower()
    return kind in (b"application/x-protobuf", b"application/protobuf")


def is_export(document: Any) -> bool:
    """Whether a JSON document is an export request, and not our own form."""
    return isinstance(document, dict) and "resourceSpans" in document


def read_protobuf(body: bytes) -> Read:
    """The items of a binary request. `InputError` where it is none."""
    return _read(from_protobuf(body))


def read_json(document: dict[str, Any]) -> Read:
    """The items of a request in JSON. `InputError` where it is none."""
    return _read(from_json(document))


def _read(export: Export) -> Read:
    found = items_of(export.spans)
    good = [f for f in found if f.error is None]
    problems = [str(problem) for problem in export.problems]
    problems += [f"{_name(f)}: {f.error}" for f in found if f.error is not None]
    items = [f.item | {"kind": f.kind} for f in good]
    return Read(items, [_name(f) for f in good], problems, len(export.spans) - len(found))


def _name(found: Found) -> str:
    return f"span {found.span.name[:80]!r} {found.span.span_id}"


def response(read: Read, results: Sequence[ItemResult], *, protobuf: bool) -> tuple[bytes, tuple[bytes, bytes]]:
    """The body that acknowledges a request, and its content type."""
    problems = read.problems + [
        f"{name}: {result.error}"
        for name, result in zip(read.names, results, strict=True)
        if result.status == "rejected"
    ]
    shown = "; ".join(problem[:MESSAGE_CHARACTERS] for problem in problems[:SHOWN_PROBLEMS])
    message = f"{shown}; and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else shown
    if not protobuf:
        partial = {"rejectedSpans": str(len(problems)), "errorMessage": message}
        return orjson.dumps({"partialSuccess": partial} if problems else {}), JSON
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

    answer = ExportTraceServiceResponse()
    if problems:
        answer.partial_success.rejected_spans = len(problems)
        answer.partial_success.error_message = message
    return answer.SerializeToString(), PROTOBUF


async def send_status(send: Send, error: ApiError, headers: Headers) -> None:
    """An error as a `google.rpc.Status`."""
    kept = [pair for pair in error.headers() if pair != JSON]
    await send_response(send, error.status, status_message(error), [PROTOBUF, *kept, *headers])


def status_message(error: ApiError) -> bytes:
    """The two fields of a `google.rpc.Status` that exporters read: code (1) and message (2)."""
    text = error.message.encode()
    code = GRPC_CODES.get(error.status, 13)
    return b"\x08" + _varint(code) + b"\x12" + _varint(len(text)) + text


def _varint(number: int) -> bytes:
    """A protobuf base-128 varint."""
    digits = bytearray()
    while number > 0x7F:
        digits.append(number & 0x7F | 0x80)
        number >>= 7
    digits.append(number)
    return bytes(digits)
