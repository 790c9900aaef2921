"""Tool calls and structured output as the official client understands them, whatever the engine."""

import json

import pydantic

from tests.serve.conftest import Live

MESSAGES = [{"role": "user", "content": "?"}]
CALLS = [{"id": "c1", "type": "function", "function": {"name": "restart", "arguments": '{"host": "db"}'}}]


class Verdict(pydantic.BaseModel):
    """What the agent is to say."""

    verdict: str
    owner: str


def test_tool_call_comes_back_and_its_result_goes_in(live: Live) -> None:
    live.engine.behaviours["base"].tool_calls = CALLS
    client = live.client()
    tool = {"type": "function", "function": {"name": "restart", "parameters": {"type": "object", "properties": {}}}}
    asked = client.chat.completions.create(model="triage", messages=MESSAGES, tools=[tool], tool_choice="required")  # type: ignore[call-overload]
    (call,) = asked.choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("restart", {"host": "db"})
    assert live.engine.requests[0]["tools"] == [tool]
    live.engine.behaviours["base"].tool_calls = None
    result = {"role": "tool", "tool_call_id": "c1", "content": "done"}
    said = [*MESSAGES, asked.choices[0].message.model_dump(exclude_none=True), result]
    assert client.chat.completions.create(model="triage", messages=said).choices[0].message.content
    assert live.engine.requests[1]["messages"][-1] == result
    first = live.events("interaction", 2)[0].event.body
    assert first["response"]["tool_calls"] == CALLS


def test_structured_output_is_asked_for_and_parsed(live: Live) -> None:
    live.engine.behaviours["base"].text = '{"verdict": "page", "owner": "db"}'
    answer = live.client().chat.completions.parse(model="triage", messages=MESSAGES, response_format=Verdict)  # type: ignore[arg-type]
    assert answer.choices[0].message.parsed == Verdict(verdict="page", owner="db")
    schema = live.engine.requests[0]["response_format"]["json_schema"]
    assert (schema["name"], schema["strict"]) == ("Verdict", True)
    with live.client().chat.completions.stream(model="triage", messages=MESSAGES, response_format=Verdict) as stream:  # type: ignore[arg-type]
        assert stream.get_final_completion().choices[0].message.parsed == Verdict(verdict="page", owner="db")
