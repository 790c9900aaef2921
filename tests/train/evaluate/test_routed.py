"""A version whose weights are elsewhere is asked over HTTP."""

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from cluster.errors import InputError, UnavailableError
from cluster.registry import Registry, Version
from cluster.settings import Settings, load_settings
from data.tool_calls import calls_in
from tests.train.evaluate.fakes import make_truths, prompt
from train.evaluate.evidence import Evidence
from train.evaluate.gates import perplexity
from train.evaluate.models import open_version
from train.evaluate.types import Prompt

TOOLS = ({"type": "function", "function": {"name": "close", "parameters": {"type": "object"}}},)


class Router(BaseHTTPRequestHandler):
    """Repeats the question in capitals, or calls the tool it is given."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append((self.path, self.headers["authorization"], body["model"]))  # type: ignore[attr-defined]
        message: dict[str, Any] = {"role": "assistant", "content": body["messages"][-1]["content"].upper()}
        if body.get("tools"):
            call = {"id": "c", "type": "function", "function": {"name": "close", "arguments": '{"id": 7}'}}
            message |= {"content": None, "tool_calls": [call]}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        reply = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
        content = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *given: Any) -> None:
        """Nothing."""


@pytest.fixture
def router() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Router)
    server.asked = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def remote() -> Version:
    tags = {"rayloop.endpoint": "https://there"}
    return Version("triage/4", "triage", 4, "", "ft:m", None, None, None, None, None, None, tags, ())


def settings_at(settings: Settings, port: int) -> Settings:
    address = f"http://127.0.0.1:{port}"
    return load_settings(home=settings.home, evaluation={"router_url": address, "router_timeout_s": 5.0})[0]


def test_a_version_elsewhere_answers_through_the_router_and_is_asked_once(
    router: ThreadingHTTPServer, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYLOOP_API_KEY", "secret")
    chosen = settings_at(settings, router.server_address[1])
    prompts = [prompt("a"), prompt("b"), Prompt(prompt("c").messages, TOOLS)]
    for _ in range(2):
        with open_version(chosen, Registry(chosen), remote()) as model:
            said = model.answer(prompts)
            assert said[:2] == ["A", "B"]
            assert [(call.name, call.arguments) for call in calls_in(said[2])] == [("close", {"id": 7})]
            assert model.losses(make_truths(1))[0][1] == 0
    asked = router.asked  # type: ignore[attr-defined]
    assert asked == [("/v1/chat/completions", "Bearer secret", "triage/4")] * 3


def test_a_router_that_is_gone_and_a_missing_key_are_named(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = settings_at(settings, 9)
    monkeypatch.delenv("RAYLOOP_API_KEY", raising=False)
    with pytest.raises(InputError, match=r"RAYLOOP_API_KEY.*triage/4 are at https://there"):
        open_version(chosen, Registry(chosen), remote()).__enter__()
    monkeypatch.setenv("RAYLOOP_API_KEY", "secret")
    with (
        open_version(chosen, Registry(chosen), remote()) as model,
        pytest.raises(UnavailableError, match="triage/4 does not answer through"),
    ):
        model.answer([prompt("a")])


def test_without_likelihoods_perplexity_has_no_data(make_evidence: Callable[..., Evidence]) -> None:
    made = make_evidence(str.upper, str.upper, make_truths(3))
    silent = replace(made.candidate, losses=[(float("nan"), 0)] * 3)
    assert perplexity(replace(made, candidate=silent)).status == "no_data"
