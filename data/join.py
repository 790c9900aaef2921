"""Stage 1, join: events of one interaction become one row.

Feedback may come before its interaction, or days later; a join by id does not care. Log order decides
nothing here: ties are broken by time and event id, so the same events give the same rows.

A trajectory is a row as well: its last spoken turn is the answer, all before it the prompt, its reward a grade.
Tool calls that were reported beside a conversation become turns of its prompt (`data.tool_turns`).
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from itertools import groupby
from operator import itemgetter
from types import MappingProxyType
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.compute as pc

from data.events import from_router, judges
from data.prompted_rows import Prompts, take_off
from data.stages import Dropped, rows_of, table_of, with_column
from data.template import content_text
from data.tool_turns import asked_for, with_tool_turns

Event = dict[str, Any]
"""One row of `data.source.EVENTS`; its body is parsed where a row of `ROWS` is made of it."""

ROWS = pa.schema(
    [
        ("interaction_id", pa.string()),
        ("user_id", pa.string()),
        ("session_id", pa.string()),
        ("agent", pa.string()),
        ("at_us", pa.int64()),
        ("logged_us", pa.int64()),  # when the log took it
        ("messages", pa.string()),  # JSON list of messages: what was asked, without the agent's prompt
        ("prompt_digest", pa.string()),  # of the agent's prompt, which `messages` began with
        ("tools", pa.string()),  # JSON list or null
        ("context", pa.string()),  # JSON list of passages
        ("response", pa.string()),  # JSON message or null
        ("finish_reason", pa.string()),
        ("version", pa.string()),
        ("arm", pa.string()),
        ("answer_tokens", pa.int64()),  # 0 when unknown
        ("answer_logprob", pa.float64()),  # of exactly these messages and this response; null when unknown
        ("flags", pa.string()),  # JSON object
        ("latency_s", pa.float64()),
        ("session_key", pa.string()),  # what belongs to one session, or to one user of an agent
        ("behaviours", pa.string()),  # JSON list of what the user did
        ("signals", pa.string()),  # JSON list of signals, see `_signal`
        ("labels", pa.string()),  # JSON list: newest label of each reviewer
        ("grades", pa.string()),  # JSON list: newest grade of each grader
        ("tail", pa.string()),  # JSON list: what follows the answer in a trajectory; null for an interaction
    ]
)
"""One interaction a row, with everything said about it."""
SIGNAL_FIELDS = ("type", "source", "reward", "reason", "value", "text", "category")


def join_events(
    table: pa.Table,
    agent: str | None = None,
    *,
    trajectories: bool = True,
    prompts: Prompts = MappingProxyType({}),
) -> tuple[pa.Table, Dropped]:
    """Rows of `ROWS` from all events of some interactions.

    `prompts` are the texts of agents' prompts by digest: they are taken off, so that questions are compared without
    them, and come back in the examples (`data.prompted_rows`).

    Events that are part of a row are not dropped; the tally counts those that are lost: erased, repeated,
    of another agent, or about an interaction that is not in the log. Without `trajectories` these are left out
    as well. Behaviour of which only the session is
    known becomes a row without an interaction, which `data.behaviour` takes up again.
    """
    dropped: Dropped = Counter()
    if not trajectories:
        runs = pc.equal(table["kind"], "trajectory")
        dropped["trajectory_feedback_loop is off"] = pc.sum(runs).as_py() or 0
        table = table.filter(pc.invert(runs))
    return table_of(_joined(table, agent, dropped, prompts), ROWS), +dropped


def _joined(table: pa.Table, agent: str | None, dropped: Dropped, prompts: Prompts) -> Iterator[dict[str, Any]]:
    """The rows, in order of their interaction."""
    events = rows_of(_in_order(table, dropped))
    for interaction_id, group in groupby(events, key=itemgetter("interaction_id")):
        if interaction_id is None:
            yield from _carriers(group, dropped)
            continue
        kinds = _by_kind(group)
        found = kinds["interaction"] or kinds["trajectory"]
        if not found:
            dropped["interaction unknown"] += sum(map(len, kinds.values()))
        elif agent is not None and found[0]["agent"] != agent:
            dropped["other agent"] += sum(map(len, kinds.values()))
        else:
            dropped["interaction repeated"] += len(kinds["interaction"]) + len(kinds["trajectory"]) - 1
            routed = next((event for event in found if from_router(event["event_id"])), found[0])
            kinds["grade"] = _grades_of(routed, kinds["grade"], dropped)
            chosen = _as_interaction(routed)
            yield _row(chosen | {"body": take_off(chosen["body"], prompts)}, kinds)


def _in_order(table: pa.Table, dropped: Dropped) -> pa.Table:
    """Events by interaction and in canonical order, each `event_id` once."""
    names = ("interaction_id", "at_us", "event_id")
    interactions, times, ids = (table[name].to_pylist() for name in names)
    erased = pc.is_null(table["body"]).to_pylist()
    seen: set[str] = set()
    kept = []
    for place in sorted(range(len(table)), key=lambda i: (times[i], ids[i])):
        if erased[place]:
            dropped["erased"] += 1
        elif ids[place] in seen:
            dropped["event repeated"] += 1
        else:
            seen.add(ids[place])
            kept.append(place)
    kept.sort(key=lambda i: (interactions[i] is not None, interactions[i]))
    return table.take(pa.array(kept, pa.int64()))


def name_trajectories(table: pa.Table) -> pa.Table:
    """Gives trajectories without an interaction id their event's: they are joined under it."""
    nameless = pc.and_(pc.equal(table["kind"], "trajectory"), pc.is_null(table["interaction_id"]))
    return with_column(table, "interaction_id", pc.if_else(nameless, table["event_id"], table["interaction_id"]))


