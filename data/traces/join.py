"""Spans of one trace that came in several requests become one trajectory.

Exporters send a span when it ends, in batches: the agent's own span comes last, often alone, and only it says what
its steps belong to. Each span became an event when it came (`data.traces.genai`); here those of a trace meet. A
trajectory takes the longest conversation and the tool calls of the spans below it, and gives them its user, session
and agent where they name none; a tool call finds the answer that asked for it.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.compute as pc

from data.source import EVENTS
from data.stages import with_column
from data.tool_turns import asked_for
from data.traces.genai import trace_session

Event = dict[str, Any]
"""One row of `EVENTS` with its body parsed."""
TRACED = ("trajectory", "tool_call")
"""Kinds without which no trace has anything to put together."""
TRACE = "trace"
PREFIX = "trace:"


def add_trace(table: pa.Table) -> pa.Table:
    """Adds `trace`: what an event is put together by. Its trace where it names one, else its interaction."""
    names = pc.coalesce(table["interaction_id"], table["event_id"]).to_pylist()
    for index, text in enumerate(table["body"].to_pylist()):
        if text is not None and '"trace_id":' in text and (trace := orjson.loads(text).get("trace_id")):
            names[index] = PREFIX + trace
    return with_column(table, TRACE, names, pa.string())


def join_traces(table: pa.Table) -> pa.Table:
    """The events with the parts of each trace put together, without `trace`. Needs all events of a trace."""
    wanted = pc.and_(pc.starts_with(table[TRACE], PREFIX), pc.is_in(table["kind"], pa.array(TRACED)))
    mine = pc.is_in(table[TRACE], pc.unique(table[TRACE].filter(wanted)))
    traces: dict[str, list[Event]] = defaultdict(list)
    for event in table.filter(mine).to_pylist():
        traces[event.pop(TRACE)].append(event | {"body": orjson.loads(event["body"])})
    joined = [event for name in sorted(traces) for event in joined_trace(traces[name])]
    rows = [event | {"body": _text(event["body"])} for event in joined]
    others = table.filter(pc.invert(mine)).select(EVENTS.names)
    return pa.concat_tables([others, pa.Table.from_pylist(rows, EVENTS)])


def joined_trace(events: Sequence[Event]) -> list[Event]:
    """The events of one trace, each with what the others know of it; in order of time."""
    events = sorted(events, key=lambda e: (e["at_us"], e["event_id"]))
    spans = {_name(event): event for event in events}
    above = {name: _agents_above(name, spans) for name in spans}
    askers = {
        call: event["interaction_id"]
        for event in events
        if event["kind"] == "interaction"
        for call in asked_for(event["body"].get("response") or {})
    }
    made = []
    for event in events:
        event = event | _inherited(event, [spans[agent] for agent in above[_name(event)]])
        if event["kind"] == "tool_call" and event["interaction_id"] is None:
            event = event | {"interaction_id": askers.get(str(event["body"].get("call_id")))}
        if event["kind"] == "trajectory":
            below = [e for e in events if _name(event) in above[_name(e)]]
            event = event | {"body": event["body"] | _whole(event["body"], below)}
        made.append(event)
    return made


def _name(event: Event) -> str:
    """The span's id; the event's where it was no span, as with an answer that the router reports."""
    return event["body"].get("span_id") or event["event_id"]  # type: ignore[no-any-return]


def _inherited(event: Event, runs: Sequence[Event]) -> dict[str, Any]:
    """What an event has from the runs above it. A step that names no agent has its service's name until then."""
    around = (event, *runs)
    sessions = [e["session_id"] for e in around if e["session_id"]]
    named_sessions = [session for session in sessions if session != trace_session(event["body"].get("trace_id", ""))]
    known = {
        "user_id": next(filter(None, (e["user_id"] for e in around)), None),
        "session_id": next(iter([*named_sessions, *sessions]), None),
    }
    is_step = "span_id" in event["body"] and event["kind"] != "trajectory"
    named = (*runs, event) if is_step else (event, *runs)
    return known | {"agent": next(filter(None, (e["agent"] for e in named)), None)}


def _agents_above(name: str, spans: dict[str, Event]) -> list[str]:
    """Names of the trajectories above a span, the nearest first.

    Where nobody knows what it hangs on, it hangs on the trace's one outermost trajectory, if there is but one.
    """
    chain, whole = _chain(name, spans)
    found = [above for above in chain if spans[above]["kind"] == "trajectory"]
    if not whole:
        runs = [n for n, event in spans.items() if event["kind"] == "trajectory"]
        roots = [n for n in runs if not any(spans[above]["kind"] == "trajectory" for above in _chain(n, spans)[0])]
        found += [root for root in roots if len(roots) == 1 and root not in (name, *chain)]
    return found


def _chain(name: str, spans: dict[str, Event]) -> tuple[list[str], bool]:
    """The known spans above one, the nearest first, and whether that is all there are."""
    chain: list[str] = []
    body = spans[name]["body"]
    if "span_id" not in body:
        return [], False
    parent = body.get("parent_span_id")
    while parent in spans and parent not in (name, *chain):
        chain.append(parent)
        parent = spans[parent]["body"].get("parent_span_id")
    return chain, parent is None or parent in spans


def _whole(own: dict[str, Any], below: Sequence[Event]) -> dict[str, Any]:
    """The fields of a trajectory that the spans below it know better."""
    talks = [e["body"] for e in below if e["kind"] == "interaction"]
    spoken = [[*talk["messages"], *([talk["response"]] if talk.get("response") else [])] for talk in talks]
    calls = [e["body"] for e in below if e["kind"] == "tool_call"] or own.get("tool_calls", [])
    found = {"messages": max([own["messages"], *spoken], key=len), "tool_calls": calls}
    offered = next((one["tools"] for one in (own, *talks) if one.get("tools")), None)
    return found if offered is None else found | {"tools": offered}


def _text(body: dict[str, Any]) -> str:
    return orjson.dumps(body, option=orjson.OPT_SORT_KEYS).decode()
