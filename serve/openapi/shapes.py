"""What the descriptions of all routes are made of: operations, refusals, OpenAI's error, pages of a list."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

Schema = dict[str, Any]

REFUSALS = {
    "400": "Something in the request breaks a rule; `param` names it.",
    "401": "No key, or a wrong one.",
    "403": "The key lacks the scope, or the feature is switched off.",
    "404": "There is nothing of this name, or it is another tenant's.",
    "405": "Another method is asked of this path.",
    "408": "The body did not arrive in time.",
    "409": "Its state does not allow that.",
    "413": "The body is too long.",
    "415": "The content type or the content-encoding is not understood.",
    "422": "The result is too long, or the idempotency key stands for another call.",
    "429": "Too much waits already, or a limit is reached; come again after `retry-after`.",
    "4XX": "The engine refuses the request.",
    "500": "A tool failed; `message` names its kind of error.",
    "502": "The engine failed.",
    "503": "It cannot be answered now; come again after `retry-after`.",
    "504": "The engine, or the tool, did not answer in time.",
}
KEYED = ("401", "403", "429", "503")
"""What every route with a key may answer."""
OF_A_BODY = ("400", "408", "413", "415")
"""What every route with a body may answer."""
TEXT: Schema = {"type": "string"}
WHOLE: Schema = {"type": "integer"}
NUMBER: Schema = {"type": "number"}
FLAG: Schema = {"type": "boolean"}
OBJECT: Schema = {"type": "object"}


def operation(
    name: str,
    summary: str,
    answer: Schema,
    *,
    refused: Sequence[str] = (),
    body: Schema | None = None,
    parameters: Sequence[Schema] = (),
    description: str | None = None,
) -> Schema:
    """One operation with a key.

    `answer` is the 200 response; `body` maps content types to what is taken; `refused` are statuses besides `KEYED` and
    those of every body.
    """
    refused = refused if body is None else (*refused, *OF_A_BODY)
    found: Schema = {
        "operationId": name,
        "summary": summary,
        "responses": {"200": answer} | refusals((*refused, *KEYED)),
    }
    if description is not None:
        found["description"] = description
    if body is not None:
        found["requestBody"] = {"required": True, "content": body}
    if parameters:
        found["parameters"] = list(parameters)
    return found


def refusals(statuses: Iterable[str]) -> Schema:
    """Responses with OpenAI's error."""
    return {s: {"description": REFUSALS[s], "content": as_json(ref("Error"))} for s in sorted(set(statuses))}


def answered(description: str, schema: Schema) -> Schema:
    """A response with a JSON document."""
    return {"description": description, "content": as_json(schema)}


def as_json(schema: Schema) -> Schema:
    """Content that is a JSON document."""
    return {"application/json": {"schema": schema}}


def ref(name: str) -> Schema:
    """A schema of the document by its name."""
    return {"$ref": f"#/components/schemas/{name}"}


def of_model(model: type[BaseModel], shared: Schema) -> Schema:
    """The schema of a pydantic model; schemas that it refers to are added to `shared`."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    shared |= schema.pop("$defs", {})
    return schema


def closed(properties: Mapping[str, Schema]) -> Schema:
    """An object that has exactly these fields."""
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(properties),
        "additionalProperties": False,
    }


def many(one: Schema) -> Schema:
    """A batch of items."""
    return closed({"items": {"type": "array", "items": one}})


def listed(one: Schema) -> Schema:
    """A list that is answered whole."""
    return closed({"object": {"const": "list"}, "data": {"type": "array", "items": one}})


def page(one: Schema) -> Schema:
    """One page of a list."""
    ends = {"has_more": FLAG, "first_id": maybe(TEXT), "last_id": maybe(TEXT)}
    properties: dict[str, Schema] = {"object": {"const": "list"}, "data": {"type": "array", "items": one}}
    return closed(properties | ends)


def maybe(schema: Schema) -> Schema:
    """This, or null."""
    return {"anyOf": [schema, {"type": "null"}]}


def map_of(values: Schema) -> Schema:
    """An object whose fields are not known beforehand."""
    return {"type": "object", "additionalProperties": values}


def events() -> Schema:
    """Content that is server-sent events; each holds a JSON document, but for a last `[DONE]`."""
    return {"text/event-stream": {"schema": {"type": "object", "properties": {"data": TEXT}, "required": ["data"]}}}


def in_path(name: str, description: str) -> Schema:
    """A parameter that is part of the path."""
    schema = {"type": "string", "minLength": 1, "pattern": r"^[^\x00]+$"}
    return {"name": name, "in": "path", "required": True, "schema": schema, "description": description}


def in_query(name: str, schema: Schema, description: str) -> Schema:
    """A parameter behind the path that may be left out."""
    return {"name": name, "in": "query", "schema": schema, "description": description}


def in_header(name: str, description: str, longest: int) -> Schema:
    """A header that may be left out."""
    schema = {"type": "string", "maxLength": longest}
    return {"name": name, "in": "header", "schema": schema, "description": description}


def error() -> Schema:
    """What every refusal carries."""
    return {"type": "object", "properties": {"error": error_object()}, "required": ["error"]}


def error_object() -> Schema:
    """OpenAI's error object."""
    return {
        "type": "object",
        "properties": {"message": TEXT, "type": TEXT, "param": maybe(TEXT), "code": maybe(TEXT)},
        "required": ["message", "type", "param", "code"],
    }


def results() -> Schema:
    """What became of each item of a batch."""
    result = {
        "type": "object",
        "properties": {
            "event_id": maybe(TEXT),
            "status": {"enum": ["accepted", "duplicate", "rejected"]},
            "error": error_object(),
        },
        "required": ["event_id", "status"],
    }
    return {
        "type": "object",
        "properties": {"object": {"const": "list"}, "data": {"type": "array", "items": result}},
        "required": ["object", "data"],
    }