def _as_interaction(event: Event) -> Event:
    """A trajectory in the form of an interaction, with what follows the answer as `tail`."""
    if event["kind"] != "trajectory":
        return event
    body = dict(event["body"])
    messages = body["messages"]
    spoken = [i for i, m in enumerate(messages) if m["role"] == "assistant" and content_text(m).strip()]
    at = spoken[-1] if spoken else len(messages)
    body |= {"messages": messages[:at], "response": messages[at] if spoken else None, "tail": messages[at + 1 :]}
    return event | {"body": body}


def _outcome(event: Event) -> list[dict[str, Any]]:
    """The reward of a trajectory as the grade of a grader."""
    if event["kind"] != "trajectory" or event["body"].get("reward") is None:
        return []
    return [{"grader": "outcome", "grader_version": "1", "reward": event["body"]["reward"]}]


def _by_kind(events: Iterable[Event]) -> dict[str, list[Event]]:
    """The events of one interaction, with parsed bodies."""
    kinds: dict[str, list[Event]] = defaultdict(list)
    for event in events:
        event["body"] = orjson.loads(event["body"])
        kinds[event["kind"]].append(event)
    return kinds


def _row(interaction: Event, kinds: dict[str, list[Event]]) -> dict[str, Any]:
    body = interaction["body"]
    calls = _calls(body, kinds["tool_call"])
    messages = with_tool_turns(body["messages"], body.get("response"), calls) if calls else body["messages"]
    user = user_of(interaction)
    return {
        "interaction_id": interaction["interaction_id"],
        "user_id": user,
        "session_id": interaction["session_id"],
        "agent": interaction["agent"],
        "at_us": interaction["at_us"],
        "logged_us": interaction["logged_us"],
        "messages": to_json(messages),
        "prompt_digest": body.get("prompt_digest"),
        "tools": to_json(body["tools"]) if body.get("tools") else None,
        "context": _list(body.get("context")),
        "response": to_json(body["response"]) if body.get("response") else None,
        "finish_reason": body.get("finish_reason"),
        "version": body.get("served_version"),
        "arm": body.get("arm"),
        "answer_tokens": body.get("answer_tokens", 0),
        "answer_logprob": body.get("answer_logprob") if messages == body["messages"] else None,
        "flags": to_json(body.get("flags") or {}),
        "latency_s": body.get("latency_s", 0.0),
        "session_key": session_key(interaction["session_id"], user, interaction["agent"]),
        "behaviours": _list([_behaviour(event) for event in kinds["behaviour"]]),
        "signals": _list([_signal(event, interaction) for event in kinds["feedback"]]),
        "labels": _list(_newest(kinds["label"], "reviewer")),
        "grades": _list(_outcome(interaction) + _newest(kinds["grade"], "grader")),
        "tail": to_json(body["tail"]) if "tail" in body else None,
    }


