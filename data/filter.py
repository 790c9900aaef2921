"""Stage 4, filter: what may not become an example, with the reason for each row left out.

The cheap rules look at every row; only what passes them is shown to the detectors, all rows of a block at once.
"""

from typing import Any

import orjson
import pyarrow as pa

from cluster.settings.curation import CurationSettings, FilterSettings
from data.detectors.interface import YES, Item
from data.detectors.make import Detectors, detectors
from data.interaction_bodies import Message
from data.stages import Dropped, keep
from data.template import content_text

Row = dict[str, Any]


def filter_rows(
    table: pa.Table, settings: CurationSettings, asked: Detectors | None = None
) -> tuple[pa.Table, Dropped]:
    """The rows that may become examples; `asked` are other detectors than those the settings name."""
    asked = asked or detectors(settings.detectors)
    columns = ("messages", "response", "tail", "flags", "answer_tokens", "finish_reason", "arm", "context")
    reasons: list[str | None] = []
    items: list[tuple[int, Item]] = []
    for index, values in enumerate(zip(*(table[name].to_pylist() for name in columns), strict=True)):
        row = dict(zip(columns, values, strict=True))
        for name in ("messages", "response", "tail", "flags", "context"):
            row[name] = orjson.loads(row[name]) if row[name] else None
        reasons.append(reason_against(row, settings.filter))
        if reasons[-1] is None:
            items.append((index, Item(content_text(row["response"]), row["context"] or [])))
    found = content_reasons([item for _, item in items], settings.filter, asked)
    for (index, _), reason in zip(items, found, strict=True):
        reasons[index] = reason
    return keep(table, reasons)


def reason_against(row: Row, settings: FilterSettings) -> str | None:
    """Why a row may not become an example, whatever its answer says; `None` when it may."""
    return (
        _flag_reason(row["flags"] or {}, row["arm"], settings)
        or _conversation_reason(row["messages"], row["response"], row["tail"] or [])
        or _length_reason(row["response"], row["answer_tokens"], settings)
    )


def content_reasons(items: list[Item], settings: FilterSettings, detectors: Detectors) -> list[str | None]:
    """Why each answer may not become an example because of what it says, or `None`."""
    asked = [
        ("toxic", settings.toxicity, detectors.toxicity, YES),
        ("refusal", settings.refusal, detectors.refusal, YES),
        ("ungrounded", settings.ungrounded, detectors.ungrounded, settings.ungrounded_share),
    ]
    reasons: list[str | None] = [None] * len(items)
    for name, wanted, detector, least in asked:
        for index, badness in enumerate(detector(items) if wanted and items else []):
            if reasons[index] is None and badness is not None and badness > least:
                reasons[index] = name
    return reasons


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


def _conversation_reason(messages: list[Message], response: Message | None, tail: list[Message]) -> str | None:
    """A prompt that ends with a user or a tool, an answer, and no open or failed tool call before it or after."""
    if response is None:
        return "no answer"
    if not any(message["role"] == "user" and content_text(message).strip() for message in messages):
        return "no question"
    if messages[-1]["role"] not in ("user", "tool"):
        return "conversation incomplete"
    if not content_text(response).strip():
        return "tool run unfinished" if response.get("tool_calls") else "empty answer"
    return _tool_reason([*messages, response, *tail])


def _tool_reason(messages: list[Message]) -> str | None:
    opened: set[str] = set()
    for message in messages:
        opened |= {call.get("id", "") for call in message.get("tool_calls") or []}
        if message["role"] == "tool":
            opened.discard(message.get("tool_call_id", ""))
            if message.get("error") or is_tool_error(content_text(message)):
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
