"""The OpenAPI document of the intake and labelling routes, made from the models that check the items."""

from functools import cache
from typing import Any

import orjson

from data.events import ASSIGNMENT_FIELDS, BODIES
from data.feedback import SERVER_FIELDS
from data.intake.batches import TRACE_KINDS
from data.intake.items import NEEDS_INTERACTION, Envelope
from data.labelling.content import LETTERS
from data.labelling.queue import ORDER
from data.labelling.submission import LabelItem
from serve.intake_http import KINDS
from serve.labels_http import LABELS, MOST_SHOWN, QUEUE

PATH = "/openapi.json"
Schema = dict[str, Any]

SUMMARIES = {
    "/v1/feedback": "Say what people thought of answers.",
    "/v1/behaviour": "Say what people did after answers.",
    "/v1/outcomes": "Report what a product measures itself.",
    "/v1/trajectories": "Report conversations of an agent with tools, whole.",
    "/v1/traces": "Report interactions, tool calls and trajectories of agents elsewhere; also OTLP/HTTP.",
}
REFUSALS = {
    "400": "The body is no batch of items.",
    "401": "No key, or a wrong one.",
    "403": "The key lacks the scope, or the feature is switched off.",
    "408": "The body did not arrive in time.",
    "413": "The body is too long.",
    "415": "The content-encoding is not understood.",
    "429": "Too much waits already; come again after `retry-after`.",
    "503": "The log takes nothing now; come again after `retry-after`.",
}


@cache
def document() -> bytes:
    """The document as JSON."""
    return orjson.dumps(build())


def build() -> Schema:
    """The document: each route takes one item or `{"items": [...]}` and answers each item on its own."""
    schemas: Schema = {"Error": _error(), "Results": _results(), "ExportResponse": _export_response()}
    for kind in filter(None, KINDS.values()):
        schemas[kind] = item_schema(kind, schemas)
    for kind in TRACE_KINDS:
        schemas[f"traced_{kind}"] = item_schema(kind, schemas, named=True)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Rayloop intake", "version": "1"},
        "paths": {path: {"post": _operation(path, kind)} for path, kind in KINDS.items()} | _label_paths(schemas),
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}],
    }


def item_schema(kind: str, shared: Schema, *, named: bool = False) -> Schema:
    """The JSON schema of one item; schemas that it refers to are added to `shared`.

    `named`: the item says its kind, as part of a trace.
    """
    schema = BODIES[kind].model_json_schema(ref_template="#/components/schemas/{model}")
    shared |= schema.pop("$defs", {})
    closed = {"feedback": SERVER_FIELDS, "interaction": ASSIGNMENT_FIELDS}.get(kind, ())
    properties = {name: field for name, field in schema["properties"].items() if name not in closed}
    envelope = Envelope.model_json_schema()["properties"]
    required = [*schema.get("required", ()), *(["interaction_id"] if kind in NEEDS_INTERACTION else ())]
    if named:
        envelope = envelope | {"kind": {"const": kind}}
        required += [] if kind == TRACE_KINDS[0] else ["kind"]
    return {
        "type": "object",
        "description": schema.get("description", ""),
        "properties": envelope | properties,
        "required": required,
        "additionalProperties": False,
    }


def _operation(path: str, kind: str | None) -> Schema:
    one = {"anyOf": [_ref(f"traced_{name}") for name in TRACE_KINDS]} if kind is None else _ref(kind)
    taken: Schema = {"application/json": {"schema": {"anyOf": [one, _many(one)]}}}
    answer: Schema = _ref("Results")
    if kind is None:
        taken["application/x-protobuf"] = {"schema": {"type": "string", "format": "binary"}}
        answer = {"anyOf": [answer, _ref("ExportResponse")]}
    responses: Schema = {"200": {"description": "Each item's own answer.", "content": _json(answer)}}
    refused = _json(_ref("Error"))
    if kind is None:
        responses["200"]["content"]["application/x-protobuf"] = {}
        refused = refused | {"application/x-protobuf": {}}
    responses |= {status: {"description": text, "content": refused} for status, text in REFUSALS.items()}
    return {
        "operationId": path.removeprefix("/v1/"),
        "summary": SUMMARIES[path],
        "requestBody": {"required": True, "content": taken},
        "responses": responses,
    }


