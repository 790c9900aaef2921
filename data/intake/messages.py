"""What a conversation must look like to be kept: readers of the log take these parts as they are."""

from collections.abc import Iterable, Mapping
from typing import Any

from cluster.errors import InputError

REMEDY = "send OpenAI chat messages"


def check_messages(messages: Iterable[Mapping[str, Any]]) -> None:
    """Raise `InputError` with the place of the first part that is none of a chat message."""
    for place, message in enumerate(messages):
        role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
        if not isinstance(role, str):
            raise InputError(f"messages.{place}.role", role, "must be a string", REMEDY)
        if not isinstance(content, str | None) and not _are_objects(content):
            raise InputError(f"messages.{place}.content", content, "must be a text or a list of parts", REMEDY)
        if calls is not None and not (_are_objects(calls) and _are_objects([c.get("function", {}) for c in calls])):
            raise InputError(f"messages.{place}.tool_calls", calls, "must be a list of calls", REMEDY)


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(part, dict) for part in value)
