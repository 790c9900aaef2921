from typing import Any

import pytest

from cluster.settings.curation import FilterSettings
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
        ({"answer_tokens": 9}, "answer too short"),
        ({"answer_tokens": 1001}, "answer too long"),
        ({"answer_tokens": 0, "response": {"role": "assistant", "content": "x" * 30}}, "answer too short"),
        ({"context": ["The tower is 330 metres high."]}, "ungrounded"),
    ],
)
def test_filter_names_the_reason(change: dict[str, Any], reason: str | None) -> None:
    kept, dropped = filter_rows(rows(change), FilterSettings())
    assert len(kept) == (reason is None)
    assert list(dropped) == ([reason] if reason else [])


def test_a_grounded_answer_passes_and_a_wrong_number_does_not() -> None:
    context = ["The tower is 330 metres high and stands in Paris."]
    right = {"role": "assistant", "content": "The tower is 330 metres high."}
    wrong = {"role": "assistant", "content": "The tower is 350 metres high."}
    table = rows({"context": context, "response": right}, {"context": context, "response": wrong})
    kept, dropped = filter_rows(table, FilterSettings())
    assert len(kept) == 1 and dropped == {"ungrounded": 1}
    assert len(filter_rows(table, FilterSettings(ungrounded=False))[0]) == 2


def test_a_toxicity_detector_is_asked_when_there_is_one() -> None:
    kept, dropped = filter_rows(rows({}), FilterSettings(), toxicity=lambda answer, passages: 0.9)
    assert len(kept) == 0 and dropped == {"toxic": 1}


def test_tool_error_is_an_error_field_or_a_text_that_begins_so() -> None:
    assert is_tool_error("Error: timed out") and is_tool_error('{"error": "x"}')
    assert not is_tool_error('{"error": null, "rows": 3}') and not is_tool_error("no errors found")
