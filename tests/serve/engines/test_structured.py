"""Answers of the embedded engine that keep to a JSON schema."""

import json
from typing import Any

import httpx
import pytest

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"verdict": {"enum": ["ignore", "page"]}, "hosts": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["verdict", "hosts"],
    "additionalProperties": False,
}


def ask(url: str, **fields: Any) -> httpx.Response:
    messages = [{"role": "user", "content": "disk full on host db-7"}]
    body = {"model": "base", "messages": messages, "max_tokens": 120} | fields
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)


def form(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "triage", "strict": True, "schema": schema}}


@pytest.mark.parametrize("model", ["base", "red"])
def test_every_choice_keeps_to_the_schema(engine_url: str, model: str) -> None:
    """A random model would hardly write one brace by itself."""
    found = ask(
        engine_url, model=model, response_format=form(SCHEMA), n=4, temperature=1.5, seed=3, logprobs=True
    ).json()
    for choice in found["choices"]:
        answer = json.loads(choice["message"]["content"])
        assert answer["verdict"] in ("ignore", "page") and 0 <= answer["hosts"] <= 99
        assert choice["finish_reason"] == "stop"
        assert all(token["logprob"] <= 0 for token in choice["logprobs"]["content"])


def test_a_stream_keeps_to_it_beside_answers_that_need_not(engine_url: str) -> None:
    with httpx.stream(
        "POST",
        f"{engine_url}/v1/chat/completions",
        json={
            "model": "base",
            "messages": [{"role": "user", "content": "x"}],
            "response_format": form(SCHEMA),
            "stream": True,
            "max_tokens": 120,
        },
        timeout=60,
    ) as answer:
        free = ask(engine_url, max_tokens=5, temperature=0).json()["choices"][0]["message"]["content"]
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: {")]
    text = "".join(json.loads(line)["choices"][0]["delta"].get("content") or "" for line in lines)
    assert set(json.loads(text)) == {"verdict", "hosts"}
    assert free == ask(engine_url, max_tokens=5, temperature=0).json()["choices"][0]["message"]["content"]


def test_any_object_is_an_object(engine_url: str) -> None:
    choice = ask(engine_url, response_format={"type": "json_object"}, temperature=0).json()["choices"][0]
    assert choice["message"]["content"].startswith("{")


@pytest.mark.parametrize(
    "wrong",
    [
        {"type": "json_schema"},
        {"type": "text", "json_schema": {"name": "x", "schema": {}}},
        form({"type": "no such type"}),
        form(7),
        {"type": "grammar"},
    ],
)
def test_a_form_that_cannot_be_kept_is_refused_by_name(engine_url: str, wrong: Any) -> None:
    answer = ask(engine_url, response_format=wrong)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"].startswith("response_format"), answer.text


def tool(name: str, parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "description": "Does it.", "parameters": parameters}}


RESTART = tool("restart", {**SCHEMA, "properties": {"host": {"enum": ["db-7", "db-8"]}}, "required": ["host"]})
TOOLS = [RESTART, tool("judge", SCHEMA)]


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_is_asked_for_is_made(engine_url: str, stream: bool) -> None:
    named = {"type": "function", "function": {"name": "restart"}}
    for choice, names in (("required", {"restart", "judge"}), (named, {"restart"})):
        for seed in range(3):
            answer = ask(engine_url, tools=TOOLS, tool_choice=choice, seed=seed, temperature=1.5, stream=stream)
            if stream:
                lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: {")]
                chunks = [json.loads(line)["choices"][0] for line in lines]
                calls = [call for chunk in chunks for call in chunk["delta"].get("tool_calls") or []]
                reason = chunks[-1]["finish_reason"]
            else:
                found = answer.json()["choices"][0]
                calls, reason = found["message"]["tool_calls"], found["finish_reason"]
            (call,) = calls
            assert call["function"]["name"] in names
            arguments = json.loads(call["function"]["arguments"])
            assert set(arguments) == ({"host"} if call["function"]["name"] == "restart" else {"verdict", "hosts"})
            assert reason == ("tool_calls" if choice == "required" else "stop")


def test_a_tool_whose_schema_cannot_be_kept_is_refused_by_name(engine_url: str) -> None:
    answer = ask(engine_url, tools=[tool("odd", {"type": "no such type"})], tool_choice="required")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tools")
