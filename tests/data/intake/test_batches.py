import asyncio
import math
from collections.abc import Iterator
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.engine import Engine

from cluster.errors import ConflictError, InputError
from cluster.settings import Settings, load_settings
from data.events import BODIES
from data.feedback import pseudonym
from data.group_commit import GroupCommit
from data.intake.batches import KINDS, Intake, read_items
from data.intake.items import Envelope, Identity, Parser
from data.log import EventLog

SECRET = "0123456789abcdef"
ACME = Identity("acme", "main")
NOW_US = 1_800_000_000_000_000
ALL_ON = {
    "learning": {"enabled": True},
    "feedback": {"explicit": True, "implicit": True},
    "capture": {"enabled": True, "pseudonym_secret": SECRET},
    "trajectory_evaluation": {"enabled": True},
}
THUMB = {"interaction_id": "i1", "type": "thumbs_up"}
ASKED = {"interaction_id": "i1", "messages": [{"role": "user", "content": "hi"}]}
PARSER = Parser(load_settings(**ALL_ON)[0], SECRET.encode())


@pytest.fixture
def intake(database: Engine) -> Iterator[Intake]:
    with GroupCommit(EventLog(database), PARSER.settings.log) as commit:
        yield Intake(commit, PARSER.settings)


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def refusal(kind: str, item: Any) -> InputError:
    with pytest.raises(InputError) as refused:
        PARSER.parse(item, kind, ACME, NOW_US)
    return refused.value


def test_feedback_becomes_an_event_with_reward_and_pseudonym() -> None:
    item = {
        **THUMB,
        "event_id": "e1",
        "user": "ada",
        "session": "s1",
        "agent": "triage",
        "occurred_at": 1_700_000_000,
    }
    event = PARSER.parse(item, "feedback", Identity("acme", "main", "gold"), NOW_US)
    assert (event.event_id, event.tenant, event.session_id, event.agent) == ("e1", "acme", "s1", "triage")
    assert event.user_id == pseudonym(SECRET.encode(), "acme", "ada")
    assert event.occurred_at_us == 1_700_000_000_000_000
    assert event.body == {"type": "thumbs_up", "source": "explicit", "reward": 1.0, "user_tier": "gold"}


@pytest.mark.parametrize(
    ("kind", "item", "field"),
    [
        ("feedback", [], "item"),
        ("feedback", {"type": "thumbs_up"}, "interaction_id"),
        ("feedback", {**THUMB, "type": "meh"}, "type"),
        ("feedback", {"interaction_id": "i1"}, "type"),
        ("feedback", {**THUMB, "tenant": "other"}, "tenant"),
        ("feedback", {**THUMB, "reward": 1.0}, "reward"),
        ("feedback", {**THUMB, "source": "implicit"}, "source"),
        ("feedback", {**THUMB, "type": "rating", "value": "5"}, "value"),
        ("feedback", {**THUMB, "type": "rating", "value": math.nan}, "value"),
        ("feedback", {**THUMB, "event_id": "x" * 129}, "event_id"),
        ("feedback", {**THUMB, "event_id": "nul\0"}, "event_id"),
        ("feedback", {**THUMB, "event_id": 7}, "event_id"),
        ("feedback", {**THUMB, "event_id": "erasure:ada"}, "event_id"),
        ("interaction", {**ASKED, "event_id": "router:i1"}, "event_id"),
        ("feedback", {**THUMB, "user": ""}, "user"),
        ("feedback", {**THUMB, "text": "x" * 100_001}, "text"),
        ("feedback", {**THUMB, "metadata": {"k": "x" * 513}}, "metadata.k"),
        ("feedback", {**THUMB, "occurred_at": NOW_US / 1e6 + 61}, "occurred_at"),
        ("feedback", {**THUMB, "occurred_at": -1}, "occurred_at"),
        ("feedback", {**THUMB, "occurred_at": "yesterday"}, "occurred_at"),
        ("feedback", {**THUMB, "occurred_at": 1e300}, "occurred_at"),
        ("feedback", {**THUMB, "occurred_at": True}, "occurred_at"),
        ("behaviour", {"action": "copy"}, "interaction_id"),
        ("behaviour", {"interaction_id": "i1", "action": "read", "duration_s": -1}, "duration_s"),
        ("outcome", {"interaction_id": "i1", "name": "sale", "value": math.inf}, "value"),
        ("outcome", {"interaction_id": "i1", "name": "", "value": 1}, "name"),
        ("trajectory", {"messages": []}, "messages"),
        ("interaction", {"messages": [{"role": "user"}]}, "interaction_id"),
        ("interaction", {**ASKED, "prompt_token_ids": [2**31]}, "prompt_token_ids.0"),
        ("interaction", {**ASKED, "completion_logprobs": [math.nan]}, "completion_logprobs.0"),
        ("interaction", {**ASKED, "parameters": {"top_p": math.nan}}, "parameters.top_p"),
        ("interaction", {**ASKED, "parameters": {"seed": 2**70}}, "parameters.seed"),
        ("interaction", {**ASKED, "modality": "x" * 17}, "modality"),
        ("interaction", {**ASKED, "tool_calls": [{"call_id": "c1"}]}, "tool_calls.0.name"),
        ("tool_call", {"name": "f", "latency_s": -1}, "latency_s"),
        ("tool_call", {"name": "f", "result": nested(200)}, "result" + ".0" * 100),
        ("trajectory", {"messages": [{"content": "hi"}]}, "messages.0.role"),
        ("trajectory", {"messages": [{"role": "user", "content": "x" * 100_001}]}, "messages.0.content"),
    ],
)
def test_bad_item_is_refused_with_its_field(kind: str, item: Any, field: str) -> None:
    error = refusal(kind, item)
    assert error.field == field
    assert len(str(error)) < 400


