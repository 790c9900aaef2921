"""How likely the version that answered found its own answer: what off-policy evaluation weighs rewards by."""

import math
from collections.abc import Mapping
from typing import Any

PLAIN: dict[str, Any] = {
    "temperature": 1,
    "top_p": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "response_format": {"type": "text"},
    "tool_choice": "auto",
    "stop": None,
}
"""Sampling under which an answer is drawn from the log-probabilities that engines record: those before temperature,
top-p and constraints."""


def answer_logprob(body: Mapping[str, Any]) -> float | None:
    """Natural log of the probability with which an interaction's answer was drawn, its end token included.

    `None` where nobody recorded it, where the answer was cut off or calls tools, or where sampling was not plain.
    """
    logprobs = body.get("completion_logprobs") or []
    if not logprobs or len(logprobs) != len(body.get("completion_token_ids") or ()):
        return None
    if body.get("finish_reason") != "stop" or (body.get("response") or {}).get("tool_calls"):
        return None
    parameters = body.get("parameters") or {}
    if any(parameters.get(name, plain) != plain for name, plain in PLAIN.items()):
        return None
    return math.fsum(logprobs)
