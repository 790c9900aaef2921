"""Implicit signals inside curation: what users did, read session by session, joins what they said.

The rules are in `data.implicit`; here rows become its events and its signals become signals of rows.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.compute as pc

from cluster.settings import Settings
from data.detectors.make import similarity_by
from data.events import Event
from data.feedback import reward
from data.implicit import signals_of
from data.join import to_json
from data.stages import Dropped, with_column

Row = dict[str, Any]
COLUMNS = (
    "interaction_id",
    "session_id",
    "session_key",
    "user_id",
    "agent",
    "at_us",
    "logged_us",
    "messages",
    "response",
    "flags",
    "latency_s",
    "behaviours",
    "signals",
)


def add_implicit_signals(
    table: pa.Table, settings: Settings, weights: Mapping[str, float] = MappingProxyType({})
) -> tuple[pa.Table, Dropped]:
    """Adds signals computed from behaviour to `signals`. Needs all rows of a `session_key`.

    `weights` are calibrated rewards by signal, which hold for reported implicit signals too. Does nothing unless
    `feedback.implicit` is on. Rows without an interaction have done their work and go.
    """
    if settings.feedback.implicit:
        table = with_column(table, "signals", _signals(table, settings, weights), pa.string())
    return table.filter(pc.is_valid(table["interaction_id"])), Counter()


def _signals(table: pa.Table, settings: Settings, weights: Mapping[str, float]) -> list[str | None]:
    """The column `signals` with the implicit ones added."""
    sessions: dict[str, list[Row]] = defaultdict(list)
    rows = table.select(list(COLUMNS)).to_pylist()
    for row in rows:
        sessions[row["session_key"]].append(row)
    found: dict[str, list[Any]] = {}
    alike = similarity_by(settings.curation.detectors)
    for members in sessions.values():
        if any(row["behaviours"] != "[]" for row in members) or len(members) > 1:
            found |= signals_of([event for row in members for event in events_of_row(row, settings)], settings, alike)
    return [_with_implicit(row, found.get(row["interaction_id"], []), settings, weights) for row in rows]


def _with_implicit(row: Row, implicit: list[Any], settings: Settings, weights: Mapping[str, float]) -> str | None:
    if not implicit and not (weights and '"implicit"' in (row["signals"] or "")):
        return row["signals"]  # type: ignore[no-any-return]
    signals = orjson.loads(row["signals"])
    for signal in implicit:
        signals.append(
            {
                "type": signal.type,
                "source": "implicit",
                "reward": reward(signal.type, None, settings.rewards),
                "reason": signal.reason,
                "user": row["user_id"],
                "at_us": row["at_us"],
                "logged_us": row["logged_us"],
            }
        )
    for signal in signals:
        if signal["source"] == "implicit":
            signal["reward"] = weights.get(signal["type"], signal["reward"])
    return to_json(signals)


def events_of_row(row: Row, settings: Settings) -> list[Event]:
    """The events that `data.implicit` reads, of one row of the join."""

    def event(kind: str, body: dict[str, Any], at_us: int, interaction_id: str | None, number: int) -> Event:
        return Event(
            kind,
            settings.tenant,
            settings.workspace,
            body,
            event_id=f"{interaction_id}:{kind}:{number}",
            occurred_at_us=at_us,
            user_id=row["user_id"],
            session_id=row["session_id"],
            agent=row["agent"],
            interaction_id=interaction_id,
        )

    behaviours = orjson.loads(row["behaviours"])
    made = [event("behaviour", b["body"], b["at_us"], b["interaction_id"], n) for n, b in enumerate(behaviours)]
    if row["interaction_id"] is None:
        return made
    body = {name: orjson.loads(row[name] or "{}") for name in ("messages", "response", "flags")}
    made.append(event("interaction", body | {"latency_s": row["latency_s"]}, row["at_us"], row["interaction_id"], 0))
    said = enumerate(orjson.loads(row["signals"]))
    made += [event("feedback", s, s["at_us"], row["interaction_id"], n) for n, s in said]
    return made