def test_deeply_nested_item_is_refused_whatever_the_field() -> None:
    for name in ("metadata", "text", "unheard_of", "type", "event_id"):
        assert str(refusal("feedback", {**THUMB, name: nested(1000)}))


def test_metadata_is_scrubbed() -> None:
    metadata = {"mail": "ada@example.com wrote", "seats": 4, "host": "db1.example.com"}
    event = PARSER.parse({**THUMB, "metadata": metadata}, "feedback", ACME, NOW_US)
    assert event.body["metadata"] == {"mail": "<EMAIL> wrote", "seats": 4, "host": "db1.example.com"}


def test_item_of_a_trace_names_its_kind_and_never_its_arm(intake: Intake) -> None:
    items = [
        {**ASKED, "event_id": "a"},
        {"kind": "tool_call", "name": "search", "event_id": "b"},
        {"kind": "feedback", **THUMB, "event_id": "c"},
        {**ASKED, "experiment_id": "exp-1", "event_id": "d"},
        {**ASKED, "arm": "candidate", "event_id": "e"},
    ]
    results = intake.take_in_and_wait(items, None, ACME)
    assert [r.status for r in results] == ["accepted", "accepted", "rejected", "rejected", "rejected"]
    assert [r.error.field for r in results if r.error] == ["kind", "experiment_id", "arm"]
    assert [r.event.kind for r in intake.commit.log.scan()] == ["interaction", "tool_call"]


def test_clock_a_little_ahead_is_tolerated() -> None:
    assert PARSER.parse({**THUMB, "occurred_at": NOW_US / 1e6 + 59}, "feedback", ACME, NOW_US)


@pytest.mark.parametrize("text", ["2023-11-14T22:13:20Z", "2023-11-14T23:13:20+01:00", "2023-11-14T22:13:20"])
def test_times_are_read_as_rfc3339(text: str) -> None:
    assert (
        PARSER.parse({**THUMB, "occurred_at": text}, "feedback", ACME, NOW_US).occurred_at_us == 1_700_000_000_000_000
    )


def test_each_item_of_a_batch_is_answered_on_its_own(intake: Intake) -> None:
    items = [
        {**THUMB, "event_id": "a"},
        {**THUMB, "event_id": "bad", "typ": 1},
        {**THUMB, "event_id": "a"},
        7,
    ]
    results = asyncio.run(intake.take_in(items, "feedback", ACME))
    assert [r.status for r in results] == ["accepted", "rejected", "duplicate", "rejected"]
    assert [r.event_id for r in results] == ["a", "bad", "a", None]
    assert results[1].as_dict()["error"]["param"] == "typ"
    assert intake.commit.log.last_seq() == 1
    again = intake.take_in_and_wait(items[:1], "feedback", ACME)
    assert again[0].status == "duplicate"


def test_same_id_in_two_tenants_is_two_events(intake: Intake) -> None:
    item = {**THUMB, "event_id": "a"}
    for tenant in ("acme", "other"):
        assert intake.take_in_and_wait([item], "feedback", Identity(tenant, "main"))[0].status == "accepted"


