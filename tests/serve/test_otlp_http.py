"""OTLP/HTTP on `/v1/traces` as exporters speak it, over a real port."""

import gzip
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

from data.events import Event, parse_body
from data.feedback import pseudonym, pseudonym_secret
from data.join import join_events, name_trajectories
from data.log import EventLog
from data.source import plan_blocks, read_block
from data.traces.join import add_trace, join_traces
from tests.data.traces.spans import AGENT_RUN, export_json, export_protobuf
from tests.serve.conftest import Live, live_router

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "agent.mjs"
PROTOBUF = {"content-type": "application/x-protobuf"}


def post(live: Live, body: Any, headers: dict[str, str] = {}, secret: str | None = None) -> httpx.Response:  # noqa: B006
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(
        f"{live.url}/v1/traces",
        content=content,
        headers={"authorization": f"Bearer {secret or live.secret}"} | headers,
    )


def reported(live: Live) -> list[Event]:
    events = (r.event for r in EventLog(live.database).scan())
    return [e for e in events if e.kind != "route.changed"]


def kinds(live: Live) -> list[str]:
    return [e.kind for e in reported(live)]


def test_protobuf_is_answered_in_protobuf_and_a_retry_counts_once(live: Live) -> None:
    for _ in range(2):
        response = post(live, gzip.compress(export_protobuf(AGENT_RUN)), PROTOBUF | {"content-encoding": "gzip"})
        assert (response.status_code, response.headers["content-type"]) == (200, "application/x-protobuf")
        assert not ExportTraceServiceResponse.FromString(response.content).HasField("partial_success")
    assert sorted(kinds(live)) == ["interaction", "interaction", "tool_call", "trajectory"]
    for event in reported(live):
        assert parse_body(event.kind, dict(event.body))
        assert event.user_id == pseudonym(pseudonym_secret(live.settings), "default", "ada")
        assert (event.agent, event.body["trace_id"]) == ("Order-Helper", AGENT_RUN[0].trace_id)


def test_json_is_answered_in_json_and_rejected_spans_are_named(live: Live) -> None:
    document = export_json(AGENT_RUN)
    spans = document["resourceSpans"][0]["scopeSpans"][0]["spans"]
    spans[2]["attributes"] = [a for a in spans[2]["attributes"] if a["key"] != "gen_ai.input.messages"]
    spans[4]["startTimeUnixNano"] = str(2**63)
    partial = post(live, document).json()["partialSuccess"]
    assert partial["rejectedSpans"] == "2"
    assert "gen_ai.input.messages" in partial["errorMessage"]
    assert "occurred_at" in partial["errorMessage"]
    assert sorted(kinds(live)) == ["tool_call", "trajectory"]


def test_spans_in_requests_of_their_own_end_as_one_trajectory(live: Live) -> None:
    for span in (*AGENT_RUN[1:], AGENT_RUN[0]):
        assert post(live, export_json([span])).json() == {}
    (block,) = plan_blocks(live.database, EventLog(live.database).last_seq(), 1000, 1)
    events = join_traces(add_trace(read_block(live.settings, block)))
    (run,) = [row for row in join_events(name_trajectories(events))[0].to_pylist() if row["tail"] is not None]
    said = [m["role"] for m in json.loads(run["messages"])], json.loads(run["response"])["content"]
    assert said == (["system", "user", "assistant", "tool"], "Yes, it was shipped.")


def test_answer_that_the_router_captured_is_not_counted_twice(live: Live) -> None:
    said = live.client().chat.completions.create(model="triage", messages=[{"role": "user", "content": "?"}])
    live.events("interaction", 1)
    document = export_json(AGENT_RUN[2:3])
    attributes = document["resourceSpans"][0]["scopeSpans"][0]["spans"][0]["attributes"]
    next(a for a in attributes if a["key"] == "gen_ai.response.id")["value"] = {"stringValue": said.id}
    assert post(live, document).json() == {}
    (captured,) = live.events("interaction", 1)
    assert captured.event.body["completion_token_ids"] == [10, 11, 12, 13, 14]


