"""Interactions about which people both said and did something: what implicit weights are calibrated on."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import orjson
import pyarrow as pa

from cluster.settings import Settings
from data.behaviour import COLUMNS, events_of_row
from data.events import Event
from data.implicit import Signal, signals_of
from data.minhash import text_hashes

IMPLICIT = ("reformulation", "quick_accept", "copy_response", "citation_click", "thorough_read", "abandonment")
KINDS = ("interaction", "behaviour", "feedback")
PAIRS = pa.schema(
    [("interaction_id", pa.string()), ("user", pa.string()), ("explicit", pa.float64())]
    + [(name, pa.int32()) for name in IMPLICIT]
)
"""A `Pair` a row."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One interaction with both kinds of sign."""

    interaction_id: str
    user: str
    signals: Counter[str]
    explicit: float
    """Mean explicit reward."""


def pairs_of(events: Iterable[Event], settings: Settings) -> list[Pair]:
    """Interactions with implicit signals and explicit feedback, by id.

    Signals are found as if nothing had been said, for an explicit word silences an abandonment. Feedback
    that was sent as an implicit type counts as a signal.
    """
    seen: list[Event] = []
    said: dict[str, list[float]] = defaultdict(list)
    signals: dict[str, Counter[str]] = defaultdict(Counter)
    users: dict[str, str] = {}
    for event in events:
        about = event.interaction_id
        if event.kind != "feedback":
            seen.append(_slim(event))
            if event.kind == "interaction" and about is not None:
                users[about] = event.user_id or event.session_id or about
        elif about is not None and event.body["source"] == "explicit" and event.body["type"] != "abandonment":
            said[about].append(event.body["reward"])
        elif about is not None and event.body["type"] in IMPLICIT:
            signals[about][event.body["type"]] += 1
    computed: dict[str, list[Signal]] = signals_of(seen, settings)
    for about, found in computed.items():
        signals[about].update(signal.type for signal in found)
    return [
        Pair(about, users[about], signals[about], sum(rewards) / len(rewards))
        for about, rewards in sorted(said.items())
        if signals.get(about) and about in users
    ]


def _slim(event: Event) -> Event:
    """An interaction without what the rules of `data.implicit` do not read, for a log is larger than memory."""
    if event.kind != "interaction":
        return event
    body = {name: event.body[name] for name in ("response", "flags", "latency_s") if name in event.body}
    asked = [m for m in event.body["messages"] if m.get("role") == "user"][-1:]
    return Event(
        event.kind, event.tenant, event.workspace, body | {"messages": asked}, event.event_id, event.occurred_at_us,
        event.user_id, event.session_id, event.agent, event.interaction_id,
    )  # fmt: skip


def events_of(table: pa.Table, settings: Settings) -> Iterator[Event]:
    """The events of a block of the log that pairs are made of."""
    for row in table.to_pylist():
        if row["kind"] in KINDS and row["body"] is not None:
            yield Event(
                row["kind"], settings.tenant, settings.workspace, orjson.loads(row["body"]), row["event_id"],
                row["at_us"], row["user_id"], row["session_id"], row["agent"], row["interaction_id"],
            )  # fmt: skip


def pairs_of_rows(table: pa.Table, settings: Settings) -> pa.Table:
    """Rows of `PAIRS` from rows of the join, before implicit signals are added. Needs all rows of a `session_key`."""
    sessions = defaultdict(list)
    for row in table.select(list(COLUMNS)).to_pylist():
        sessions[row["session_key"]].append(row)
    spoken = (rows for rows in sessions.values() if any('"explicit"' in (row["signals"] or "") for row in rows))
    found = pairs_of((e for rows in spoken for row in rows for e in events_of_row(row, settings)), settings)
    return sample(to_table(found), settings.calibration.max_rows)


def to_table(pairs: Iterable[Pair]) -> pa.Table:
    """Rows of `PAIRS`."""
    rows = [
        {"interaction_id": p.interaction_id, "user": p.user, "explicit": p.explicit}
        | {n: p.signals[n] for n in IMPLICIT}
        for p in pairs
    ]
    return pa.Table.from_pylist(rows, PAIRS)


def from_table(table: pa.Table) -> list[Pair]:
    """The inverse of `to_table`, by interaction."""
    return [
        Pair(row["interaction_id"], row["user"], Counter({n: row[n] for n in IMPLICIT if row[n]}), row["explicit"])
        for row in table.sort_by("interaction_id").to_pylist()
    ]


def sample(table: pa.Table, most: int) -> pa.Table:
    """At most so many rows, chosen by the hash of their interaction: of any parts the same as of the whole."""
    if len(table) <= most:
        return table
    return table.take(np.argsort(text_hashes(table["interaction_id"].to_pylist()), kind="stable")[:most])
