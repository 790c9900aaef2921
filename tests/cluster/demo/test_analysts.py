"""The analysts against a stub of the router that keeps what it is told."""

import asyncio
import json
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI

from cluster.demo import world
from cluster.demo.analysts import Analysts, Habits, Seen, Tally, Work, control_events, react

RIGHT_SHARE = 0.6
REFUSAL = {"error": {"message": "no", "type": "invalid_request_error", "param": None, "code": None}}


class Router(ThreadingHTTPServer):
    """Answers by today's rules six times in ten, else by a wrong verdict; keeps every request."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.chats: dict[str, dict[str, Any]] = {}
        self.feedback: list[dict[str, Any]] = []
        self.behaviour: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.source = random.Random(1)
        self.failures: list[None] = []

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Router
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.keys.add(self.headers["authorization"])
        if self.path == "/v1/chat/completions":
            if self.server.failures and self.server.failures.pop() is None:
                return self.reply(400, REFUSAL)
            return self.reply(200, self.chat(body))
        kept = {"/v1/feedback": self.server.feedback, "/v1/behaviour": self.server.behaviour}[self.path]
        kept.extend(body["items"])
        results = [{"event_id": str(number), "status": "accepted"} for number, _ in enumerate(body["items"])]
        return self.reply(200, {"object": "list", "data": results})

    def chat(self, body: dict[str, Any]) -> dict[str, Any]:
        alert = alert_of(body["messages"][-1]["content"])
        triage = world.todays_rules(alert)
        right = self.server.source.random() < RIGHT_SHARE
        text = world.answer(triage if right else world.Triage("shrug", triage.owner))
        number = f"chatcmpl-{len(self.server.chats)}"
        self.server.chats[number] = {"alert": alert, "text": text, "right": right, **body}
        message = {"role": "assistant", "content": text}
        return {
            "id": number, "object": "chat.completion", "created": 1, "model": "triage/1",
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
        }  # fmt: skip

    def reply(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.send_header("x-rayloop-arm", "stable")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


def alert_of(line: str) -> world.Alert:
    fields: dict[str, Any] = dict(pair.split("=") for pair in line.split())
    return world.Alert(
        **fields
        | {
            "hour": int(fields["hour"]),
            "repeats": int(fields["repeats"]),
            "maintenance": fields["maintenance"] == "yes",
        }
    )


@pytest.fixture
def router() -> Iterator[Router]:
    server = Router()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def work(router: Router, **fields: Any) -> Tally:
    async def go() -> Tally:
        async with AsyncOpenAI(base_url=router.base_url, api_key="rl-test", max_retries=0) as client:
            return await Analysts(client, Work(**{"seed": 1, "users": 50, **fields})).run()

    return asyncio.run(go())


def thumbs(router: Router) -> dict[str, bool]:
    """Interaction id -> liked, by its thumb or rating."""
    judged = {}
    for item in router.feedback:
        if item["type"] in ("thumbs_up", "thumbs_down", "rating"):
            judged[item["interaction_id"]] = item["type"] == "thumbs_up" or item.get("value", 0) > 3
    return judged


def test_react_follows_the_habits() -> None:
    habits, source = Habits(), random.Random(2)
    kinds: Counter[str] = Counter()
    wrong = Counter()
    for alert in islice(world.alerts("live", 9), 4000):
        right = source.random() < 0.5
        text = world.answer(world.todays_rules(alert)) if right else "no idea"
        reaction = react(alert, text, habits, source)
        kinds.update(item["type"] for item in reaction.feedback)
        if reaction.feedback:
            first = reaction.feedback[0]
            liked = first["type"] == "thumbs_up" or first.get("value", 0) > 3
            wrong[liked != right] += 1
        for item in reaction.feedback:
            if item["type"] == "correction":
                assert item["text"] == world.answer(world.todays_rules(alert)) and not right
    assert wrong.total() / 4000 == pytest.approx(habits.reacts, abs=0.02)
    assert wrong[True] / wrong.total() == pytest.approx(habits.mistaken, abs=0.015)
    assert kinds["rating"] / wrong.total() == pytest.approx(habits.rates, abs=0.02)
    disliked_rightly = wrong.total() * 0.5 * (1 - habits.mistaken)
    assert kinds["correction"] / disliked_rightly == pytest.approx(habits.corrects, abs=0.04)


def test_analysts_ask_and_react_over_http(router: Router) -> None:
    tally = work(router, alerts=300)
    assert tally.answers == len(router.chats) and 300 <= tally.answers <= 316
    assert router.keys == {"Bearer rl-test"}
    assert tally.failures == tally.rejected == 0
    assert tally.arms == {"stable": tally.answers}
    assert {chat["model"] for chat in router.chats.values()} == {"triage"}
    judged = thumbs(router)
    mistaken = sum(router.chats[i]["right"] != liked for i, liked in judged.items()) / len(judged)
    assert mistaken < 0.12
    assert {item["interaction_id"] for item in router.feedback} <= set(router.chats)
    for item in router.feedback:
        assert item["user"] == router.chats[item["interaction_id"]]["user"]
    assert {item["action"] for item in router.behaviour} == {"copy", "leave", "session_end"}
    assert tally.signals.total() == len(router.feedback)


def test_shuffled_feedback_says_nothing_about_the_answers(router: Router) -> None:
    work(router, alerts=600, shuffle_feedback=True)
    judged = thumbs(router)
    liked = sum(judged.values()) / len(judged)
    agreement = sum(router.chats[i]["right"] == up for i, up in judged.items()) / len(judged)
    by_chance = liked * RIGHT_SHARE + (1 - liked) * (1 - RIGHT_SHARE)
    assert agreement == pytest.approx(by_chance, abs=0.07)
    assert 0.5 < liked < 0.7, "as much is liked as without shuffling"
    corrections = [item for item in router.feedback if item["type"] == "correction"]
    right = sum(
        item["text"] == world.answer(world.todays_rules(router.chats[item["interaction_id"]]["alert"]))
        for item in corrections
    )
    assert corrections and right / len(corrections) < 0.35


def test_control_events_deal_the_reactions_out_anew() -> None:
    source, seen = random.Random(3), []
    for number, alert in enumerate(islice(world.alerts("live", 4), 800)):
        text = world.answer(world.todays_rules(alert)) if source.random() < RIGHT_SHARE else "no idea"
        seen.append(Seen(f"i-{number}", alert, text, "ada", "s-1"))
    events = list(control_events(seen, Habits(), 1))
    asked = {event["interaction_id"]: event for event in events if event["kind"] == "interaction"}
    assert list(asked) == [answer.interaction for answer in seen]
    right = {s.interaction: s.text == world.answer(world.todays_rules(s.alert)) for s in seen}
    judged = [e for e in events if e.get("type") in ("thumbs_up", "thumbs_down", "rating")]
    liked = {e["interaction_id"]: e["type"] == "thumbs_up" or e.get("value", 0) > 3 for e in judged}
    agreement = sum(right[i] == up for i, up in liked.items()) / len(liked)
    share = sum(liked.values()) / len(liked)
    assert agreement == pytest.approx(share * RIGHT_SHARE + (1 - share) * (1 - RIGHT_SHARE), abs=0.06)


def test_asking_again_repeats_the_question_in_the_same_session(router: Router) -> None:
    work(router, alerts=300)
    asked = Counter((chat["user"], chat["messages"][-1]["content"]) for chat in router.chats.values())
    assert max(asked.values()) >= 2


def test_failed_requests_are_counted_and_survived(router: Router) -> None:
    router.failures = [None] * 3
    tally = work(router, alerts=20)
    assert tally.failures == 3 and tally.answers >= 20


def test_rate_and_time_are_bounded(router: Router) -> None:
    tally = work(router, seconds=2.0, rate_per_s=30.0)
    assert 20 <= tally.answers <= 75
    assert tally.seconds < 5


def test_analysts_as_a_process_take_the_key_on_standard_input(router: Router, tmp_path: Path) -> None:
    line = [sys.executable, "-m", "cluster.demo.analysts", "--base-url", router.base_url, "--alerts", "30"]
    line += ["--users", "20", "--control", str(tmp_path / "control.jsonl")]
    done = subprocess.run(line, input="rl-secret\n", capture_output=True, text=True, timeout=60, check=True)
    tally = json.loads(done.stdout)
    assert tally["answers"] == len(router.chats) and tally["arms"] == {"stable": tally["answers"]}
    assert sum(tally["signals"].values()) == len(router.feedback)
    assert router.keys == {"Bearer rl-secret"}
    kinds = [json.loads(event)["kind"] for event in (tmp_path / "control.jsonl").read_text().splitlines()]
    assert kinds.count("interaction") == tally["answers"] and kinds.count("feedback") > 0


def test_analysts_stop_on_a_signal_and_still_tell_their_tally(router: Router) -> None:
    line = [sys.executable, "-m", "cluster.demo.analysts", "--base-url", router.base_url, "--rate-per-s", "50"]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin and process.stdout
        process.stdin.write("rl-secret\n")
        process.stdin.flush()
        deadline = time.monotonic() + 60
        while len(router.chats) < 10 and time.monotonic() < deadline:
            time.sleep(0.05)
        process.terminate()
        assert json.loads(process.stdout.read())["answers"] >= 10
    assert process.returncode == 0
