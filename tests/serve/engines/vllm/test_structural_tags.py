"""`engine.vllm.structural_tags`: calls in the parser's own form, their arguments by the tools' schemas."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from cluster.settings.engines import EngineSettings
from serve.engines.vllm.engine import VllmEngine
from serve.engines.vllm.http_api import VllmApi
from tests.serve.engines.vllm.test_official_client import FIELDS, JUDGE, MESSAGES, NAMED, TOOL
from tests.serve.upstream import Server

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture(scope="module")
def tagged_url(vllm_settings: EngineSettings) -> Iterator[str]:
    """An engine of its own: vLLM reads the option when it starts."""
    tagged = vllm_settings.vllm.model_copy(update={"structural_tags": True})
    engine = VllmEngine(vllm_settings.model_copy(update={"vllm": tagged, "max_adapters": 0}))
    try:
        with Server(VllmApi(engine), "on") as url:
            yield url
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("choice", "tools", "names"),
    [(NAMED, [TOOL, JUDGE], {"restart"}), ("required", [TOOL], {"restart"}), ("required", [TOOL, JUDGE], set(FIELDS))],
    ids=["named", "required", "required of two"],
)
def test_a_call_that_is_asked_for_is_made(tagged_url: str, choice: Any, tools: list[Any], names: set[str]) -> None:
    for sampled in ({"temperature": 0}, {"temperature": 1.5, "seed": 1}, {"temperature": 1.5, "seed": 2}):
        body = {"model": "base", "messages": MESSAGES, "max_tokens": 300, "tools": tools, "tool_choice": choice}
        answer = httpx.post(f"{tagged_url}/v1/chat/completions", json=body | sampled, timeout=120).json()
        (call,) = answer["choices"][0]["message"]["tool_calls"]
        assert call["function"]["name"] in names
        assert set(json.loads(call["function"]["arguments"])) == FIELDS[call["function"]["name"]]
