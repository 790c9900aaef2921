"""The official client's surface for chat, through the router, answered by the embedded engine."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from cluster.database import connect
from cluster.settings import load_settings
from serve.engines.local import LocalEngine
from serve.keys import create_key
from serve.router import RouterApp
from serve.routes import update_route
from tests.serve.conftest import KEY, LEARNING, Live, serve_version
from tests.serve.upstream import Engine, Server

MESSAGES = [{"role": "user", "content": "disk full on host db-7 ✓"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "restart",
        "description": "Restart a host",
        "parameters": {
            "type": "object",
            "properties": {"host": {"type": "string", "maxLength": 8}},
            "required": ["host"],
        },
    },
}


@pytest.fixture(scope="module")
def routed(engine_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A router whose route has the engine's base as stable and `red` as candidate."""
    settings, _ = load_settings(home=tmp_path_factory.mktemp("routed") / "home", **LEARNING)
    database = connect(settings)
    secret = create_key(database, "test", "default", "default", ["chat", "feedback"])
    serve_version(database, "triage/1", "base")
    serve_version(database, "triage/2", "red")
    update_route(database, KEY, {"stable": "triage/1", "candidate": "triage/2"}, writer="person:test")
    app = RouterApp(settings, default_engine_url=engine_url)
    app.watcher.refresh()
    with Server(app, lifespan="on") as url:
        live = Live(url, secret, Engine(), engine_url, database, settings, app)
        yield live
        for client in live.clients:
            client.close()
    database.dispose()


def create(live: Live, **extra: Any) -> Any:
    asked = {"model": "triage", "messages": MESSAGES, "max_tokens": 12, "seed": 3} | extra
    return live.client().chat.completions.create(**asked)


def test_several_choices_usage_and_log_probabilities(routed: Live) -> None:
    answer = create(routed, n=2, temperature=1.0, logprobs=True, top_logprobs=2)
    assert [c.index for c in answer.choices] == [0, 1]
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    for choice in answer.choices:
        assert choice.finish_reason in ("stop", "length")
        assert [len(entry.top_logprobs) for entry in choice.logprobs.content] == [2] * len(choice.logprobs.content)
    assert not hasattr(answer.choices[0], "token_ids")


def test_stream_adds_up_to_the_whole_answer_with_usage_and_several_choices(routed: Live) -> None:
    whole = create(routed, n=2)
    chunks = list(create(routed, n=2, stream=True, stream_options={"include_usage": True}))
    for choice in whole.choices:
        said = [c.choices[0].delta.content or "" for c in chunks if c.choices and c.choices[0].index == choice.index]
        assert "".join(said) == choice.message.content
    assert [c.usage for c in chunks if c.usage] == [whole.usage]


def test_stop_ends_the_answer_and_the_candidate_answers_otherwise(routed: Live) -> None:
    free = create(routed, max_tokens=40, seed=2).choices[0].message.content
    cut = create(routed, max_tokens=40, seed=2, stop=free[5:7]).choices[0]
    assert (cut.finish_reason, cut.message.content) == ("stop", free[: free.index(free[5:7])])
    red = create(routed, model="triage/2", max_tokens=40, seed=2)
    assert (red.model, red.choices[0].message.content != free) == ("triage/2", True)


def test_tools_pass_to_the_engine_and_the_clients_stream_helper_takes_the_answer(routed: Live) -> None:
    (call,) = create(routed, tools=[TOOL], tool_choice="required", max_tokens=120).choices[0].message.tool_calls
    assert (call.function.name, set(json.loads(call.function.arguments))) == ("restart", {"host"})
    assert create(routed, tools=[TOOL], tool_choice="auto").choices[0].message.tool_calls is None
    stop = create(routed, max_tokens=20).choices[0].message.content[4:6]  # the helper takes no answer that was cut off
    asked: dict[str, Any] = {"model": "triage", "messages": MESSAGES, "max_tokens": 20, "seed": 3, "stop": stop}
    with routed.client().chat.completions.stream(**asked) as stream:
        events = [event.type for event in stream]
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= set(events)
    assert final.choices[0].message.content == create(routed, max_tokens=20, stop=stop).choices[0].message.content


def test_async_client_asks_many_at_once_and_streams(routed: Live) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{routed.url}/v1", api_key=routed.secret, max_retries=0) as client:

            async def one(seed: int, stream: bool) -> str:
                answer = await client.chat.completions.create(
                    model="triage", messages=MESSAGES, max_tokens=8, seed=seed, stream=stream
                )  # type: ignore[call-overload]
                if not stream:
                    return str(answer.choices[0].message.content)
                return "".join([c.choices[0].delta.content or "" async for c in answer if c.choices])

            return await asyncio.gather(*(one(seed, stream) for stream in (False, True) for seed in range(8)))

    said = asyncio.run(ask())
    assert said[:8] == said[8:]
    assert len(set(said[:8])) > 1


