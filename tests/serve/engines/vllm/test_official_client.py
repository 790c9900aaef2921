"""The official client's surface through the router, the same before vLLM and before the embedded engine."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from cluster.database import connect
from cluster.settings import load_settings
from serve.keys import create_key
from serve.router import RouterApp
from serve.routes import update_route
from tests.serve.conftest import KEY, LEARNING, serve_version
from tests.serve.upstream import Server

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
ENGINES = ("vllm", "local")
MESSAGES: list[Any] = [{"role": "user", "content": "disk full on host db-7"}]
SCHEMA: dict[str, Any] = {
    "type": "object", "properties": {"verdict": {"enum": ["ignore", "page"]}, "calm": {"type": "boolean"}},
    "required": ["verdict", "calm"], "additionalProperties": False,
}  # fmt: skip
HOST = {
    "type": "object", "properties": {"host": {"enum": ["db-7", "db-8"]}}, "required": ["host"],
    "additionalProperties": False,
}  # fmt: skip
TOOL: Any = {"type": "function", "function": {"name": "restart", "description": "Restart a host", "parameters": HOST}}
JUDGE: Any = {"type": "function", "function": {"name": "judge", "parameters": SCHEMA}}
FIELDS = {"restart": {"host"}, "judge": {"verdict", "calm"}}
FORM: Any = {"type": "json_schema", "json_schema": {"name": "triage", "strict": True, "schema": SCHEMA}}
NAMED: Any = {"type": "function", "function": {"name": "restart"}}

Routed = dict[str, tuple[str, str]]
"""URL and secret of the router before each engine."""


@pytest.fixture(scope="module")
def routed(vllm_url: str, local_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Routed]:
    servers, found = [], {}
    for name, engine_url in zip(ENGINES, (vllm_url, local_url), strict=True):
        settings, _ = load_settings(home=tmp_path_factory.mktemp(name) / "home", **LEARNING)
        database = connect(settings)
        secret = create_key(database, "test", "default", "default", ["chat"])
        serve_version(database, "triage/1", "red")
        update_route(database, KEY, {"stable": "triage/1"}, writer="person:test")
        app = RouterApp(settings, default_engine_url=engine_url)
        app.watcher.refresh()
        server = Server(app, lifespan="on")
        found[name] = (server.__enter__(), secret)
        servers.append((server, database))
    yield found
    for server, database in servers:
        server.__exit__(None, None, None)
        database.dispose()


@pytest.fixture(params=ENGINES)
def client(request: pytest.FixtureRequest, routed: Routed) -> Iterator[openai.OpenAI]:
    url, secret = routed[request.param]
    with openai.OpenAI(base_url=f"{url}/v1", api_key=secret, max_retries=0, timeout=120) as made:
        yield made


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    body = {"model": "triage", "messages": MESSAGES, "temperature": 0, "max_tokens": 12} | fields
    return client.chat.completions.create(**body)


def test_several_choices_with_log_probabilities(client: openai.OpenAI) -> None:
    answer = ask(client, n=2, temperature=1.0, seed=1, logprobs=True, top_logprobs=2)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    for choice in answer.choices:
        assert all(len(entry.top_logprobs) == 2 and entry.logprob <= 0 for entry in choice.logprobs.content)


def test_structured_output_keeps_to_its_schema_and_is_parsed(client: openai.OpenAI) -> None:
    for stream in (False, True):
        answer = ask(client, response_format=FORM, max_tokens=60, stream=stream)
        pieces = [c.choices[0].delta.content or "" for c in answer if c.choices] if stream else []
        said = json.loads("".join(pieces) if stream else answer.choices[0].message.content)
        assert set(said) == {"verdict", "calm"}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("choice", "tools", "names"),
    [(NAMED, [TOOL, JUDGE], {"restart"}), ("required", [TOOL], {"restart"}), ("required", [TOOL, JUDGE], set(FIELDS))],
    ids=["named", "required", "required of two"],
)
def test_a_call_that_is_asked_for_is_made(
    client: openai.OpenAI, choice: Any, tools: list[Any], names: set[str], stream: bool
) -> None:
    """At any temperature: a random model must not be able to do otherwise."""
    for sampled in ({"temperature": 0}, {"temperature": 1.5, "seed": 1}, {"temperature": 1.5, "seed": 2}):
        answer = ask(client, tools=tools, tool_choice=choice, max_tokens=120, stream=stream, **sampled)
        choices = [c for chunk in answer for c in chunk.choices] if stream else answer.choices
        ((name, arguments),) = streamed_calls(choices) if stream else whole_calls(answer)
        assert name in names and set(json.loads(arguments)) == FIELDS[name]
        assert [c.finish_reason for c in choices if c.finish_reason] == ["stop" if choice is NAMED else "tool_calls"]


def whole_calls(answer: Any) -> list[tuple[str, str]]:
    return [(call.function.name, call.function.arguments) for call in answer.choices[0].message.tool_calls]


def streamed_calls(choices: Any) -> list[tuple[str, str]]:
    calls: dict[int, tuple[str, str]] = {}
    for piece in [piece for choice in choices for piece in choice.delta.tool_calls or []]:
        name, arguments = calls.get(piece.index, ("", ""))
        said = piece.function
        calls[piece.index] = (name + (said.name or ""), arguments + (said.arguments or ""))
    return list(calls.values())


@pytest.mark.parametrize("choice", ["auto", "none"])
def test_a_model_that_is_free_to_call_and_does_not_just_answers(client: openai.OpenAI, choice: str) -> None:
    for stream in (False, True):
        answer = ask(client, tools=[TOOL], tool_choice=choice, stream=stream)
        if stream:
            choices = [c for chunk in answer for c in chunk.choices]
            assert "".join(c.delta.content or "" for c in choices)
            assert not any(c.delta.tool_calls for c in choices)
            assert [c.finish_reason for c in choices if c.finish_reason] == ["length"]
        else:
            assert answer.choices[0].message.content and not answer.choices[0].message.tool_calls
            assert answer.choices[0].finish_reason == "length"


def test_stop_penalties_and_biases(client: openai.OpenAI) -> None:
    free = ask(client, max_tokens=24).choices[0].message.content
    stop = free[len(free) // 2 : len(free) // 2 + 2]
    cut = ask(client, max_tokens=24, stop=stop).choices[0]
    assert (cut.finish_reason, cut.message.content) == ("stop", free[: free.index(stop)])
    biased = ask(
        client, max_tokens=4, logit_bias={"40": 100}, extra_body={"return_token_ids": True, "ignore_eos": True}
    )
    assert biased.choices[0].token_ids == [40] * 4
    varied = {"max_tokens": 6, "logit_bias": {"40": 30}, "frequency_penalty": 2.0, "presence_penalty": 2.0}
    ids = ask(client, **varied, extra_body={"return_token_ids": True, "ignore_eos": True}).choices[0].token_ids
    assert ids[0] == 40


def test_async_client_asks_many_at_once_and_streams(routed: Routed) -> None:
    async def ask_all(url: str, secret: str) -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=secret, max_retries=0) as client:

            async def one(stream: bool) -> str:
                body: Any = {"model": "triage", "messages": MESSAGES, "temperature": 0, "max_tokens": 60}
                answer: Any = await client.chat.completions.create(**body, response_format=FORM, stream=stream)
                if not stream:
                    return str(answer.choices[0].message.content)
                return "".join([c.choices[0].delta.content or "" async for c in answer if c.choices])

            return await asyncio.gather(*(one(stream) for stream in (False, True) for _ in range(4)))

    for url, secret in routed.values():
        said = asyncio.run(ask_all(url, secret))
        assert len(said) == 8 and len(set(said)) == 1
        assert set(json.loads(said[0])) == {"verdict", "calm"}


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"temperature": 3}, openai.BadRequestError),
        ({"n": 99}, openai.BadRequestError),
        ({"max_tokens": 100_000}, openai.BadRequestError),
        ({"messages": []}, openai.BadRequestError),
        ({"model": "nobody"}, openai.NotFoundError),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "none"}}}, openai.BadRequestError),
    ],
)
def test_errors_are_the_clients_own(
    client: openai.OpenAI, wrong: dict[str, Any], error: type[openai.APIStatusError]
) -> None:
    for stream in (False, True):
        with pytest.raises(error) as caught:
            ask(client, stream=stream, **wrong)
        assert caught.value.response.headers["x-should-retry"] == "false"
        assert caught.value.body is not None and set(caught.value.body) == {"message", "type", "param", "code"}  # type: ignore[arg-type]


def keys_of(value: Any, path: str = "") -> set[str]:
    """Every key of a document with a value, by its path; places of a list count as one."""
    if isinstance(value, list):
        return {name for part in value for name in keys_of(part, f"{path}[]")}
    if not isinstance(value, dict):
        return set()
    return {f"{path}.{k}" for k, v in value.items() if v is not None} | {
        name for k, v in value.items() for name in keys_of(v, f"{path}.{k}")
    }


@pytest.mark.parametrize(
    "calls", [{}, {"tools": [TOOL], "tool_choice": NAMED, "max_tokens": 120}], ids=["says", "calls"]
)
@pytest.mark.parametrize("stream", [False, True])
def test_both_engines_answer_with_the_same_fields(routed: Routed, stream: bool, calls: dict[str, Any]) -> None:
    asked: dict[str, Any] = {"n": 2, "temperature": 1.0, "seed": 1, "logprobs": True, "top_logprobs": 1} | calls
    asked |= {"stream_options": {"include_usage": True}} if stream else {}
    shapes = []
    for url, secret in routed.values():
        with openai.OpenAI(base_url=f"{url}/v1", api_key=secret, max_retries=0, timeout=120) as client:
            answer = ask(client, stream=stream, **asked)
            documents = [c.model_dump() for c in answer] if stream else [answer.model_dump()]
        shapes.append(set[str]().union(*[keys_of(document) for document in documents]))
    assert shapes[0] == shapes[1] and ".system_fingerprint" in shapes[0]
