"""GRPO for an agent with tools: who answers its calls, what is learned from, and what a failed world is worth."""

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from pydantic import ValidationError

from cluster.errors import InputError, UnavailableError
from cluster.settings import load_settings
from cluster.settings.training import ToolWorldSettings, ToySettings
from data.tool_calls import ToolCall, parse_calls, recorded_results
from tests.toys import toy_feedback, write_dataset
from train.config import TrainConfig, resolve_config
from train.episodes import Player
from train.examples import Encoder, read_split
from train.generate import LocalModel, Sampling
from train.rewards import reward_function
from train.run import train
from train.toy import build_toy_base
from train.worlds import Recorded, Stubs, ToolServer, WorldFailedError, check_world, open_world

VERDICTS = {"low": "ignore", "dead": "page"}
TOOLS = [{"type": "function", "function": {"name": "level", "parameters": {"type": "object"}}}]
RECORDED = ToolWorldSettings(answers="recorded", max_turns=3)
GRADER = {"type": "string_check", "reference": "{{ item.reference }}", "operation": "eq"}


def episode(number: int, random: Random, *, right: bool) -> list[dict[str, Any]]:
    """A question, a call of a tool, what it said, and a verdict; a wrong agent always ignores."""
    service, level = random.choice(["api", "mail", "search"]), random.choice(list(VERDICTS))
    call = {"type": "function", "function": {"name": "level", "arguments": {}}}
    return [
        {"role": "user", "content": f"{service} {number % 10}?"},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "c1", **call}]},
        {"role": "tool", "content": level, "name": "level", "tool_call_id": "c1"},
        {"role": "assistant", "content": VERDICTS[level] if right else "ignore"},
    ]


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that calls its tool, and is right once in three times that a service is dead."""
    random, out = Random(0), tmp_path_factory.mktemp("agent") / "base"
    chats = [episode(n, random, right=n % 3 == 0) for n in range(400)]
    shape = ToySettings(hidden=64, layers=2, heads=2, intermediate=160, vocab=420, epochs=12, learning_rate=4e-3)
    build_toy_base(out, chats, shape.model_copy(update={"batch_size": 32}))
    return out


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recorded trajectories that went well."""
    random, rows = Random(1), []
    for number in range(80):
        messages = episode(number, random, right=True)
        base = {"user_id": "u", "interaction_ids": [f"i{number}"], "cluster_id": f"c{number}", "agent": "triage"}
        base |= {"example_id": f"t{number:05d}", "order": 0.0, "origin": "trajectory", "weight": 1.0, "reward": 1.0}
        said = json.dumps(messages[1:])
        rows.append({**base, "prompt": json.dumps(messages[:1]), "trajectory": said, "tools": None})
    return write_dataset(tmp_path_factory.mktemp("tasks") / "tasks", {**toy_feedback(4), "trajectory": rows})


def config_for(agent: Path, tasks: Path, out: Path, **more: Any) -> TrainConfig:
    """A short GRPO run on the tasks."""
    settings, _ = load_settings(home=out.parent / "home")
    shape = {"batch_size": 64, "gradient_accumulation": 1, "group_size": 8, "threads": 1, "learning_rate": 1e-2}
    shape |= {"max_completion_tokens": 64, "max_steps": 10, "epochs": 4, "max_length": 256, "eval_steps": 5}
    places = {"base_model": str(agent), "dataset": tasks, "out": out}
    return resolve_config(settings, "grpo", **{**shape, **places, "grader": GRADER, "tools": RECORDED, **more})


def test_agent_learns_to_use_what_its_tool_said(agent: Path, tasks: Path, tmp_path: Path) -> None:
    metrics = train(config_for(agent, tasks, tmp_path / "out")).metrics
    assert metrics["heldout/reward"] > metrics["heldout/base_reward"] + 0.1
    assert metrics["tools/calls"] > 0.6 and metrics["tools/failed_episodes"] < 0.2


def test_only_what_the_model_wrote_is_learned_from(agent: Path, tasks: Path) -> None:
    model = LocalModel(agent, threads=1)
    rows = Encoder(model.tokenizer, 256).prompts(read_split(tasks, "trajectory", "train")).rows[:6]
    player = Player(model.tokenizer, RECORDED, max_tokens=96)
    episodes = player.play(model.model, [row["prompt"] for row in rows], Sampling(96, 0.0, 0, 8))
    done = [one for one in episodes if one.calls and not one.failed]
    assert done
    for one in done:
        assert len(one.ids) == len(one.mask) and one.turns == 2
        tool = model.tokenizer.decode([i for i, m in zip(one.ids, one.mask, strict=True) if not m])
        assert tool in ("<|tool|>low<|end|><|assistant|>", "<|tool|>dead<|end|><|assistant|>")
        written = model.tokenizer.decode([i for i, m in zip(one.ids, one.mask, strict=True) if m])
        assert written.count("<|end|>") == 2 and written.endswith(f"{one.text}<|end|>")
    short = Player(model.tokenizer, RECORDED.model_copy(update={"max_turns": 1}), 96)
    assert all(one.turns == 1 for one in short.play(model.model, [rows[0]["prompt"]], Sampling(96, 0.0, 0, 8)))
    (cut,) = Player(model.tokenizer, RECORDED, 5).play(model.model, [rows[0]["prompt"]], Sampling(96, 0.0, 0, 8))
    assert len(cut.ids) == 5


