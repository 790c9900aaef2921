"""Tool calls that were reported beside a conversation become turns of it.

An agent may send only what the user asked and what it said, and report its tools as events of their own or in
the answer's `tool_calls`. What it learns from must still show the calls and their results, where they happened.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import orjson

from data.interaction_bodies import Message

Call = dict[str, Any]
"""A body of `data.events.ToolCall`, in order of time among its like."""


def with_tool_turns(messages: Sequence[Message], response: Message | None, calls: Iterable[Call]) -> list[Message]:
    """The prompt of an answer with the calls that were made on the way to it.

    A call that the prompt asks for gets its result behind it; one that nobody asks for gets a turn of its own
    before the answer. Left alone are calls whose result is there, those without an id beside results of the same
    turn, and those that the answer itself asks for: their results belong to the next prompt.
    """
    told = {str(m.get("tool_call_id")) for m in messages if m.get("role") == "tool"}
    told |= asked_for(response or {})
    ends_with_result = bool(messages) and messages[-1].get("role") == "tool"
    made = list(messages)
    for number, call in enumerate(calls, 1):
        name = str(call.get("call_id") or f"call_{number}")
        if name in told or (ends_with_result and call.get("call_id") is None):
            continue
        told.add(name)
        result = {"role": "tool", "tool_call_id": name, "content": result_text(call)}
        at = _after_wish(made, name)
        if at is None:
            made += [_wish(name, call), result]
        else:
            made.insert(at, result)
    return made


def asked_for(message: Message) -> set[str]:
    """Ids of the calls that a message asks for."""
    return {str(call.get("id")) for call in message.get("tool_calls") or []}


def result_text(call: Call) -> str:
    """What a tool message says: the result, or an object with the error, which marks a failed run."""
    if call.get("error") is not None:
        return _text({"error": call["error"]})
    result = call.get("result")
    return result if isinstance(result, str) else _text(result)


def _after_wish(messages: Sequence[Message], name: str) -> int | None:
    """Behind the results that follow the turn which asks for a call; `None` where no turn does."""
    for index, message in enumerate(messages, 1):
        if name in asked_for(message):
            while index < len(messages) and messages[index].get("role") == "tool":
                index += 1
            return index
    return None


def _wish(name: str, call: Call) -> Message:
    arguments = call.get("arguments")
    text = arguments if isinstance(arguments, str) else _text(arguments or {})
    function = {"name": call["name"], "arguments": text}
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": name, "type": "function", "function": function}],
    }


def _text(value: Any) -> str:
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS).decode()
