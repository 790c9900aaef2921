"""Tool calls in an answer, in the form Hermes and Qwen models write: JSON between `<tool_call>` tags."""

import json
import re
import uuid
from typing import Any

_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)


def parse_tool_calls(text: str) -> tuple[str, list[dict[str, Any]]]:
    """The text outside the calls, and the calls as OpenAI's `tool_calls`.

    A call that is not valid JSON with a name stays in the text, where its reader can see it.
    """
    calls: list[dict[str, Any]] = []

    def take(match: re.Match[str]) -> str:
        call = _call(match[1])
        if call is None:
            return match[0]
        calls.append(call)
        return ""

    rest = _CALL.sub(take, text)
    return (rest.strip() if calls else text), calls


def _call(text: str) -> dict[str, Any] | None:
    try:
        parsed = json.loads(text)
    except ValueError:
        return None
    if not isinstance(parsed.get("name"), str):
        return None
    arguments = parsed.get("arguments", {})
    shown = arguments if isinstance(arguments, str) else json.dumps(arguments)
    function = {"name": parsed["name"], "arguments": shown}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
