"""A router before vLLM: what is captured is what the engine made."""

import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.database import connect
from cluster.settings import load_settings
from data.log import EventLog
from serve.keys import create_key
from serve.router import RouterApp
from serve.routes import RouteKey, update_route
from tests.serve.conftest import LEARNING, serve_version
from tests.serve.upstream import Server

MESSAGES: list[Any] = [{"role": "user", "content": "disk full on host db-7"}]


@pytest.mark.vllm
@pytest.mark.slow
def test_token_ids_and_log_probs_are_in_the_captured_interaction(vllm_url: str, tmp_path: Path) -> None:
    body = {"messages": MESSAGES, "temperature": 0, "max_tokens": 12, "ignore_eos": True}
    direct = httpx.post(
        f"{vllm_url}/v1/chat/completions",
        json={**body, "model": "red", "logprobs": True, "return_token_ids": True},
        timeout=120,
    ).json()
    choice = direct["choices"][0]
    settings, _ = load_settings(home=tmp_path / "home", **LEARNING)
    database = connect(settings)
    secret = create_key(database, "test", "default", "default", ["chat"])
    serve_version(database, "triage/1", "red")
    update_route(database, RouteKey("default", "triage"), {"stable": "triage/1"}, writer="person:test")
    app = RouterApp(settings, default_engine_url=vllm_url)
    app.watcher.refresh()
    headers = {"authorization": f"Bearer {secret}"}
    with Server(app, lifespan="on") as url:
        for stream in (False, True):
            sent = {**body, "model": "triage", "stream": stream, "user": "ada"}
            answer = httpx.post(f"{url}/v1/chat/completions", json=sent, headers=headers, timeout=120)
            assert answer.status_code == 200 and "token_ids" not in answer.text, answer.text
        log, deadline = EventLog(database), time.monotonic() + 30
        while len(found := log.read(kinds=["interaction"])) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    for recorded in found:
        captured = recorded.event.body
        assert captured["response"]["content"] == choice["message"]["content"]
        assert captured["prompt_token_ids"] == direct["prompt_token_ids"]
        assert captured["completion_token_ids"] == choice["token_ids"]
        expected = [token["logprob"] for token in choice["logprobs"]["content"]]
        assert captured["completion_logprobs"] == pytest.approx(expected, abs=1e-4)
        assert captured["served_version"] == "triage/1"
    database.dispose()
