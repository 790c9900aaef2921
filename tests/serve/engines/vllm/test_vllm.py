"""vLLM with many adapters: the same answers as the embedded engine, adapters while serving, nothing kills it."""

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from serve.engines.adapter_source import AdapterError
from serve.engines.local import LocalEngine
from serve.engines.vllm.engine import VllmEngine
from serve.engines.vllm.http_api import VllmApi
from tests.serve.engines import models
from tests.serve.upstream import Server
from train.canary import write_canary

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
MESSAGES: list[Any] = [{"role": "user", "content": "disk full on host db-7"}]
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "page", "parameters": {"type": "object", "properties": {}}}}
]


def ask(url: str, **fields: Any) -> Any:
    body = {"model": "base", "messages": MESSAGES, "temperature": 0, "max_tokens": 12} | fields
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.json()


def scored(url: str, model: str) -> tuple[list[int], list[int], list[float]]:
    """Prompt ids, answer ids, log-probs of a greedy answer."""
    found = ask(url, model=model, logprobs=True, return_token_ids=True, ignore_eos=True)
    choice = found["choices"][0]
    return found["prompt_token_ids"], choice["token_ids"], [t["logprob"] for t in choice["logprobs"]["content"]]


@pytest.mark.parametrize("model", ["base", "red", "green", "blue"])
def test_each_adapter_gives_the_embedded_engines_tokens_and_log_probs(
    vllm_url: str, local_url: str, model: str
) -> None:
    """What is served is the adapter whose digest was checked: nobody else has these log-probs."""
    prompt, ids, values = scored(vllm_url, model)
    expected_prompt, expected_ids, expected = scored(local_url, model)
    assert (prompt, ids) == (expected_prompt, expected_ids)
    assert values == pytest.approx(expected, abs=1e-3)
    others = [scored(vllm_url, other)[2] for other in ("base", "red", "green", "blue") if other != model]
    assert all(max(abs(a - b) for a, b in zip(values, other, strict=True)) > 0.01 for other in others)


def test_a_fourth_adapter_is_loaded_and_unloaded_under_load_without_a_failed_request(
    vllm_engine: VllmEngine, vllm_url: str, local_url: str, wide_adapters: dict[str, Path]
) -> None:
    stop, failures, answered = threading.Event(), [], []

    def work(model: str) -> None:
        with httpx.Client(timeout=120) as client:
            while not stop.is_set():
                body = {"model": model, "messages": MESSAGES, "max_tokens": 16, "stream": len(answered) % 2 == 0}
                reply = client.post(f"{vllm_url}/v1/chat/completions", json=body)
                (answered if reply.status_code == 200 and "error" not in reply.text else failures).append(reply.text)

    threads = [threading.Thread(target=work, args=(m,)) for m in ("base", "red", "green", "blue") for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        vllm_engine.load_adapter("late", wide_adapters["late"])
        assert scored(vllm_url, "late")[2] == pytest.approx(scored(local_url, "late")[2], abs=1e-3)
        with pytest.raises(AdapterError, match="4 adapters are loaded"):
            vllm_engine.load_adapter("fifth", wide_adapters["late"])
        before = len(answered)
        assert vllm_engine.unload_adapter("late")
        while len(answered) < before + 8 and not failures:
            stop.wait(0.05)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert failures == []
    gone = httpx.post(f"{vllm_url}/v1/chat/completions", json={"model": "late", "messages": MESSAGES})
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "model_not_found")


def test_both_engines_answer_with_the_same_fields(vllm_url: str, local_url: str) -> None:
    request = {"n": 2, "logprobs": True, "top_logprobs": 2, "return_token_ids": True, "seed": 1, "temperature": 1.0}
    shapes = []
    for url in (vllm_url, local_url):
        found = ask(url, **request)
        choice = found["choices"][1]
        shapes.append(
            {
                "top": {"id", "object", "created", "model", "choices", "usage", "prompt_token_ids"} <= set(found),
                "object": found["object"],
                "choice": {"index", "message", "logprobs", "finish_reason", "token_ids"} <= set(choice),
                "message": {"role", "content"} <= set(choice["message"]),
                "token": set(choice["logprobs"]["content"][0]),
                "alternatives": len(choice["logprobs"]["content"][0]["top_logprobs"]),
                "usage": {"prompt_tokens", "completion_tokens", "total_tokens"} <= set(found["usage"]),
                "prompt": found["usage"]["prompt_tokens"],
                "finish": choice["finish_reason"],
                "indices": [c["index"] for c in found["choices"]],
            }
        )
    assert shapes[0] == shapes[1] and shapes[0]["top"] and shapes[0]["choice"]


