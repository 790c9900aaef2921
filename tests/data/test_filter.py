from collections.abc import Sequence
from typing import Any

import pytest

from cluster.settings.curation import CurationSettings, FilterSettings
from data.detectors.interface import Item
from data.detectors.make import Detectors
from data.filter import filter_rows, is_tool_error
from tests.data.rows import rows

USER = {"role": "user", "content": "q"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", "function": {"name": "f"}}]}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": '{"ok": true}'}
FAILED = {"role": "tool", "tool_call_id": "c1", "content": '{"error": "no such table"}'}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"flags": {"shadow": True}}, "shadow"),
        ({"arm": "shadow"}, "shadow"),
        ({"flags": {"timeout": True}}, "timeout"),
        ({"flags": {"error": "rate_limit"}}, "request failed"),
        ({"flags": {"safety": True}}, "safety flag"),
        ({"flags": {"disconnected": True}}, "client went away"),
        ({"response": None}, "no answer"),
        ({"response": {"role": "assistant", "content": " "}}, "empty answer"),
        ({"messages": [{"role": "system", "content": "s"}]}, "no question"),
        ({"messages": [USER, {"role": "assistant", "content": "a"}]}, "conversation incomplete"),
        ({"messages": [USER, CALL, RESULT]}, None),
        ({"messages": [USER, CALL, FAILED]}, "tool run failed"),
        ({"messages": [USER, CALL, USER]}, "tool run unfinished"),
        ({"messages": [USER, CALL, {**RESULT, "content": "", "error": "TimeoutError: 5 s"}]}, "tool run failed"),
        ({"response": {**CALL, "content": "I look it up in the table for you."}}, "tool run unfinished"),
        ({"response": {**CALL, "content": "I look it up in the table for you."}, "tail": [RESULT]}, None),
        ({"tail": [CALL, FAILED]}, "tool run failed"),
        ({"tail": [CALL]}, "tool run unfinished"),
        ({"answer_tokens": 9}, "answer too short"),
        ({"answer_tokens": 1001}, "answer too long"),
        ({"answer_tokens": 0, "response": {"role": "assistant", "content": "x" * 30}}, "answer too short"),
        ({"context": ["The tower is 330 metres high."]}, "ungrounded"),
    ],
)
def test_filter_names_the_reason(change: dict[str, Any], reason: str | None) -> None:
    kept, dropped = filter_rows(rows(change), CurationSettings())
    assert len(kept) == (reason is None)
    assert list(dropped) == ([reason] if reason else [])


def test_a_grounded_answer_passes_and_a_wrong_number_does_not() -> None:
    context = ["The tower is 330 metres high and stands in Paris."]
    right = {"role": "assistant", "content": "The tower is 330 metres high."}
    wrong = {"role": "assistant", "content": "The tower is 350 metres high."}
    table = rows({"context": context, "response": right}, {"context": context, "response": wrong})
    kept, dropped = filter_rows(table, CurationSettings())
    assert len(kept) == 1 and dropped == {"ungrounded": 1}
    assert len(filter_rows(table, CurationSettings(filter=FilterSettings(ungrounded=False)))[0]) == 2


def test_toxic_answers_go_and_refusals_only_when_asked() -> None:
    def says(text: str) -> dict[str, Any]:
        return {"response": {"role": "assistant", "content": text}}

    insult = says("Shut up, you worthless idiot, and never write here again.")
    refusal = says("I'm sorry, but I cannot help you with this request.")
    kept, dropped = filter_rows(rows(insult, refusal), CurationSettings())
    assert len(kept) == 1 and dropped == {"toxic": 1}
    settings = CurationSettings(filter=FilterSettings(refusal=True, toxicity=False))
    kept, dropped = filter_rows(rows(insult, refusal), settings)
    assert len(kept) == 1 and dropped == {"refusal": 1}


def test_a_detector_that_cannot_tell_drops_nothing() -> None:
    def abstains(items: Sequence[Item]) -> list[float | None]:
        return [None] * len(items)

    kept, dropped = filter_rows(rows({}), CurationSettings(), Detectors(abstains, abstains, abstains))
    assert len(kept) == 1 and not dropped


def test_tool_error_is_an_error_field_or_a_text_that_begins_so() -> None:
    assert is_tool_error("Error: timed out") and is_tool_error('{"error": "x"}')
    assert not is_tool_error('{"error": null, "rows": 3}') and not is_tool_error("no errors found")