def test_every_kind_reads_back_as_it_was_parsed(intake: Intake) -> None:
    items = {
        "feedback": {**THUMB, "type": "correction", "text": "naïve ✓", "category": "tone"},
        "behaviour": {"session": "s1", "action": "read", "duration_s": 2.5},
        "outcome": {
            "interaction_id": "i1",
            "name": "sale",
            "value": 3,
            "metadata": {"plan": "pro", "seats": 4},
        },
        "trajectory": {
            "messages": [{"role": "user", "content": "hi"}],
            "reward": 0.5,
            "tool_calls": [{"name": "search", "arguments": {"q": "x"}, "result": [1], "latency_s": 0.2}],
        },
        "interaction": {
            "interaction_id": "i1",
            "messages": [{"role": "user", "content": "hi"}],
            "prompt_token_ids": [1, 2**31 - 1],
            "completion_token_ids": [3],
            "completion_logprobs": [-0.5],
            "tool_calls": [{"name": "search", "call_id": "c1", "error": "timeout"}],
            "context": ["a passage"],
            "modality": "voice",
            "user_tier": "gold",
        },
        "tool_call": {"interaction_id": "i1", "name": "search", "call_id": "c1", "result": {"hits": 3}},
    }
    assert set(items) == set(KINDS)
    for kind, item in items.items():
        assert intake.take_in_and_wait([item], kind, ACME)[0].status == "accepted"
    for recorded in intake.commit.log.scan():
        given = {k: v for k, v in items[recorded.event.kind].items() if k not in ("interaction_id", "session")}
        assert given.items() <= recorded.event.body.items()


def test_switched_off_kind_is_refused(sqlite_database: Engine, settings: Settings) -> None:
    with GroupCommit(EventLog(sqlite_database), settings.log) as commit:
        with pytest.raises(ConflictError, match=r"learning\.enabled=false"):
            Intake(commit, settings).take_in_and_wait([THUMB], "feedback", ACME)
        explicit_only = load_settings(home=settings.home, learning={"enabled": True}, feedback={"explicit": True})[0]
        intake = Intake(commit, explicit_only)
        with pytest.raises(ConflictError, match=r"feedback\.implicit=false"):
            intake.take_in_and_wait([{"session": "s", "action": "leave"}], "behaviour", ACME)
        both = [THUMB, {**THUMB, "type": "copy_response"}]
        assert [r.status for r in intake.take_in_and_wait(both, "feedback", ACME)] == ["accepted", "rejected"]
        with pytest.raises(ConflictError, match=r"trajectory_evaluation\.enabled=false"):
            intake.take_in_and_wait([ASKED], "trajectory", ACME)


def test_a_trace_keeps_its_answers_while_trajectories_are_switched_off(database: Engine) -> None:
    settings = load_settings(**ALL_ON | {"trajectory_evaluation": {"enabled": False}})[0]
    with GroupCommit(EventLog(database), settings.log) as commit:
        run = {"kind": "trajectory", "messages": ASKED["messages"]}
        results = Intake(commit, settings).take_in_and_wait([ASKED, run], None, ACME)
    assert [(r.status, r.error and r.error.field) for r in results] == [("accepted", None), ("rejected", "kind")]


def test_read_items_takes_one_or_many() -> None:
    settings = PARSER.settings
    assert read_items(orjson.dumps(THUMB), settings) == [THUMB]
    assert read_items(orjson.dumps({"items": [1, 2]}), settings) == [1, 2]
    assert read_items(b'{"items": []}', settings) == []


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b"", "body"),
        (b'{"value": NaN', "body"),
        (b'{"value": NaN, "text": "\\ud800"}', "body"),
        (b'{"value": NaN, "a": ' + b"[" * 5000 + b"]" * 5000 + b"}", "body"),
        (b"\xff", "body"),
        (b"[]", "body"),
        (b'{"items": 3}', "items"),
        (b'{"items": [], "tenant": "x"}', "items"),
        (b'{"items": [' + b"1," * 1000 + b"1]}", "items"),
    ],
)
def test_read_items_refuses_other_bodies(body: bytes, field: str) -> None:
    with pytest.raises(InputError) as refused:
        read_items(body, PARSER.settings)
    assert refused.value.field == field


def test_a_number_that_is_none_refuses_its_item_and_no_other(intake: Intake) -> None:
    sale = b'{"interaction_id": "i1", "name": "sale", "value": %s}'
    body = b'{"items": [' + b",".join(sale % value for value in (b"NaN", b"1", b"-Infinity")) + b"]}"
    results = intake.take_in_and_wait(read_items(body, PARSER.settings), "outcome", ACME)
    assert [(r.status, r.error and r.error.field) for r in results] == [
        ("rejected", "value"), ("accepted", None), ("rejected", "value"),
    ]  # fmt: skip


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)
field_names = sorted({*Envelope.model_fields, *(name for kind in KINDS for name in BODIES[kind].model_fields)})


@given(
    st.sampled_from(KINDS),
    st.dictionaries(st.sampled_from(field_names) | st.text(max_size=8), json_values, max_size=8) | json_values,
)
def test_any_item_becomes_an_event_or_an_input_error(kind: str, item: Any) -> None:
    try:
        event = PARSER.parse(item, kind, ACME, NOW_US)
    except InputError as error:
        assert str(error)
        return
    assert event.occurred_at_us <= NOW_US + 60_000_000
    orjson.dumps(event.body)


@given(st.binary(max_size=60))
def test_any_body_is_read_or_refused(body: bytes) -> None:
    try:
        read_items(body, PARSER.settings)
    except InputError as error:
        assert str(error)
