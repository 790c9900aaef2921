"""`/v1/completions`: the continuation of a text, with the same keys, split, fallback and record as a chat."""

import json

import httpx
import openai
import pytest

from data.events import parse_body
from tests.serve.conftest import Live

ANSWER = "It is a false alarm"


def test_text_completion_says_who_served_and_is_captured(live: Live) -> None:
    raw = live.client().completions.with_raw_response.create(model="triage", prompt="Disk full.", user="ann")
    completion = raw.parse()
    assert (completion.choices[0].text, completion.model) == (ANSWER, "triage/1")
    assert completion.id == raw.headers["x-rayloop-interaction"]
    assert completion.id.startswith("cmpl-")
    choice = json.loads(raw.text)["choices"][0]
    assert "token_ids" not in choice and "prompt_token_ids" not in choice and choice["logprobs"] is None
    assert live.engine.paths == ["/v1/completions"]
    assert live.engine.requests[0]["logprobs"] == 0
    body = live.events("interaction", 1)[0].event.body
    assert body["messages"] == [{"role": "user", "content": "Disk full."}]
    assert body["response"] == {"role": "assistant", "content": ANSWER}
    assert (body["prompt_token_ids"], body["completion_token_ids"]) == ([1, 2, 3], [10, 11, 12, 13, 14])
    assert body["completion_logprobs"] == [-0.5] * 5
    assert parse_body("interaction", dict(body))


def test_text_stream_arrives_whole_and_is_captured_whole(live: Live) -> None:
    chunks = list(live.client().completions.create(model="triage", prompt=["a", "b"], stream=True))
    assert "".join(c.choices[0].text for c in chunks) == ANSWER
    body = live.events("interaction", 1)[0].event.body
    assert body["response"]["content"] == ANSWER
    assert body["messages"] == [{"role": "user", "content": "a"}]


def test_log_probabilities_that_were_asked_for_come(live: Live) -> None:
    completion = live.client().completions.create(model="triage", prompt="x", logprobs=0)
    assert completion.choices[0].logprobs is not None
    assert completion.choices[0].logprobs.token_logprobs == [-0.5] * 5


def test_stable_answers_for_a_candidate_that_fails(live: Live) -> None:
    live.route(candidate="triage/2", share=1.0)
    live.engine.behaviours["triage-2-abababababab"].status = 500
    assert live.client().completions.create(model="triage", prompt="x").model == "triage/1"
    assert live.events("interaction", 1)[0].event.body["flags"]["fallback"] is True


@pytest.mark.parametrize("messages", [[None], "x", [{"role": "tool", "content": 7}]])
def test_messages_of_a_text_completion_mean_nothing(live: Live, messages: object) -> None:
    live.client().completions.create(model="triage", prompt="Disk full.", extra_body={"messages": messages})
    body = live.events("interaction", 1)[0].event.body
    assert body["messages"] == [{"role": "user", "content": "Disk full."}]


@pytest.mark.parametrize("prompt", [None, "", 7, {}, []])
def test_wrong_prompt_is_400_with_the_field(live: Live, prompt: object) -> None:
    response = httpx.post(
        f"{live.url}/v1/completions", json={"model": "triage", "prompt": prompt},
        headers={"authorization": f"Bearer {live.secret}"},
    )  # fmt: skip
    assert (response.status_code, response.json()["error"]["param"]) == (400, "prompt")
    with pytest.raises(openai.NotFoundError):
        live.client().completions.create(model="nobody", prompt="x")