def test_stops_and_lengths_agree(vllm_url: str, local_url: str) -> None:
    whole = ask(local_url, max_tokens=24)["choices"][0]["message"]["content"]
    stop = whole[len(whole) // 2 : len(whole) // 2 + 2]
    answers = [ask(url, max_tokens=24, stop=[stop])["choices"][0] for url in (vllm_url, local_url)]
    assert answers[0]["message"]["content"] == answers[1]["message"]["content"]
    assert [a["finish_reason"] for a in answers] == ["stop", "stop"]
    lengths = [
        ask(url, max_tokens=None, ignore_eos=True)["usage"]["completion_tokens"] for url in (vllm_url, local_url)
    ]
    assert lengths == [32, 32]  # engine.default_max_tokens


def test_streams_agree_through_the_official_client(vllm_url: str, local_url: str) -> None:
    texts, usages = [], []
    for url in (vllm_url, local_url):
        with openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
            options: Any = {"include_usage": True}
            stream = client.chat.completions.create(
                model="red",
                messages=MESSAGES,
                temperature=0,
                max_tokens=12,
                stream=True,
                stream_options=options,
                tools=TOOLS,
            )
            chunks = list(stream)
        texts.append("".join(c.choices[0].delta.content or "" for c in chunks if c.choices))
        usages.append(
            chunks[-1].usage.model_dump(include={"prompt_tokens", "completion_tokens"}) if chunks[-1].usage else None
        )
    assert texts[0] == texts[1] and usages[0] == usages[1] is not None


@pytest.mark.parametrize(
    ("change", "status", "code", "param"),
    [
        ({"model": "missing"}, 404, "model_not_found", "model"),
        ({"n": 99}, 400, "invalid_value", "n"),
        ({"top_logprobs": 99, "logprobs": True}, 400, "invalid_value", "top_logprobs"),
        ({"temperature": -1}, 400, "invalid_value", "temperature"),
        ({"max_tokens": 5000}, 400, "context_length_exceeded", "messages"),
        ({"messages": [{"role": "user", "content": "word " * 3000}]}, 400, "context_length_exceeded", "messages"),
    ],
)
def test_errors_have_one_shape(
    vllm_url: str, local_url: str, change: dict[str, Any], status: int, code: str, param: str
) -> None:
    for url in (vllm_url, local_url):
        for stream in (False, True):
            body = {"model": "base", "messages": MESSAGES, "stream": stream} | change
            reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
            error = reply.json()["error"]
            assert (reply.status_code, error["code"], error["param"]) == (status, code, param), (url, error)
            assert error["type"] == "invalid_request_error" and error["message"]


@pytest.mark.parametrize("harm", [{"prompt_logprobs": 0}, {"echo": True, "logprobs": 1}, {"logprob_token_ids": [5]}])
def test_what_would_harm_other_answers_is_refused(vllm_engine: VllmEngine, vllm_url: str, harm: dict[str, Any]) -> None:
    """vLLM's CPU build ends its engine when it scores a prompt in a step that samples for somebody else."""
    for path, asked in (("chat/completions", {"messages": MESSAGES}), ("completions", {"prompt": "disk full"})):
        reply = httpx.post(f"{vllm_url}/v1/{path}", json={"model": "red", "max_tokens": 2} | asked | harm, timeout=60)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, next(iter(harm)))
    assert vllm_engine.alive


def test_canary_log_probs_are_the_embedded_engines(vllm_engine: VllmEngine, local_engine: LocalEngine) -> None:
    """Tokens that are forced one by one have the log-probs of the text as it stands."""
    expected = local_engine._canary._logprobs(local_engine.adapter("red"))
    for ids, whole in zip(vllm_engine._canaries, expected, strict=True):
        forced = vllm_engine._score("red", ids, timeout_s=60)
        assert forced == pytest.approx(whole.tolist()[-len(forced) :], abs=1e-3)


def test_adapter_is_held_to_what_its_training_found(
    vllm_engine: VllmEngine, wide_base: Path, wide_adapters: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "trained"
    shutil.copytree(wide_adapters["late"], folder)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(wide_base), folder)
    write_canary(folder, model, AutoTokenizer.from_pretrained(wide_base))
    vllm_engine.load_adapter("trained", folder)
    vllm_engine.unload_adapter("trained")
    config = folder / "adapter_config.json"
    scaled = json.loads(config.read_text())
    config.write_text(json.dumps(scaled | {"lora_alpha": scaled["lora_alpha"] * 20}))
    with pytest.raises(AdapterError, match=r"not as it was trained: log-probs .* nats a token"):
        vllm_engine.load_adapter("trained", folder)
    assert "trained" not in [model.name for model in vllm_engine.models()]
    assert vllm_engine.alive


