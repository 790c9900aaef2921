"""The examples of OpenAI's graders guide and of its API reference, as they stand there.

Source: https://developers.openai.com/api/docs/guides/graders and …/api/reference/resources/fine_tuning (run grader)
"""

import json
from typing import Any

import pytest

from data.grading import AtHand, make_grader
from data.grading.types import Question

TOOL_CALL: dict[str, Any] = {
    "type": "multi",
    "graders": {
        "function_name": {
            "name": "function_name",
            "type": "string_check",
            "input": "get_acceptors",
            "reference": "{{sample.output_tools[0].function.name}}",
            "operation": "eq",
        },
        "arguments": {
            "name": "arguments",
            "type": "string_check",
            "input": '{"smiles": "{{item.smiles}}"}',
            "reference": "{{sample.output_tools[0].function.arguments}}",
            "operation": "eq",
        },
    },
    "calculate_output": "0.5 * function_name + 0.5 * arguments",
}
ALIGNMENT: dict[str, Any] = {
    "type": "score_model",
    "name": "Example score model grader",
    "input": [
        {
            "role": "user",
            "content": [
                {
                    "type": "input_text",
                    "text": "Score how close the reference answer is to the model answer on a 0-1 scale. "
                    "Return only the score.\n\nReference answer: {{item.reference_answer}}\n\n"
                    "Model answer: {{sample.output_text}}",
                }
            ],
        }
    ],
    "model": "gpt-5-mini",
    "sampling_params": {"temperature": 1, "top_p": 1, "seed": 42},
}
BEAR = {"reference_answer": "fuzzy wuzzy was a bear"}


class Judge:
    """Gives full marks and keeps what it was asked."""

    url = "http://judge"

    def __init__(self) -> None:
        self.asked: list[Question] = []

    def ask(self, question: Question) -> Any:
        self.asked.append(question)
        return {"choices": [{"message": {"content": '{"result": 1.0}'}, "finish_reason": "stop"}]}


@pytest.mark.parametrize(
    ("name", "arguments", "reward"),
    [("get_acceptors", '{"smiles": "CCO"}', 1.0), ("get_acceptors", '{"smiles": "C"}', 0.5), ("get_donors", "{}", 0.0)],
)
def test_tool_calls_are_checked_by_name_and_arguments(name: str, arguments: str, reward: float) -> None:
    call = {"id": "call_0", "type": "function", "function": {"name": name, "arguments": arguments}}
    sample = {"output_text": "", "output_tools": [call]}
    assert make_grader(TOOL_CALL).grade({"smiles": "CCO"}, sample).reward == reward


def test_an_answer_without_the_call_fails() -> None:
    assert make_grader(TOOL_CALL).grade({"smiles": "CCO"}, {"output_text": "ethanol"}).reward == 0.0


def test_score_text_alignment() -> None:
    judge = Judge()
    grader = make_grader(ALIGNMENT, at_hand=AtHand(judge=judge))
    assert grader.grade(BEAR, {"output_text": "fuzzy wuzzy was a bear"}).reward == 1.0
    body = judge.asked[0].body
    assert (body["model"], body["temperature"], body["top_p"], body["seed"]) == ("gpt-5-mini", 1.0, 1.0, 42)
    assert body["messages"][1]["content"].count("fuzzy wuzzy was a bear") == 2


def test_grade_string_check_and_text_similarity() -> None:
    check = {
        "type": "string_check",
        "name": "Example string check grader",
        "input": "{{sample.output_text}}",
        "reference": "{{item.label}}",
        "operation": "eq",
    }
    similar = {
        "type": "text_similarity",
        "name": "Example text similarity grader",
        "input": "{{sample.output_text}}",
        "reference": "{{item.reference_answer}}",
        "evaluation_metric": "fuzzy_match",
    }
    assert make_grader(check).grade({"label": "4"}, {"output_text": "4"}).reward == 1.0
    assert make_grader(similar).grade(BEAR, {"output_text": BEAR["reference_answer"]}).reward == 1.0
    partly = make_grader(similar).grade(BEAR, {"output_text": "fuzzy wuzzy had no hair"}).reward
    assert partly is not None and 0.5 < partly < 1.0


def test_sampling_takes_either_name_of_its_limit() -> None:
    for name in ("max_tokens", "max_completions_tokens"):
        judge = Judge()
        limited = {**ALIGNMENT, "sampling_params": {name: 32_768, "top_p": 1, "reasoning_effort": "medium"}}
        make_grader(limited, at_hand=AtHand(judge=judge)).grade(BEAR, {"output_text": "a bear"})
        body = judge.asked[0].body
        assert (body["max_tokens"], body["reasoning_effort"]) == (32_768, "medium")
        assert json.dumps(body)  # what is sent is JSON