@pytest.mark.parametrize(
    ("wrong", "error", "param"),
    [
        ({"temperature": 3}, openai.BadRequestError, "temperature"),
        ({"n": 99}, openai.BadRequestError, "n"),
        ({"max_tokens": 100_000}, openai.BadRequestError, "messages"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"model": "nobody"}, openai.NotFoundError, "model"),
    ],
)
def test_errors_are_the_clients_own_with_the_field(
    routed: Live, wrong: dict[str, Any], error: type[openai.APIStatusError], param: str
) -> None:
    for stream in (False, True):
        with pytest.raises(error) as caught:
            create(routed, stream=stream, **wrong)
        assert (caught.value.param, caught.value.response.headers["x-should-retry"]) == (param, "false")
        assert caught.value.request_id


def test_interaction_has_the_engines_ids_and_log_probabilities(routed: Live) -> None:
    answer = create(routed, logprobs=True, extra_body={"return_token_ids": True}, user="ids")
    routed.events("interaction", 1)
    bodies = {e.event.interaction_id: e.event.body for e in routed.events("interaction", 1)}
    while answer.id not in bodies:
        bodies = {e.event.interaction_id: e.event.body for e in routed.events("interaction", len(bodies) + 1)}
    body = bodies[answer.id]
    assert body["completion_token_ids"] == answer.choices[0].token_ids
    assert body["prompt_token_ids"] == answer.model_extra["prompt_token_ids"]
    assert body["completion_logprobs"] == pytest.approx([e.logprob for e in answer.choices[0].logprobs.content])


def test_text_completions_continue_a_prompt_as_text_and_as_token_ids(routed: Live, engine: LocalEngine) -> None:
    client = routed.client()
    asked: dict[str, Any] = {"model": "triage", "max_tokens": 10, "seed": 4}
    whole = client.completions.create(prompt="disk full on", logprobs=2, n=2, **asked)
    by_ids = client.completions.create(prompt=engine.tokenizer.encode("disk full on"), n=2, **asked)
    assert [c.text for c in whole.choices] == [c.text for c in by_ids.choices]
    assert whole.usage == by_ids.usage
    for choice in whole.choices:
        assert choice.logprobs is not None and choice.logprobs.tokens is not None
        assert "".join(choice.logprobs.tokens).removesuffix("<|im_end|>") == choice.text
        tops = choice.logprobs.top_logprobs or []
        assert len(tops) == len(choice.logprobs.tokens)
        assert all(1 <= len(top) <= 2 for top in tops)  # by text: two ids may read the same
    pieces = list(client.completions.create(prompt="disk full on", n=2, stream=True, **asked))
    for choice in whole.choices:
        mine = [p.choices[0] for p in pieces if p.choices and p.choices[0].index == choice.index]
        assert "".join(c.text for c in mine) == choice.text
        assert [c.finish_reason for c in mine if c.finish_reason] == [choice.finish_reason]
    for wrong, param in (
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": [10**9]}, "prompt"),
        ({"echo": True}, "echo"),
        ({"logprobs": -1}, "logprobs"),
        ({"max_tokens": 100_000}, "prompt"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(**({"prompt": "x"} | asked | wrong))  # type: ignore[call-overload]
        assert caught.value.param == param


class Flaky:
    """An engine in front of the scripted one that refuses the first requests."""

    def __init__(self, engine: Engine, statuses: list[int]) -> None:
        self.engine, self.statuses, self.asked = engine, statuses, 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.asked += 1
        if not self.statuses:
            await self.engine(scope, receive, send)
            return
        body = json.dumps({"error": {"message": "busy", "type": "server_error", "param": None, "code": None}}).encode()
        head = [(b"content-length", b"%d" % len(body)), (b"retry-after", b"0")]
        await send({"type": "http.response.start", "status": self.statuses.pop(0), "headers": head})
        await send({"type": "http.response.body", "body": body})


def test_client_retries_what_it_should_and_no_more(tmp_path: Path) -> None:
    settings, _ = load_settings(home=tmp_path / "home", serve={"retry_after_s": 0.01})
    database = connect(settings)
    secret = create_key(database, "test", "default", "default", ["chat"])
    serve_version(database, "triage/1", "base")
    update_route(database, KEY, {"stable": "triage/1"}, writer="person:test")
    engine = Flaky(Engine(), [])
    with Server(engine) as engine_url:
        app = RouterApp(settings, default_engine_url=engine_url)
        app.watcher.refresh()
        with Server(app, lifespan="on") as url, httpx.Client() as http:
            client = openai.OpenAI(base_url=f"{url}/v1", api_key=secret, max_retries=2, http_client=http)
            for statuses, asked in (([503, 500], 3), ([429, 429], 3), ([], 1)):
                engine.statuses, engine.asked = list(statuses), 0
                assert client.chat.completions.create(model="triage", messages=MESSAGES)  # type: ignore[arg-type]
                assert engine.asked == asked
            engine.statuses, engine.asked = [422], 0
            with pytest.raises(openai.UnprocessableEntityError):
                client.chat.completions.create(model="triage", messages=MESSAGES)  # type: ignore[arg-type]
            assert engine.asked == 1
            engine.statuses = []
            engine.engine.behaviours["base"].delay_s = 2.0
            with pytest.raises(openai.APITimeoutError):
                client.with_options(timeout=0.2, max_retries=0).chat.completions.create(
                    model="triage",
                    messages=MESSAGES,  # type: ignore[arg-type]
                )
    database.dispose()
