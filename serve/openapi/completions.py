"""Chats and continued texts, whole or streamed."""

from serve.chat import MODALITY_CHARACTERS, SESSION_CHARACTERS, TIER_CHARACTERS, USER_CHARACTERS
from serve.exchange import CHAT, TEXT
from serve.openapi import shapes
from serve.openapi.shapes import (
    FLAG,
    NUMBER,
    OBJECT,
    WHOLE,
    Schema,
    as_json,
    events,
    in_header,
    maybe,
    operation,
    ref,
)

REFUSED = ("404", "4XX", "502", "504")
STREAMED = (
    "With `stream: true` the answer comes as server-sent events: pieces of it as they are made, then `data: [DONE]`. "
    "An engine that fails meanwhile ends the stream with an event that holds `error`. Fields that are not named here "
    "go to the engine as they are."
)
PARAMETERS = [
    in_header("x-rayloop-user", "Who asks, where the body does not say; kept as a pseudonym.", USER_CHARACTERS),
    in_header("x-rayloop-session", "The conversation that this belongs to.", SESSION_CHARACTERS),
    in_header("x-rayloop-modality", "`text`, `voice`, `sms` or a word of your own.", MODALITY_CHARACTERS),
    in_header("x-rayloop-user-tier", "The tier of who asks.", TIER_CHARACTERS),
]
HEADERS = {
    "x-rayloop-interaction": "Names this answer: feedback about it carries this id.",
    "x-rayloop-arm": "stable, candidate or none.",
    "x-rayloop-version": "The version that answered.",
    "x-rayloop-digest": "The adapter of that version.",
    "x-rayloop-experiment": "The experiment that the request takes part in.",
}


def paths(shared: Schema) -> Schema:
    """The two routes."""
    shared["ChatRequest"] = _request({"messages": {"type": "array", "items": _message(), "minItems": 1}})
    shared["TextRequest"] = _request({"prompt": _prompt()})
    shared["ChatCompletion"] = _completion("chat.completion", {"message": OBJECT})
    shared["TextCompletion"] = _completion("text_completion", {"text": shapes.TEXT})
    return {
        CHAT: {"post": _operation("chat_completions", "Answer a conversation.", "ChatRequest", "ChatCompletion")},
        TEXT: {"post": _operation("completions", "Continue a text.", "TextRequest", "TextCompletion")},
    }


def _operation(name: str, summary: str, asked: str, answered: str) -> Schema:
    content = as_json(ref(answered)) | events()
    headers = {name: {"description": text, "schema": shapes.TEXT} for name, text in HEADERS.items()}
    return operation(
        name,
        summary,
        {"description": "The answer, whole or in pieces.", "content": content, "headers": headers},
        refused=REFUSED,
        body=as_json(ref(asked)),
        parameters=PARAMETERS,
        description=STREAMED,
    )


def _request(asked: Schema) -> Schema:
    """What the router reads; the rest is the engine's."""
    properties = {
        "model": {"type": "string", "minLength": 1, "description": "An agent, a version or a fine-tuned model."},
        "stream": maybe(FLAG),
        "user": maybe({"type": "string", "maxLength": USER_CHARACTERS}),
    }
    return {"type": "object", "properties": properties | asked, "required": ["model", *asked]}


def _message() -> Schema:
    """What readers of the log rely on; the rest is the engine's."""
    parts = {"type": "array", "items": OBJECT}
    calls = {"type": "array", "items": {"type": "object", "properties": {"function": OBJECT}}}
    properties = {
        "role": shapes.TEXT,
        "content": {"anyOf": [shapes.TEXT, parts, {"type": "null"}]},
        "tool_calls": maybe(calls),
    }
    return {"type": "object", "properties": properties, "required": ["role"]}


def _prompt() -> Schema:
    """A text, several, or token ids."""
    return {"anyOf": [{"type": "string", "minLength": 1}, {"type": "array", "minItems": 1}]}


def _completion(kind: str, said: Schema) -> Schema:
    choice = {
        "type": "object",
        "properties": {"index": WHOLE, "finish_reason": maybe(shapes.TEXT), **said},
        "required": ["index", *said],
    }
    properties = {
        "id": shapes.TEXT,
        "object": {"const": kind},
        "created": NUMBER,
        "model": shapes.TEXT | {"description": "The version that answered."},
        "choices": {"type": "array", "items": choice, "minItems": 1},
        "usage": OBJECT,
    }
    return {"type": "object", "properties": properties, "required": ["id", "object", "model", "choices"]}