def _grades_of(report: Event, grades: list[Event], dropped: Dropped) -> list[Event]:
    """The grades of the answer that this report tells of, and those that do not say which they judged."""
    kept = [grade for grade in grades if judges(grade["body"], report["event_id"])]
    dropped["grade of another report"] += len(grades) - len(kept)
    return kept


def _calls(body: dict[str, Any], events: list[Event]) -> list[dict[str, Any]]:
    """Tool calls made for an answer, in order of time: those of its own body, then those reported as events.

    Of a run with several turns only those that a turn asks for: nobody says where the others belong.
    """
    own = body.get("tool_calls") or []
    if not own and not events:
        return []
    named = {call.get("call_id") for call in own}
    calls = [*own, *(e["body"] for e in events if not own or e["body"].get("call_id") not in named | {None})]
    earlier = [m for m in body["messages"] if m["role"] == "assistant"]
    if "tail" not in body or not earlier:
        return calls
    asked = {name for message in earlier for name in asked_for(message)}
    return [call for call in calls if call.get("call_id") in asked]


def _signal(event: Event, interaction: Event) -> dict[str, Any]:
    body = event["body"]
    kept = {name: body.get(name) for name in SIGNAL_FIELDS}
    user = event["user_id"] or user_of(interaction)
    return {**kept, "user": user, "at_us": event["at_us"], "logged_us": event["logged_us"]}


def user_of(interaction: Event) -> str:
    """Whose interaction it is; where nobody is named, the session stands for its user."""
    return interaction["user_id"] or f"session:{interaction['session_id'] or interaction['interaction_id']}"


def _behaviour(event: Event) -> dict[str, Any]:
    return {"body": event["body"], "at_us": event["at_us"], "interaction_id": event["interaction_id"]}


def _carriers(events: Iterable[Event], dropped: Dropped) -> list[dict[str, Any]]:
    """Rows that hold nothing but what a user did in a session."""
    rows = []
    for event in events:
        if event["kind"] != "behaviour" or event["session_id"] is None:
            dropped["no interaction id"] += 1
            continue
        event["body"] = orjson.loads(event["body"])
        key = session_key(event["session_id"], "", None)
        rows.append({"session_id": event["session_id"], "session_key": key, "behaviours": to_json([_behaviour(event)])})
    return sorted(rows, key=itemgetter("behaviours"))


def session_key(session_id: str | None, user: str, agent: str | None) -> str:
    """What groups rows whose behaviour must be read together."""
    return f"session:{session_id}" if session_id is not None else f"user:{user}:{agent}"


def _newest(events: list[Event], by: str) -> list[dict[str, Any]]:
    """The last body of each reviewer or grader; events come in order of time."""
    newest: dict[str, dict[str, Any]] = {}
    for event in events:
        newest[event["body"][by]] = event["body"]
    return [newest[name] for name in sorted(newest)]


def _list(values: list[Any] | None) -> str:
    return to_json(values) if values else "[]"


def to_json(value: Any) -> str:
    """Canonical JSON text."""
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS).decode()
