"""What clients report: feedback, behaviour, outcomes, trajectories, traces."""

from data.events import BODIES
from data.feedback import SERVER_FIELDS
from data.intake.batches import TRACE_KINDS
from data.intake.items import NEEDS_INTERACTION, Envelope
from data.interaction_bodies import ASSIGNMENT_FIELDS
from serve.intake_http import KINDS
from serve.openapi.shapes import TEXT, Schema, answered, as_json, many, of_model, operation, ref

SUMMARIES = {
    "/v1/feedback": "Say what people thought of answers.",
    "/v1/behaviour": "Say what people did after answers.",
    "/v1/outcomes": "Report what a product measures itself.",
    "/v1/trajectories": "Report conversations of an agent with tools, whole.",
    "/v1/traces": "Report interactions, tool calls and trajectories of agents elsewhere; also OTLP/HTTP.",
}


def paths(shared: Schema) -> Schema:
    """Each route takes one item or `{"items": [...]}` and answers each item on its own."""
    shared["ExportResponse"] = _export_response()
    for kind in filter(None, KINDS.values()):
        shared[kind] = item_schema(kind, shared)
    for kind in TRACE_KINDS:
        shared[f"traced_{kind}"] = item_schema(kind, shared, named=True)
    return {path: {"post": _operation(path, kind)} for path, kind in KINDS.items()}


def item_schema(kind: str, shared: Schema, *, named: bool = False) -> Schema:
    """The JSON schema of one item; schemas that it refers to are added to `shared`.

    `named`: the item says its kind, as part of a trace.
    """
    schema = of_model(BODIES[kind], shared)
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
    name = path.removeprefix("/v1/")
    if kind is None:
        return _traces(name, path)
    taken = as_json({"anyOf": [ref(kind), many(ref(kind))]})
    answer = answered("Each item's own answer.", ref("Results"))
    return operation(name, SUMMARIES[path], answer, body=taken)


def _traces(name: str, path: str) -> Schema:
    """The route that also speaks protobuf, and then answers in it."""
    one = {"anyOf": [ref(f"traced_{kind}") for kind in TRACE_KINDS]}
    protobuf = {"application/x-protobuf": {"schema": {"type": "string", "format": "binary"}}}
    taken = as_json({"anyOf": [one, many(one)]}) | protobuf
    answer = answered("Each item's own answer.", {"anyOf": [ref("Results"), ref("ExportResponse")]})
    found = operation(name, SUMMARIES[path], answer, body=taken)
    for response in found["responses"].values():
        response["content"]["application/x-protobuf"] = {}
    return found


def _export_response() -> Schema:
    fields = dict.fromkeys(("rejectedSpans", "errorMessage"), TEXT)
    partial = {"type": "object", "properties": fields}
    return {"type": "object", "properties": {"partialSuccess": partial}, "additionalProperties": False}
