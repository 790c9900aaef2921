"""Stage 1, join: events of one interaction become one row.

Feedback may come before its interaction, or days later; a join by id does not care. Log order decides
nothing here: ties are broken by time and event id, so the same events give the same rows.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import orjson
import pyarrow as pa

from data.stages import Dropped

Event = dict[str, Any]
"""One row of `data.source.EVENTS` with its body parsed."""
ImplicitSignals = Callable[[Event, Sequence[Event]], Sequence[tuple[str, float, str]]]
"""Signals from behaviour: (type, reward, reason) of each, for an interaction and its behaviour events."""

ROWS = pa.schema(
    [
        ("interaction_id", pa.string()),
        ("user_id", pa.string()),
        ("session_id", pa.string()),
        ("agent", pa.string()),
        ("at_us", pa.int64()),
        ("messages", pa.string()),  # JSON list of messages: the prompt
        ("tools", pa.string()),  # JSON list or null
        ("context", pa.string()),  # JSON list of passages
        ("response", pa.string()),  # JSON message or null
        ("finish_reason", pa.string()),
        ("version", pa.string()),
        ("arm", pa.string()),
        ("answer_tokens", pa.int64()),  # 0 when unknown
        ("flags", pa.string()),  # JSON object
        ("signals", pa.string()),  # JSON list of signals, see `_signal`
        ("labels", pa.string()),  # JSON list: newest label of each reviewer
        ("grades", pa.string()),  # JSON list: newest grade of each grader
    ]
)
"""One interaction a row, with everything said about it."""


def no_implicit_signals(
    _interaction: Event, _behaviours: Sequence[Event]
) -> Sequence[tuple[str, float, str]]:
    """Behaviour counts only as far as it was already turned into feedback events."""
    return ()


def join_events(
    table: pa.Table, agent: str | None = None, implicit: ImplicitSignals = no_implicit_signals
) -> tuple[pa.Table, Dropped]:
    """Rows of `ROWS` from all events of some interactions.

    Events that are part of a row are not dropped; the tally counts those that are lost: erased, repeated,
    of another agent, or about an interaction that is not in the log.
    """
    dropped: Dropped = Counter()
    by_interaction: dict[str | None, list[Event]] = defaultdict(list)
    for event in _parsed(table, dropped):
        by_interaction[event["interaction_id"]].append(event)
    dropped["no interaction id"] += len(by_interaction.pop(None, []))
    rows = []
    for events in by_interaction.values():
        kinds = _by_kind(events)
        found = kinds["interaction"]
        if not found:
            dropped["interaction unknown"] += len(events)
        elif agent is not None and found[0]["agent"] != agent:
            dropped["other agent"] += len(events)
        else:
            dropped["interaction repeated"] += len(found) - 1
            rows.append(_row(found[0], kinds, implicit))
    rows.sort(key=lambda row: row["interaction_id"])
    return pa.Table.from_pylist(rows, ROWS), +dropped


def _parsed(table: pa.Table, dropped: Dropped) -> list[Event]:
    """Events with parsed bodies in canonical order, each `event_id` once."""
    events = sorted(table.to_pylist(), key=lambda e: (e["at_us"], e["event_id"]))
    seen: set[str] = set()
    parsed = []
    for event in events:
        if event["body"] is None:
            dropped["erased"] += 1
        elif event["event_id"] in seen:
            dropped["event repeated"] += 1
        else:
            seen.add(event["event_id"])
            parsed.append({**event, "body": orjson.loads(event["body"])})
    return parsed


def _by_kind(events: list[Event]) -> dict[str, list[Event]]:
    kinds: dict[str, list[Event]] = defaultdict(list)
    for event in events:
        kinds[event["kind"]].append(event)
    return kinds


def _row(interaction: Event, kinds: dict[str, list[Event]], implicit: ImplicitSignals) -> dict[str, Any]:
    body = interaction["body"]
    signals = [_signal(event, interaction) for event in kinds["feedback"]]
    signals += [_implicit_signal(interaction, *found) for found in implicit(interaction, kinds["behaviour"])]
    return {
        "interaction_id": interaction["interaction_id"],
        "user_id": interaction["user_id"]
        or f"session:{interaction['session_id'] or interaction['interaction_id']}",
        "session_id": interaction["session_id"],
        "agent": interaction["agent"],
        "at_us": interaction["at_us"],
        "messages": to_json(body["messages"]),
        "tools": to_json(body["tools"]) if body.get("tools") else None,
        "context": to_json(body.get("context") or []),
        "response": to_json(body["response"]) if body.get("response") else None,
        "finish_reason": body.get("finish_reason"),
        "version": body.get("served_version"),
        "arm": body.get("arm"),
        "answer_tokens": body.get("answer_tokens", 0),
        "flags": to_json(body.get("flags") or {}),
        "signals": to_json(signals),
        "labels": to_json(_newest(kinds["label"], "reviewer")),
        "grades": to_json(_newest(kinds["grade"], "grader")),
    }


def _signal(event: Event, interaction: Event) -> dict[str, Any]:
    body = event["body"]
    kept = {name: body.get(name) for name in ("type", "source", "reward", "value", "text", "category")}
    return {**kept, "user": event["user_id"] or interaction["user_id"] or "", "at_us": event["at_us"]}


def _implicit_signal(interaction: Event, kind: str, reward: float, reason: str) -> dict[str, Any]:
    return {
        "type": kind,
        "source": "implicit",
        "reward": reward,
        "text": reason,
        "user": interaction["user_id"] or "",
        "at_us": interaction["at_us"],
    }


def _newest(events: list[Event], by: str) -> list[dict[str, Any]]:
    """The last body of each reviewer or grader; events come in order of time."""
    newest: dict[str, dict[str, Any]] = {}
    for event in events:
        newest[event["body"][by]] = event["body"]
    return [newest[name] for name in sorted(newest)]


def to_json(value: Any) -> str:
    """Canonical JSON text."""
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS).decode()