def test_our_own_batch_form_is_taken_too(live: Live) -> None:
    asked = {"interaction_id": "i1", "messages": [{"role": "user", "content": "?"}]}
    items = [asked, {"kind": "tool_call", "name": "f"}, {**asked, "interaction_id": "i2", "arm": "candidate"}]
    answers = post(live, {"items": items}).json()["data"]
    assert [a["status"] for a in answers] == ["accepted", "accepted", "rejected"]
    assert answers[2]["error"]["param"] == "arm"


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"\xff\xff", PROTOBUF, 400),
        (b"{", {}, 400),
        (b'{"resourceSpans": 3}', {}, 400),
        (b"not gzip", {"content-encoding": "gzip"}, 400),
        (gzip.compress(b'{"resourceSpans": []}', mtime=0)[:-9], {"content-encoding": "gzip"}, 400),
        (b"{}", {"content-encoding": "br"}, 415),
        (gzip.compress(b" " * 20_000_000, mtime=0), {"content-encoding": "gzip"}, 413),
        (gzip.compress(b" " * 20_000_000, mtime=0), PROTOBUF | {"content-encoding": "gzip"}, 413),
    ],
)
def test_bad_body_is_refused_in_the_shape_its_sender_reads(
    live: Live, body: bytes, headers: dict[str, str], status: int
) -> None:
    response = post(live, body, headers)
    assert response.status_code == status
    if headers.get("content-type"):
        assert response.headers["content-type"] == "application/x-protobuf"
        assert response.content[:2] == b"\x08\x03"  # google.rpc.Code.INVALID_ARGUMENT
    else:
        assert response.json()["error"]["type"] == "invalid_request_error"


def test_wrong_key_is_401_in_protobuf_too(live: Live) -> None:
    response = post(live, export_protobuf(AGENT_RUN), PROTOBUF, secret="rl-nope")
    assert (response.status_code, response.content[:2]) == (401, b"\x08\x10")
    assert b"API key" in response.content


@pytest.fixture
def no_capture(tmp_path: Path) -> Iterator[Live]:
    yield from live_router(tmp_path / "home", capture={"enabled": False})


def test_traces_are_refused_while_capture_is_off(no_capture: Live) -> None:
    response = post(no_capture, export_json(AGENT_RUN))
    assert (response.status_code, response.json()["error"]["code"]) == (403, "feature_disabled")
    assert "capture.enabled" in response.json()["error"]["message"]


def run_example(**environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["node", str(EXAMPLE)], env={**os.environ, **environment}, capture_output=True, text=True, timeout=60
    )


def test_node_example_reports_its_run_and_its_feedback(live: Live) -> None:
    run = run_example(RAYLOOP_ENABLED="true", RAYLOOP_URL=live.url, RAYLOOP_API_KEY=live.secret)
    assert (run.returncode, run.stdout, run.stderr) == (0, "Yes, it was shipped.\n", "")
    events = reported(live)
    assert sorted(e.kind for e in events) == ["feedback", "interaction", "interaction", "tool_call", "trajectory"]
    by_kind = {e.kind: e for e in events}
    assert by_kind["feedback"].interaction_id in {e.interaction_id for e in events if e.kind == "interaction"}
    assert by_kind["tool_call"].body["result"] == {"order": 7, "status": "shipped"}
    assert [m["role"] for m in by_kind["trajectory"].body["messages"]] == ["user", "assistant", "tool", "assistant"]
    assert len({e.user_id for e in events}) == 1


def test_node_example_answers_without_the_service_and_warns_once() -> None:
    run = run_example(RAYLOOP_ENABLED="true", RAYLOOP_URL="http://127.0.0.1:9")
    assert (run.returncode, run.stdout) == (0, "Yes, it was shipped.\n")
    assert run.stderr.count("rayloop:") == 1
    assert run_example(RAYLOOP_ENABLED="").stderr == ""
