"""What is recorded arrives once, whatever becomes of the service, or is counted as lost."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from serve.client import Client
from serve.sender import SenderLimits
from tests.serve.client.conftest import Make, at, balanced, settle, warnings
from tests.serve.conftest import Live
from tests.services import Scripted, dripping, hanging, refused, scripted

PAID_S = 0.02
"""Most that one call may cost the agent on a busy machine; it costs some hundredths of a millisecond."""
SLACK_S = 5.0


def test_rejected_item_is_counted_and_told_of_once(
    live: Live, rayloop: Client, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        rayloop.feedback("i1", "rating", value=9)
    rayloop.feedback("i1", "thumbs_up")
    assert rayloop.flush(20)
    stats = balanced(rayloop)
    assert (stats["rejected"], stats["accepted"]) == (3, 1)
    assert len(warnings(caplog)) == 1
    assert "value=9" in warnings(caplog)[0]


def test_what_cannot_be_recorded_never_reaches_the_agent(rayloop: Client, caplog: pytest.LogCaptureFixture) -> None:
    class Odd:
        def __str__(self) -> str:
            raise RuntimeError("no")

    @rayloop.prediction(request=lambda x: 1 / 0)  # type: ignore[arg-type,return-value]
    def unreadable_request(x: int) -> int:
        return x

    @rayloop.prediction()
    def unreadable_answer(x: int) -> Any:
        return Odd()

    @rayloop.tool
    def odd(value: float) -> float:
        return value

    assert unreadable_request(3) == 3
    assert isinstance(unreadable_answer(1), Odd)
    assert odd(float("nan")) != odd(float("nan"))
    balanced(rayloop)
    assert rayloop.stats()["unrecorded"] >= 1


def test_dry_run_writes_what_would_be_sent_and_sends_nothing(make: Make, tmp_path: Path) -> None:
    service = Scripted((200, b"{}", {}))
    with scripted(service) as url:
        client = make(url, dry_run=tmp_path / "out" / "dry.jsonl")

        @client.prediction(agent="triage")
        def answer(question: str) -> str:
            return "write to eve@example.com"

        answer("?")
        client.feedback("i1", "thumbs_up")
        assert client.call_tool("t", {}, local=lambda: "local") == "local"
        assert client.grade({"type": "string_check"}, "x") is None
        assert client.flush(10)
    lines = [json.loads(line) for line in (tmp_path / "out" / "dry.jsonl").read_text().splitlines()]
    assert sorted(line["path"] for line in lines) == ["/v1/feedback", "/v1/traces", "/v1/trajectories"]
    shown = next(line["item"] for line in lines if line["path"] == "/v1/traces")
    assert shown["response"]["content"] == "write to <EMAIL_1>"
    assert service.requests == []


@pytest.mark.parametrize("kind", ["refused", "hanging", "dripping", "failing", "overloaded", "stranger"])
def test_dead_service_costs_one_warning_and_bounded_memory(
    kind: str, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """The calling thread never touches the network, so what it pays does not depend on the service."""
    answers = {
        "failing": (500, b"", {}),
        "overloaded": (429, b"", {"retry-after": "0.01"}),
        "stranger": (200, b"<html>", {}),
    }
    places = {"refused": lambda: at(refused()), "hanging": hanging, "dripping": dripping}
    place = places[kind]() if kind in places else scripted(Scripted(answers[kind]))
    limits = SenderLimits(
        linger_s=0, timeout_s=0.2, retry_s=0.01, exit_s=0.3, half_open_s=30, queue_items=50, queue_bytes=50_000
    )
    with place as url:
        client = make(url, limits=limits)

        @client.prediction(agent="triage")
        def answer(question: str) -> str:
            assert threading.current_thread() is threading.main_thread()
            return "yes"

        began = time.monotonic()
        for _ in range(500):
            assert answer("?") == "yes"
        assert time.monotonic() - began < 500 * PAID_S
        stats = balanced(client)
        assert stats["waiting"] <= 50
        assert stats["waiting_bytes"] <= 50_000
        assert stats["dropped_by_reason"]["queue_full"] >= 450
        if kind != "dripping":
            settle(client, lambda s: s["breaker_open"])
        began = time.monotonic()
        client.close()
        assert time.monotonic() - began < limits.exit_s + limits.timeout_s + SLACK_S
        stats = balanced(client)
        assert (stats["waiting"], stats["dropped"]) == (0, 500)
    assert len(warnings(caplog)) == 1


def test_service_that_returns_gets_what_waited(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    ok = json.dumps({"data": [{"event_id": "x", "status": "accepted"}]}).encode()
    service = Scripted((500, b"", {}), (500, b"", {}), (500, b"", {}), (200, ok, {}))
    limits = SenderLimits(linger_s=0, retry_s=0.01, half_open_s=0.05, batch_items=1)
    with scripted(service) as url:
        client = make(url, limits=limits)
        client.feedback("i1", "thumbs_up")
        assert client.flush(20)
        assert len(service.requests) == 4
        assert len({body for _, body, _ in service.requests}) == 1
    assert balanced(client)["accepted"] == 1
    assert len(warnings(caplog)) == 1


def test_batch_too_long_for_the_service_is_halved(make: Make) -> None:
    ok = json.dumps({"data": [{"event_id": "x", "status": "accepted"}]}).encode()
    service = Scripted((413, b"", {}), (200, ok, {}), (413, b"", {}))
    with scripted(service) as url:
        client = make(url, limits=SenderLimits(linger_s=30))
        client.feedback("i1", "thumbs_up")
        client.feedback("i2", "thumbs_up")
        assert client.flush(20)
    stats = balanced(client)
    assert (stats["accepted"], stats["rejected"]) == (1, 1)


def test_redirect_is_not_followed_with_the_key(make: Make) -> None:
    thief = Scripted((200, b"{}", {}))
    with scripted(thief) as target, scripted(Scripted((302, b"", {"location": target}))) as url:
        client = make(url, api_key="rl-secret")
        client.feedback("i1", "thumbs_up")
        settle(client, lambda s: s["breaker_open"])
    assert thief.requests == []


def test_nothing_unscrubbed_leaves_when_scrubbing_fails(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    service = Scripted((200, b"{}", {}))
    monkeypatch.setitem(sys.modules, "data.scrub_text", None)
    with scripted(service) as url:
        client = make(url)
        client.feedback("i1", "thumbs_up", text="eve@example.com")
        settle(client, lambda s: s["dropped_by_reason"].get("not_scrubbed") == 1)
    assert service.requests == []


def test_flood_from_many_threads_adds_up(live: Live, make: Make) -> None:
    client = make(live.url, api_key=live.secret, limits=SenderLimits(queue_items=300, linger_s=0.01), scrub=False)

    def flood() -> None:
        for _ in range(200):
            client.feedback("i1", "thumbs_up")

    threads = [threading.Thread(target=flood) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert client.flush(30)
    stats = balanced(client)
    assert stats["recorded"] == 1600
    assert stats["accepted"] + stats["dropped"] == 1600
    assert len(live.events("feedback", 1)) == min(stats["accepted"], 1000)


def test_item_too_large_is_dropped_and_counted(make: Make) -> None:
    client = make(refused(), limits=SenderLimits(item_bytes=1000))
    assert client.feedback("i1", "correction", text="x" * 2000) is False
    assert balanced(client)["dropped_by_reason"] == {"too_large": 1}


AGENT = """
import os, sys
from serve.client import Client
rayloop = Client()
rayloop.feedback("parent", "thumbs_up")
if "fork" in sys.argv:
    pid = os.fork()
    if pid == 0:
        rayloop.feedback("child", "thumbs_up")
        rayloop.close()
        os._exit(0)
    os.waitpid(pid, 0)
if "multiprocessing" in sys.argv:
    import multiprocessing
    child = multiprocessing.get_context("fork").Process(target=rayloop.feedback, args=("child", "thumbs_up"))
    child.start(); child.join()
"""


@pytest.mark.parametrize("way", ["plain", "fork", "multiprocessing"])
def test_end_of_a_process_sends_what_waits(way: str, live: Live) -> None:
    environment = os.environ | {"RAYLOOP_ENABLED": "true", "RAYLOOP_URL": live.url, "RAYLOOP_API_KEY": live.secret}
    run = subprocess.run([sys.executable, "-c", AGENT, way], env=environment, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    wanted = ["parent"] if way == "plain" else ["child", "parent"]
    found = [r.event.interaction_id for r in live.events("feedback", len(wanted))]
    assert sorted(map(str, found)) == wanted
