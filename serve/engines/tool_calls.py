"""Tool calls in an answer, as OpenAI's clients want them."""

import uuid
from typing import Any

from data.tool_calls import describe_call, take_calls


def parse_tool_calls(text: str) -> tuple[str, list[dict[str, Any]]]:
    """The text outside the calls, and the calls as OpenAI's `tool_calls`, each with an id of its own."""
    rest, calls = take_calls(text)
    return rest, [{"id": f"call_{uuid.uuid4().hex[:24]}", **describe_call(call)} for call in calls]
