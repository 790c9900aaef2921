"""The engine over HTTP: the official client, streams, errors, disconnects, load."""

import asyncio
import json
import socket
import time
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM

from data.template import render
from serve.engines.http_api import EngineApi
from serve.engines.local import LocalEngine
from tests.serve.upstream import Server

MESSAGES = [{"role": "user", "content": "disk full on host db-7 ✓"}]


@pytest.fixture
def client(engine_url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{engine_url}/v1", api_key="none", max_retries=0)


def post(url: str, path: str = "/v1/chat/completions", **body: object) -> httpx.Response:
    return httpx.post(f"{url}{path}", json={"model": "base", "messages": MESSAGES} | body, timeout=60)


def test_openai_client_chats_and_lists_models(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="red", messages=MESSAGES, max_tokens=12, n=2, temperature=1.0, seed=1)
    assert [c.index for c in answer.choices] == [0, 1]
    assert {c.finish_reason for c in answer.choices} <= {"stop", "length"}
    assert answer.model == "red"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.choices[0].message.content != answer.choices[1].message.content
    names = [m.id for m in client.models.list()]
    assert names[0] == "base"
    assert {"red", "blue"} <= set(names)


def test_token_ids_and_logprobs_equal_a_plain_forward_pass(
    client: openai.OpenAI, engine: LocalEngine, base: Path
) -> None:
    answer = client.chat.completions.create(
        model="base", messages=MESSAGES, max_tokens=16, seed=5, logprobs=True, top_logprobs=3,
        extra_body={"return_token_ids": True},
    )  # fmt: skip
    prompt, choice = answer.model_extra["prompt_token_ids"], answer.choices[0]
    assert prompt == render(engine.tokenizer, MESSAGES, add_generation_prompt=True)
    ids = choice.model_extra["token_ids"]
    assert answer.usage.completion_tokens == len(ids)
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    expected = torch.log_softmax(logits, -1)
    content = choice.logprobs.content
    assert [c.logprob for c in content] == pytest.approx(
        expected.gather(1, torch.tensor(ids).unsqueeze(1)).squeeze(1).tolist(), abs=1e-4
    )
    for position, entry in enumerate(content):
        tops = expected[position].topk(3).values.tolist()
        assert [t.logprob for t in entry.top_logprobs] == pytest.approx(tops, abs=1e-4)
        assert bytes(entry.bytes) == entry.token.encode() or "\ufffd" in entry.token
    shown = b"".join(bytes(entry.bytes) for entry in content).removesuffix(b"<|im_end|>")
    assert shown.decode(errors="replace") == choice.message.content


@pytest.mark.parametrize("stop", [None, ["e", "qu"]])
def test_stream_adds_up_to_the_whole_answer(client: openai.OpenAI, stop: list[str] | None) -> None:
    asked = {"model": "blue", "messages": MESSAGES, "max_tokens": 40, "seed": 9, "n": 2, "logprobs": True}
    asked |= {"stop": stop, "extra_body": {"return_token_ids": True}}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True))
    for choice in whole.choices:
        mine = [c.choices[0] for c in chunks[:-1] if c.choices[0].index == choice.index]
        assert "".join(c.delta.content or "" for c in mine) == choice.message.content
        assert [c.finish_reason for c in mine if c.finish_reason] == [choice.finish_reason]
        streamed = [entry.token for c in mine for entry in c.logprobs.content]
        assert streamed == [entry.token for entry in choice.logprobs.content]
        last = next(c for c in chunks[-1].choices if c.index == choice.index)
        assert last.model_extra["token_ids"] == choice.model_extra["token_ids"]
    assert chunks[-1].usage == whole.usage
    assert chunks[-1].model_extra["prompt_token_ids"] == whole.model_extra["prompt_token_ids"]
    assert len(chunks) < sum(len(c.model_extra["token_ids"]) for c in whole.choices) + 3