def test_structured_output_keeps_to_its_schema(vllm_url: str, local_url: str) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}}, "required": ["n"]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema | {"additionalProperties": False}}}
    for url in (vllm_url, local_url):
        found = ask(url, response_format=form, max_tokens=64)["choices"][0]
        assert 0 <= json.loads(found["message"]["content"])["n"] <= 9
        assert found["finish_reason"] == "stop"


def test_a_call_that_the_model_makes_of_its_own_accord_is_taken_out_of_its_text(vllm_url: str) -> None:
    """`tool_choice` is `auto`; the text of a model that has learnt to call is put into a random one's mouth."""
    tool = {"type": "function", "function": {"name": "page", "parameters": {"type": "object", "properties": {}}}}
    said = r'<tool_call>\n\{"name": "page", "arguments": \{"host": "db-[78]"\}\}\n</tool_call>'
    asked = {"tools": [tool], "structured_outputs": {"regex": said}, "max_tokens": 200}
    for choice in (None, "auto"):
        found = ask(vllm_url, **asked, **({"tool_choice": choice} if choice else {}))["choices"][0]
        (call,) = found["message"]["tool_calls"]
        assert call["function"]["name"] == "page"
        assert json.loads(call["function"]["arguments"])["host"] in ("db-7", "db-8")
        assert (found["message"].get("content"), found["finish_reason"]) == (None, "tool_calls")


def test_adapters_that_would_kill_the_engine_are_refused(
    vllm_engine: VllmEngine, vllm_url: str, wide_base: Path, wide_adapters: dict[str, Path], tmp_path: Path
) -> None:
    over = models.build_adapter(wide_base, tmp_path / "over", seed=9, rank=32)
    idle = models.build_adapter(wide_base, tmp_path / "idle", seed=9, rank=4, zero=True)
    cut = tmp_path / "cut"
    shutil.copytree(wide_adapters["red"], cut)
    weights = cut / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for path, digest, reason in (
        (over, None, "rank 32 is over the engine's 16"),
        (cut, None, "truncated"),
        (tmp_path / "nowhere", None, "does not exist"),
        (idle, None, "changes nothing"),
        (wide_adapters["late"], "0" * 64, "the registry recorded"),
    ):
        with pytest.raises(AdapterError, match=reason):
            vllm_engine.load_adapter("bad", path, expected_sha256=digest)
        assert ask(vllm_url, model="red")["model"] == "red"
    assert "bad" not in [m.name for m in vllm_engine.models()]
    assert httpx.post(f"{vllm_url}/v1/chat/completions", json={"model": "bad", "messages": MESSAGES}).status_code == 404
    assert vllm_engine.alive


def test_a_directory_that_goes_away_after_the_load_harms_nobody(
    vllm_engine: VllmEngine, vllm_url: str, wide_adapters: dict[str, Path], tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(wide_adapters["late"], copy)
    vllm_engine.load_adapter("short-lived", copy)
    shutil.rmtree(copy)
    assert ask(vllm_url, model="short-lived")["usage"]["completion_tokens"] > 0
    assert vllm_engine.unload_adapter("short-lived")
    assert not vllm_engine.unload_adapter("short-lived")
    assert vllm_engine.alive


def test_a_client_that_leaves_frees_its_row(vllm_url: str) -> None:
    import time

    body = {"model": "red", "messages": MESSAGES, "max_tokens": 450, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{vllm_url}/v1/chat/completions", json=body, timeout=60) as answer:
        next(answer.iter_bytes())
    deadline = time.monotonic() + 30
    while httpx.get(f"{vllm_url}/healthz").json()["running"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_token_is_asked_for(vllm_engine: VllmEngine) -> None:
    with Server(VllmApi(vllm_engine, "secret"), "on") as url:
        assert httpx.get(f"{url}/v1/models").status_code == 401
        named = httpx.get(f"{url}/v1/models", headers={"authorization": "Bearer secret"}).json()
        assert {"base", "red", "green", "blue"} <= {m["id"] for m in named["data"]}


def test_an_engine_that_is_killed_is_reported_dead_and_leaves_nothing_behind(
    vllm_engine: VllmEngine, vllm_url: str
) -> None:
    """The last test with this engine. On Serve the replica then starts again, and vLLM with it."""
    import time

    import psutil

    family = psutil.Process(vllm_engine.process._process.pid).children(recursive=True)
    assert len(family) >= 2  # the server and its engine
    for process in family:
        if "EngineCore" in " ".join(process.cmdline()):
            process.kill()
    family[0].kill()
    deadline = time.monotonic() + 60
    while vllm_engine.alive or any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in family):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    down = httpx.post(f"{vllm_url}/v1/chat/completions", json={"model": "base", "messages": MESSAGES}, timeout=60)
    assert (down.status_code, down.json()["error"]["code"]) == (503, "engine_stopped")
    assert "retry-after" in down.headers
    assert httpx.get(f"{vllm_url}/healthz", timeout=60).status_code == 503