def test_failed_world_earns_nothing_and_stops_a_run_that_has_no_other(agent: Path, tasks: Path, tmp_path: Path) -> None:
    from cluster.errors import HealthGateError

    grade = reward_function(GRADER, None)
    items = [json.dumps({"reference": "page"})] * 2
    samples = [{"output_text": "page", "output_tools": []}, None]
    assert grade(["", ""], item=items, log_metric=lambda *_: None, sample=samples) == [1.0, None]
    away = ToolWorldSettings(answers="server", url="http://127.0.0.1:9", timeout_s=0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYLOOP_API_KEY", "k")
        patch.setattr("train.run.check_world", lambda settings: None)  # it goes away after the start
        with pytest.raises(HealthGateError, match="the grader abstained on"):
            train(config_for(agent, tasks, tmp_path / "out", tools=away, health={"window_steps": 2}))


def test_recording_answers_what_was_recorded_and_nothing_else() -> None:
    asked = ToolCall("level", {"service": "api"})
    world = Recorded(["level", "owner"], [(asked, "low"), (asked, "dead")])
    assert [world.answer(asked) for _ in range(3)] == ["low", "dead", "dead"]
    with pytest.raises(WorldFailedError, match="no recording of"):
        world.answer(ToolCall("level", {"service": "mail"}))
    assert "there is no tool fly" in world.answer(ToolCall("fly", {}))
    assert Stubs({"level": "low"}).answer(asked) == "low"


def test_calls_are_read_from_answers_and_from_recordings() -> None:
    text = (
        'so <tool_call>{"name": "f", "arguments": {"a": {"b": 1}}}</tool_call><tool_call>{"arguments": 1}</tool_call>'
    )
    assert parse_calls(text) == [ToolCall("f", {"a": {"b": 1}})]
    call = {"function": {"name": "f", "arguments": '{"n": 1}'}}
    messages = [
        {"role": "assistant", "tool_calls": [{"id": "a", **call}, {"id": "b", "function": {"name": "g"}}]},
        {"role": "tool", "tool_call_id": "b", "content": "second"},
        {"role": "tool", "tool_call_id": "a", "content": "first"},
    ]
    assert recorded_results(messages) == [(ToolCall("g", {}), "second"), (ToolCall("f", {"n": 1}), "first")]


def test_recorded_results_of_real_trajectories(shared_data: Path) -> None:
    lines = (shared_data / "tool_call_trajectories.jsonl").read_text().splitlines()
    trajectories = [json.loads(line)["traj"] for line in lines]
    for messages in trajectories:
        results = recorded_results(messages)
        assert len(results) == sum(message["role"] == "tool" for message in messages)
        world = Recorded([], results)
        assert [world.answer(call) for call, _ in results] == [result for _, result in results]


@pytest.fixture
def server() -> Iterator[str]:
    """A tool server in this process: one tool, one key."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def reply(self, status: int, document: dict[str, Any]) -> None:
            body = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            allowed = self.headers["Authorization"] == "Bearer secret"
            self.reply(200, {"data": []}) if allowed else self.reply(401, {"error": {}})

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path == "/v1/tools/broken":
                self.reply(503, {"error": {}})
            elif self.path != "/v1/tools/level":
                self.reply(404, {"error": {"message": "no such tool"}})
            else:
                self.reply(200, {"result": {"of": asked["arguments"]["service"]}})

        def log_message(self, *_: Any) -> None:
            """Quiet."""

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_address[1]}"
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def test_tool_server_answers_refuses_and_fails(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ToolWorldSettings(answers="server", url=server, timeout_s=10)
    with pytest.raises(InputError, match="RAYLOOP_API_KEY=None is not set"):
        check_world(settings)
    monkeypatch.setenv("RAYLOOP_API_KEY", "wrong")
    with pytest.raises(UnavailableError, match="does not answer"):
        check_world(settings)
    monkeypatch.setenv("RAYLOOP_API_KEY", "secret")
    check_world(settings)
    world = open_world(settings, [], [])
    assert isinstance(world, ToolServer)
    assert json.loads(world.answer(ToolCall("level", {"service": "api"}))) == {"of": "api"}
    assert "no such tool" in world.answer(ToolCall("other", {}))
    with pytest.raises(WorldFailedError, match="answered 503"):
        world.answer(ToolCall("broken", {}))


def test_worlds_without_what_they_need_are_refused() -> None:
    for answers, missing in (("stubs", "needs `stubs`"), ("server", "needs `url`")):
        with pytest.raises(ValidationError, match=missing):
            ToolWorldSettings(answers=answers)  # type: ignore[arg-type]
