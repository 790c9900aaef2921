"""Stage 4, filter: what may not become an example, with the reason for each row left out."""

from typing import Any

import orjson
import pyarrow as pa

from cluster.settings.curation import FilterSettings
from data.detectors import Detector, no_toxicity, ungrounded_share
from data.events import Message
from data.stages import Dropped, keep
from data.template import content_text

TOXIC = 0.5  # a detector's probability above which it means yes


def filter_rows(
    table: pa.Table, settings: FilterSettings, toxicity: Detector = no_toxicity
) -> tuple[pa.Table, Dropped]:
    """The rows that may become examples."""
    columns = ("messages", "response", "flags", "answer_tokens", "finish_reason", "arm", "context")
    reasons = []
    for values in zip(*(table[name].to_pylist() for name in columns), strict=True):
        row = dict(zip(columns, values, strict=True))
        for name in ("messages", "response", "flags", "context"):
            row[name] = orjson.loads(row[name]) if row[name] else None
        reasons.append(reason_against(row, settings, toxicity))
    return keep(table, reasons)


def reason_against(row: dict[str, Any], settings: FilterSettings, toxicity: Detector = no_toxicity) -> str | None:
    """Why a row may not become an example, or `None`."""
    return (
        _flag_reason(row["flags"] or {}, row["arm"], settings)
        or _conversation_reason(row["messages"], row["response"])
        or _length_reason(row["response"], row["answer_tokens"], settings)
        or _content_reason(content_text(row["response"]), row["context"] or [], settings, toxicity)
    )


def _flag_reason(flags: dict[str, Any], arm: str | None, settings: FilterSettings) -> str | None:
    if (flags.get("shadow") or arm == "shadow") and not settings.allow_shadow:
        return "shadow"
    if flags.get("timeout"):
        return "timeout"
    if flags.get("error"):
        return "request failed"
    if flags.get("safety"):
        return "safety flag"
    return "client went away" if flags.get("disconnected") else None


def _conversation_reason(messages: list[Message], response: Message | None) -> str | None:
    """A prompt that ends with a user or a tool, an answer, and no open or failed tool call."""
    if response is None:
        return "no answer"
    if not any(message["role"] == "user" and content_text(message).strip() for message in messages):
        return "no question"
    if messages[-1]["role"] not in ("user", "tool"):
        return "conversation incomplete"
    if not content_text(response).strip():
        return "tool run unfinished" if response.get("tool_calls") else "empty answer"
    return _tool_reason(messages)


def _tool_reason(messages: list[Message]) -> str | None:
    opened: set[str] = set()
    for message in messages:
        opened |= {call.get("id", "") for call in message.get("tool_calls") or []}
        if message["role"] == "tool":
            opened.discard(message.get("tool_call_id", ""))
            if is_tool_error(content_text(message)):
                return "tool run failed"
    return "tool run unfinished" if opened else None


def is_tool_error(result: str) -> bool:
    """True when a tool's result says that it failed: an `error` field, or a text that begins so."""
    try:
        parsed = orjson.loads(result)
    except ValueError:
        return result.lstrip().lower().startswith(("error", "traceback"))
    return isinstance(parsed, dict) and bool(parsed.get("error"))


def _length_reason(response: Message, answer_tokens: int, settings: FilterSettings) -> str | None:
    tokens = answer_tokens or round(len(content_text(response)) / settings.characters_per_token)
    if tokens < settings.min_answer_tokens:
        return "answer too short"
    return "answer too long" if tokens > settings.max_answer_tokens else None


def _content_reason(answer: str, context: list[str], settings: FilterSettings, toxicity: Detector) -> str | None:
    if settings.toxicity and (toxicity(answer, context) or 0.0) > TOXIC:
        return "toxic"
    if settings.ungrounded:
        share = ungrounded_share(answer, context, settings.support_overlap)
        if share is not None and share > settings.ungrounded_share:
            return "ungrounded"
    return None
