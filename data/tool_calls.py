"""Tool calls: what an answer asks for, and what a recorded conversation says came back."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from data.interaction_bodies import Message

_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)


@dataclass(frozen=True)
class ToolCall:
    """One call an agent makes."""

    name: str
    arguments: dict[str, Any]

    @property
    def key(self) -> str:
        """Equal for calls that ask for the same."""
        return json.dumps([self.name, self.arguments], sort_keys=True)


def parse_calls(text: str) -> list[ToolCall]:
    """The calls in an answer."""
    return take_calls(text)[1]


def take_calls(text: str) -> tuple[str, list[ToolCall]]:
    """The text outside the calls, and the calls, in the form Hermes and Qwen models write: JSON between
    `<tool_call>` tags.

    What is no valid JSON with a name is no call and stays in the text, where its reader can see it.
    """
    calls: list[ToolCall] = []

    def take(match: re.Match[str]) -> str:
        call = _call(match[1])
        if call is None:
            return match[0]
        calls.append(call)
        return ""

    rest = _CALL.sub(take, text)
    return (rest.strip() if calls else text), calls


def calls_in(text: str) -> list[ToolCall]:
    """The calls in an answer, or the one call that the whole answer is: some models write no tags."""
    return parse_calls(text) or [call for call in [_call(text)] if call is not None]


def _call(text: str) -> ToolCall | None:
    try:
        parsed = json.loads(text)
        if not isinstance(parsed, dict):
            return None
        name, arguments = parsed.get("name"), parsed.get("arguments", {})
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        return None
    return ToolCall(name, arguments) if isinstance(name, str) and isinstance(arguments, dict) else None


def describe_call(call: ToolCall) -> dict[str, Any]:
    """A call in OpenAI's shape."""
    return {"type": "function", "function": {"name": call.name, "arguments": json.dumps(call.arguments)}}


def recorded_results(messages: Sequence[Message]) -> list[tuple[ToolCall, str]]:
    """Each call of a conversation with the result that followed; by id where there are ids, else in order."""
    found: list[tuple[ToolCall, str]] = []
    waiting: list[tuple[str | None, ToolCall]] = []
    for message in messages:
        if message["role"] == "assistant":
            waiting = [asked for call in message.get("tool_calls") or [] if (asked := _recorded(call)) is not None]
        elif message["role"] == "tool" and waiting:
            place = next((n for n, (name, _) in enumerate(waiting) if name and name == message.get("tool_call_id")), 0)
            found.append((waiting.pop(place)[1], str(message.get("content") or "")))
    return found


def _recorded(call: dict[str, Any]) -> tuple[str | None, ToolCall] | None:
    function = call.get("function") or call
    made = _call(json.dumps({"name": function.get("name"), "arguments": function.get("arguments") or {}}))
    return None if made is None else (call.get("id"), made)
