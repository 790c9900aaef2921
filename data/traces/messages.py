"""The messages of a GenAI span, in whichever of the conventions' forms, as OpenAI chat messages."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import orjson

from cluster.errors import InputError
from data.interaction_bodies import Message
from data.traces.otlp import Attributes, Span

DETAILS = "gen_ai.client.inference.operation.details"
INPUT, OUTPUT, SYSTEM = "gen_ai.input.messages", "gen_ai.output.messages", "gen_ai.system_instructions"
MESSAGE_EVENTS = {
    "gen_ai.system.message": "system",
    "gen_ai.user.message": "user",
    "gen_ai.assistant.message": "assistant",
    "gen_ai.tool.message": "tool",
}
CHOICE = "gen_ai.choice"
FINISH_REASONS = {"tool_call": "tool_calls", "max_tokens": "length", "end_turn": "stop"}
"""Words for what OpenAI calls otherwise."""
MOST_FLAT = 1_000  # messages of one span in flat attributes
REMEDY = "follow the GenAI semantic conventions"


@dataclass(frozen=True, slots=True)
class Conversation:
    """What was asked and answered."""

    messages: list[Message]
    response: Message | None
    finish_reason: str | None = None

    @property
    def whole(self) -> list[Message]:
        """Question and answer."""
        return self.messages + ([] if self.response is None else [self.response])


def conversation(span: Span) -> Conversation:
    """The messages of a span; empty where content is not captured.

    Raises:
        InputError: an attribute does not hold what the conventions say.
    """
    attributes = dict(span.attributes)
    for event in span.events:
        if event.name == DETAILS:
            attributes |= event.attributes
    if INPUT in attributes or OUTPUT in attributes:
        messages, response, reason = _from_attributes(attributes)
    elif any(e.name in MESSAGE_EVENTS or e.name == CHOICE for e in span.events):
        messages, response, reason = _from_events(span)
    else:
        messages, response, reason = _from_flat(attributes)
    reasons = attributes.get("gen_ai.response.finish_reasons")
    first = reasons[0] if isinstance(reasons, list) and reasons else reason
    return Conversation(messages, response, FINISH_REASONS.get(first, first) if isinstance(first, str) else None)


def parsed(value: Any) -> Any:
    """An attribute that may be structured, or JSON text of it; other text stands for itself."""
    if not isinstance(value, str):
        return value
    try:
        return orjson.loads(value)
    except orjson.JSONDecodeError:
        return value


def tool_definitions(value: Any) -> list[dict[str, Any]] | None:
    """Tools offered, as OpenAI describes them."""
    tools = parsed(value)
    if not isinstance(tools, list):
        return None
    return [
        tool if "function" in tool else {"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}}
        for tool in tools
        if isinstance(tool, dict)
    ]


def _from_attributes(attributes: Attributes) -> tuple[list[Message], Message | None, Any]:
    messages = list(_messages(_list(attributes.get(INPUT), INPUT), INPUT))
    system = parsed(attributes.get(SYSTEM))
    if system:
        parts = system if isinstance(system, list) else [{"type": "text", "content": str(system)}]
        messages = [*_message("system", parts, SYSTEM), *messages]
    output = _list(attributes.get(OUTPUT), OUTPUT)
    answers = list(_messages(output[:1], OUTPUT))
    reason = output[0].get("finish_reason") if output and isinstance(output[0], dict) else None
    return messages, answers[0] if answers else None, reason


def _list(value: Any, place: str) -> list[Any]:
    found = parsed(value)
    if found is None:
        return []
    if isinstance(found, str):
        return [{"role": "user" if place == INPUT else "assistant", "content": found}]
    if isinstance(found, dict):
        return [found]
    if not isinstance(found, list):
        raise InputError(place, found, "must be a list of messages", REMEDY)
    return found


def _messages(values: list[Any], place: str) -> Iterator[Message]:
    for value in values:
        if not isinstance(value, dict):
            raise InputError(place, value, "must hold messages", REMEDY)
        role = value.get("role", "user" if place == INPUT else "assistant")
        if not isinstance(role, str):
            raise InputError(f"{place}.role", role, "must be text", REMEDY)
        if "parts" in value:
            yield from _message(role, value["parts"], place)
        else:
            yield {k: v for k, v in value.items() if k != "finish_reason" and v is not None} | {"role": role}


def _message(role: str, parts: Any, place: str) -> Iterator[Message]:
    """One message; results of tools become messages of their own, as OpenAI has them."""
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise InputError(f"{place}.parts", parts, "must be a list of parts", REMEDY)
    content: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] = []
    reasoning: list[str] = []
    results: list[Message] = []
    for part in parts:
        kind = part.get("type")
        if kind == "text":
            content.append({"type": "text", "text": str(part.get("content", ""))})
        elif kind == "tool_call":
            calls.append(_call(part))
        elif kind == "tool_call_response":
            result = part.get("response", part.get("result"))
            results.append({"role": "tool", "tool_call_id": str(part.get("id") or ""), "content": as_text(result)})
        elif kind == "reasoning":
            reasoning.append(str(part.get("content", "")))
        else:
            content.append(part)
    if content or calls or reasoning or not results:
        yield _assembled(role, content, calls, reasoning)
    yield from results


def _assembled(role: str, content: list[dict[str, Any]], calls: list[Any], reasoning: list[str]) -> Message:
    message: Message = {"role": role}
    if all(part.get("type") == "text" for part in content):
        message["content"] = "\n".join(part["text"] for part in content) if content else None
    else:
        message["content"] = content
    if message["content"] is None and role != "assistant":
        message["content"] = ""
    if calls:
        message["tool_calls"] = calls
    if reasoning:
        message["reasoning_content"] = "\n".join(reasoning)
    return message


def _call(part: dict[str, Any]) -> dict[str, Any]:
    function = {"name": str(part.get("name") or ""), "arguments": as_text(part.get("arguments", {}))}
    return {"id": str(part.get("id") or ""), "type": "function", "function": function}


def as_text(value: Any) -> str:
    """Text as it is, anything else as JSON."""
    if isinstance(value, str):
        return value
    try:
        return orjson.dumps(value).decode()
    except TypeError:
        raise InputError("arguments", "…", "is nested too deeply", "flatten it") from None


def _from_events(span: Span) -> tuple[list[Message], Message | None, Any]:
    messages: list[Message] = []
    response, reason = None, None
    for event in span.events:
        if event.name in MESSAGE_EVENTS:
            messages.append(_event_message(event.attributes, MESSAGE_EVENTS[event.name]))
        elif event.name == CHOICE and response is None:
            inner = parsed(event.attributes.get("message"))
            body = inner if isinstance(inner, dict) else {**event.attributes, "content": inner}
            if not isinstance(inner, dict) and inner is None:
                body = event.attributes
            response, reason = _event_message(body, "assistant"), event.attributes.get("finish_reason")
    return messages, response, reason


def _event_message(body: dict[str, Any], role: str) -> Message:
    message: Message = {"role": role, "content": parsed_text(body.get("content"))}
    calls = parsed(body.get("tool_calls"))
    if isinstance(calls, list):
        message["tool_calls"] = [call for call in calls if isinstance(call, dict)]
    if role == "tool":
        message["tool_call_id"] = str(body.get("id") or "")
    return message


def parsed_text(value: Any) -> str | None:
    """Content of a message as text."""
    return None if value is None else as_text(value)


def _from_flat(attributes: Attributes) -> tuple[list[Message], Message | None, Any]:
    messages = list(_flat(attributes, "gen_ai.prompt", "user"))
    answers = list(_flat(attributes, "gen_ai.completion", "assistant"))
    reason = attributes.get("gen_ai.completion.0.finish_reason")
    return messages, answers[0] if answers else None, reason


def _flat(attributes: Attributes, prefix: str, role: str) -> Iterator[Message]:
    for number in range(MOST_FLAT):
        place = f"{prefix}.{number}"
        content, calls = attributes.get(f"{place}.content"), list(_flat_calls(attributes, place))
        if content is None and not calls and f"{place}.role" not in attributes:
            return
        message: Message = {"role": str(attributes.get(f"{place}.role", role)), "content": parsed_text(content)}
        if calls:
            message["tool_calls"] = calls
        if f"{place}.tool_call_id" in attributes:
            message["tool_call_id"] = str(attributes[f"{place}.tool_call_id"])
        yield message


def _flat_calls(attributes: Attributes, place: str) -> Iterator[dict[str, Any]]:
    for number in range(MOST_FLAT):
        call = f"{place}.tool_calls.{number}"
        if f"{call}.name" not in attributes:
            return
        yield _call({name: attributes.get(f"{call}.{name}") for name in ("id", "name", "arguments")})