def test_stop_string_ends_the_answer_before_it(client: openai.OpenAI) -> None:
    free = client.chat.completions.create(model="red", messages=MESSAGES, max_tokens=40, seed=2).choices[0]
    middle = free.message.content[5:7]
    cut = client.chat.completions.create(model="red", messages=MESSAGES, max_tokens=40, seed=2, stop=middle).choices[0]
    assert cut.finish_reason == "stop"
    assert cut.message.content == free.message.content[: free.message.content.index(middle)]


def test_usage_chunk_comes_when_asked(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="base", messages=MESSAGES, max_tokens=4, stream=True, stream_options={"include_usage": True}
    )
    last = list(stream)[-1]
    assert last.choices == []
    assert last.usage is not None


TOOL = {"type": "function", "function": {"name": "restart", "parameters": {"type": "object", "properties": {}}}}
WRONG = [
    ({"temperature": 3}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"n": 0}, "n"),
    ({"n": 99}, "n"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"stop": [""]}, "stop"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 99}, "top_logprobs"),
    ({"presence_penalty": 2.5}, "presence_penalty"),
    ({"frequency_penalty": "much"}, "frequency_penalty"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5"),
    ({"logit_bias": {"99999999": 1}}, "logit_bias"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": "sometimes", "tools": [TOOL]}, "tool_choice.type"),
    ({"tool_choice": {"type": "function", "function": {"name": "none"}}, "tools": [TOOL]}, "tool_choice"),
    ({"tool_choice": "required", "tools": [TOOL], "response_format": {"type": "json_object"}}, "tool_choice"),
    ({"response_format": {"type": "grammar"}}, "response_format.type"),
    ({"messages": []}, "messages"),
    ({"messages": [{"content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "user", "content": {"a": 1}}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "messages.0.content.0"),
    ({"model": ""}, "model"),
]


@pytest.mark.parametrize(("change", "param"), WRONG)
def test_wrong_field_is_400_and_named(engine_url: str, change: dict[str, object], param: str) -> None:
    answer = post(engine_url, **change)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


def test_unknown_model_long_prompt_and_bad_bodies_have_their_errors(engine_url: str) -> None:
    unknown = post(engine_url, model="green")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
    assert "red" in unknown.json()["error"]["message"]
    long = post(engine_url, messages=[{"role": "user", "content": "x y z " * 500}])
    assert (long.status_code, long.json()["error"]["code"]) == (400, "context_length_exceeded")
    greedy = post(engine_url, max_tokens=10_000)
    assert (greedy.status_code, greedy.json()["error"]["code"]) == (400, "context_length_exceeded")
    broken = httpx.post(f"{engine_url}/v1/chat/completions", content=b"{nope")
    assert (broken.status_code, broken.json()["error"]["code"]) == (400, "invalid_json")
    listed = httpx.post(f"{engine_url}/v1/chat/completions", content=b"[1]")
    assert listed.status_code == 400
    huge = httpx.post(f"{engine_url}/v1/chat/completions", content=b'"' + b"x" * (5 * 2**20) + b'"', timeout=30)
    assert (huge.status_code, huge.json()["error"]["code"]) == (413, "body_too_large")
    assert httpx.get(f"{engine_url}/v1/nothing").status_code == 404
    assert httpx.get(f"{engine_url}/v1/chat/completions").status_code == 405
    assert httpx.get(f"{engine_url}/healthz").json()["status"] == "ok"


def test_stream_of_unknown_model_still_has_its_status(engine_url: str) -> None:
    assert post(engine_url, model="green", stream=True).status_code == 404


def test_full_queue_is_429_with_retry_after(engine: LocalEngine, engine_url: str) -> None:
    async def flood() -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=200)) as client:
            body = {"model": "base", "messages": MESSAGES, "max_tokens": 60, "n": 8, "ignore_eos": True}
            return await asyncio.gather(
                *[client.post(f"{engine_url}/v1/chat/completions", json=body) for _ in range(40)]
            )

    answers = asyncio.run(flood())
    refused = [a for a in answers if a.status_code == 429]
    assert refused
    assert {a.status_code for a in answers} == {200, 429}
    assert refused[0].headers["retry-after"] == "1"
    assert refused[0].json()["error"]["type"] == "rate_limit_error"
    assert engine.scheduler.running == engine.scheduler.queued == 0


@pytest.mark.parametrize("stream", [False, True])
def test_disconnect_frees_the_row(engine: LocalEngine, engine_url: str, stream: bool) -> None:
    url = urlsplit(engine_url)
    body = json.dumps({"model": "base", "messages": MESSAGES, "max_tokens": 450, "ignore_eos": True, "stream": stream})
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body.encode())}\r\n\r\n"
    with socket.create_connection((url.hostname, url.port)) as connection:
        connection.sendall((head + body).encode())
        deadline = time.monotonic() + 10
        while engine.scheduler.running == 0 and time.monotonic() < deadline:
            time.sleep(0.001)
        assert engine.scheduler.running == 1
        tokens = engine.scheduler.generated_tokens
    while engine.scheduler.running and time.monotonic() < deadline:
        time.sleep(0.005)
    assert engine.scheduler.running == 0
    assert engine.scheduler.generated_tokens - tokens < 400


def test_sixty_four_concurrent_requests_are_all_right(engine_url: str) -> None:
    async def ask(client: openai.AsyncOpenAI, number: int) -> tuple[str | None, str | None]:
        model = ("base", "red", "blue")[number % 3]
        asked = {"model": model, "messages": MESSAGES, "max_tokens": 24, "temperature": 0.0}
        if number % 2:
            parts = [c async for c in await client.chat.completions.create(**asked, stream=True)]
            return model, "".join(c.choices[0].delta.content or "" for c in parts)
        return model, (await client.chat.completions.create(**asked)).choices[0].message.content

    async def everyone() -> list[tuple[str | None, str | None]]:
        async with openai.AsyncOpenAI(base_url=f"{engine_url}/v1", api_key="none", max_retries=0) as client:
            alone = [await ask(client, number) for number in range(3)]
            return alone + await asyncio.gather(*[ask(client, number) for number in range(64)])

    answers = asyncio.run(everyone())
    expected = dict(answers[:3])
    assert len(set(expected.values())) == 3
    assert all(text == expected[model] for model, text in answers)


def test_adapters_load_and_unload_over_http(engine_url: str, make_adapter, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "late", seed=8)
    load = {"lora_name": "late", "lora_path": str(folder)}
    assert post(engine_url, "/v1/load_lora_adapter", **load).json()["status"] == "loaded"
    assert post(engine_url, model="late", max_tokens=3).status_code == 200
    assert post(engine_url, "/v1/unload_lora_adapter", lora_name="late").status_code == 200
    assert post(engine_url, model="late", max_tokens=3).status_code == 404
    assert post(engine_url, "/v1/unload_lora_adapter", lora_name="late").status_code == 404
    refused = post(engine_url, "/v1/load_lora_adapter", lora_name="late", lora_path=str(tmp_path / "none"))
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "adapter_refused")
    assert (
        post(engine_url, "/v1/load_lora_adapter", lora_name="", lora_path="x").json()["error"]["param"] == "lora_name"
    )


def test_with_a_token_only_its_bearer_is_answered(engine: LocalEngine) -> None:
    with Server(EngineApi(engine, "secret")) as url:
        assert httpx.get(f"{url}/healthz").status_code == 200
        assert httpx.get(f"{url}/v1/models").status_code == 401
        wrong = httpx.get(f"{url}/v1/models", headers={"authorization": "Bearer other"})
        assert wrong.json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(f"{url}/v1/models", headers={"authorization": "Bearer secret"}).status_code == 200