def _label_paths(shared: Schema) -> Schema:
    """What waits for people's judgement, and what they send; its schemas are added to `shared`."""
    schema = LabelItem.model_json_schema(ref_template="#/components/schemas/{model}")
    shared |= schema.pop("$defs", {}) | {"label": schema, "LabelQueue": _label_queue()}
    refused = {status: {"description": text, "content": _json(_ref("Error"))} for status, text in REFUSALS.items()}
    reading = {status: refused[status] for status in ("400", "401", "403", "429", "503")}
    waiting: Schema = {"200": {"description": "What waits.", "content": _json(_ref("LabelQueue"))}}
    number = {"type": "integer", "minimum": 1, "maximum": MOST_SHOWN}
    parameters = [
        {"name": "limit", "in": "query", "schema": number, "description": "So many at most."},
        {"name": "reviewer", "in": "query", "schema": {"type": "string"}, "description": "Who judges."},
    ]
    return {
        QUEUE: {
            "get": {
                "operationId": "labels_queue",
                "summary": "See what waits to be judged.",
                "parameters": parameters,
                "responses": waiting | reading,
            }
        },
        LABELS: {
            "post": {
                "operationId": "labels",
                "summary": "Judge items of the labelling queue.",
                "requestBody": {"required": True, "content": _json({"anyOf": [_ref("label"), _many(_ref("label"))]})},
                "responses": {"200": {"description": "Each item's own answer.", "content": _json(_ref("Results"))}}
                | refused,
            }
        },
    }


def _label_queue() -> Schema:
    message = {"type": "object"}
    answer = {"type": "object", "properties": {"answer": {"enum": list(LETTERS)}, "message": message}}
    item = {
        "type": "object",
        "properties": {
            "item_id": {"type": "string"},
            "agent": {"type": ["string", "null"]},
            "at": {"type": "string"},
            "reason": {"enum": list(ORDER)},
            "messages": {"type": "array", "items": message},
            "context": {"type": "array", "items": {"type": "string"}},
            "answers": {"type": "array", "items": answer, "minItems": 1, "maxItems": 2},
        },
        "required": ["item_id", "agent", "at", "reason", "messages", "context", "answers"],
        "additionalProperties": False,
    }
    return {
        "type": "object",
        "properties": {
            "object": {"const": "list"},
            "data": {"type": "array", "items": item},
            "waiting": {"type": "integer", "description": "How many there are for this reviewer."},
        },
        "required": ["object", "data", "waiting"],
    }


def _many(one: Schema) -> Schema:
    return {
        "type": "object",
        "properties": {"items": {"type": "array", "items": one}},
        "required": ["items"],
        "additionalProperties": False,
    }


def _json(schema: Schema) -> Schema:
    return {"application/json": {"schema": schema}}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _error() -> Schema:
    return {"type": "object", "properties": {"error": _error_object()}, "required": ["error"]}


def _error_object() -> Schema:
    text_or_null = {"type": ["string", "null"]}
    return {
        "type": "object",
        "properties": {
            "message": {"type": "string"},
            "type": {"type": "string"},
            "param": text_or_null,
            "code": text_or_null,
        },
        "required": ["message", "type", "param", "code"],
    }


def _results() -> Schema:
    result = {
        "type": "object",
        "properties": {
            "event_id": {"type": ["string", "null"]},
            "status": {"enum": ["accepted", "duplicate", "rejected"]},
            "error": _error_object(),
        },
        "required": ["event_id", "status"],
    }
    return {
        "type": "object",
        "properties": {"object": {"const": "list"}, "data": {"type": "array", "items": result}},
        "required": ["object", "data"],
    }


def _export_response() -> Schema:
    fields = {name: {"type": "string"} for name in ("rejectedSpans", "errorMessage")}
    partial = {"type": "object", "properties": fields}
    return {"type": "object", "properties": {"partialSuccess": partial}, "additionalProperties": False}
