"""Graders that ask a model: what is asked, and what each kind of reply is worth."""

import json
from typing import Any

import pytest

from cluster.errors import InputError
from data.grading import AtHand, make_grader
from data.grading.types import GradeResult, Question

LABEL: dict[str, Any] = {
    "type": "label_model",
    "name": "tone",
    "model": "judge",
    "input": [
        {"role": "developer", "content": "Classify the tone."},
        {"role": "user", "content": {"type": "input_text", "text": "{{ sample.output_text }} / {{ item.topic }}"}},
    ],
    "labels": ["kind", "neutral", "rude"],
    "passing_labels": ["kind", "neutral"],
}
SCORE: dict[str, Any] = {
    "type": "score_model",
    "name": "quality",
    "model": "judge",
    "input": [{"role": "user", "content": "{{ sample.output_text }} against {{ item.topic }}"}],
    "range": [1, 5],
}
ITEM = {"topic": "greetings"}


class Judge:
    """Says what it was told to say."""

    url = "http://judge"

    def __init__(self, content: Any = None, document: Any = None, **message: Any) -> None:
        text = content if content is None or isinstance(content, str) else json.dumps(content)
        self._document = document or {"choices": [{"message": {"content": text, **message}, "finish_reason": "stop"}]}
        self.asked: list[Question] = []

    def ask(self, question: Question) -> Any:
        self.asked.append(question)
        return self._document


def grade(config: dict[str, Any], judge: Judge, text: str = "Good morning!") -> GradeResult:
    return make_grader(config, at_hand=AtHand(judge=judge, embedding_model="e")).grade(ITEM, {"output_text": text})


@pytest.mark.parametrize(("label", "reward"), [("kind", 1.0), ("neutral", 1.0), ("rude", 0.0)])
def test_label_model_rewards_passing_labels(label: str, reward: float) -> None:
    assert grade(LABEL, Judge({"label": label})).reward == reward


@pytest.mark.parametrize(("score", "reward"), [(1, 0.0), (2, 0.25), (4.5, 0.875), (5, 1.0)])
def test_score_model_places_the_score_in_its_range(score: float, reward: float) -> None:
    assert grade(SCORE, Judge({"result": score})).reward == reward


def test_threshold_makes_a_verdict_of_a_score() -> None:
    assert grade({**SCORE, "pass_threshold": 4}, Judge({"result": 4})).reward == 1.0
    assert grade({**SCORE, "pass_threshold": 4}, Judge({"result": 3.9})).reward == 0.0


def test_the_prompt_fences_and_escapes_what_was_written_by_others() -> None:
    judge = Judge({"label": "kind"})
    assert grade(LABEL, judge, "Good <b>day</b> & night\u200b").reward == 1.0
    system, user = judge.asked[0].body["messages"]
    assert system["role"] == "system" and "Classify the tone." in system["content"]
    mark = user["content"].split("<answer-")[1].split(">")[0]
    expected = (
        f"<answer-{mark}>Good &lt;b>day&lt;/b> &amp; night</answer-{mark}> / <item-{mark}>greetings</item-{mark}>"
    )
    assert user["content"] == expected and f"<answer-{mark}>" in system["content"]
    body = judge.asked[0].body
    assert (body["model"], body["temperature"], body["seed"]) == ("judge", 0.0, 0)
    assert body["response_format"]["json_schema"]["schema"]["properties"]["label"]["enum"] == LABEL["labels"]


@pytest.mark.parametrize(
    ("judge", "error"),
    [
        (Judge("kind"), "model_grader_parse_error"),
        (Judge({"label": "polite"}), "model_grader_parse_error"),
        (Judge({"verdict": "kind"}), "model_grader_parse_error"),
        (Judge('{"label": "rude", "label": "kind"}'), "model_grader_parse_error"),
        (Judge(""), "model_grader_parse_error"),
        (Judge(None), "model_grader_parse_error"),
        (Judge(None, refusal="I would rather not"), "model_grader_refusal_error"),
        (Judge(document={"error": "?"}), "model_grader_server_error"),
        (Judge(document=[1]), "model_grader_server_error"),
    ],
)
def test_a_reply_that_is_no_verdict_abstains(judge: Judge, error: str) -> None:
    result = grade(LABEL, judge)
    assert (result.reward, result.error) == (None, error)


@pytest.mark.parametrize("score", [0.5, 6, "5", True, None, [3], 10**400, -1])
def test_a_score_out_of_range_abstains(score: Any) -> None:
    assert grade(SCORE, Judge({"result": score})).error == "model_grader_parse_error"


def test_a_verdict_in_a_code_fence_counts() -> None:
    assert grade(SCORE, Judge('```json\n{"result": 5}\n```')).reward == 1.0


def test_cosine_compares_embeddings() -> None:
    config = {"type": "text_similarity", "name": "c", "reference": "{{ item.topic }}", "evaluation_metric": "cosine"}
    two = {"data": [{"index": 1, "embedding": [0.0, 2.0]}, {"index": 0, "embedding": [3.0, 3.0]}]}
    judge = Judge(document=two)
    assert grade(config, judge, "hi").reward == pytest.approx(0.5**0.5)
    assert judge.asked[0].body == {"model": "e", "input": ["hi", "greetings"]}
    one = Judge(document={"data": [{"index": 0, "embedding": [1.0]}]})
    assert grade(config, one, "hi").error == "model_grader_server_error"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"passing_labels": ["polite"]}, "is not among the labels"),
        ({"labels": ["kind", "kind"]}, "each label once"),
        ({"input": [{"role": "user", "content": "{{ secret.key }}"}]}, "names 'secret.key'"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "grader.input.0"),
        ({"sampling_params": {"temperature": 9}}, "sampling_params.temperature"),
    ],
)
def test_malformed_judges_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        grade({**LABEL, **change}, Judge({"label": "kind"}))


def test_without_a_model_at_hand_a_judge_is_refused() -> None:
    for config in (LABEL, SCORE):
        with pytest.raises(InputError, match=r"set `grader\.judge_url`"):
            make_grader(config)
    cosine = {"type": "text_similarity", "reference": "x", "evaluation_metric": "cosine"}
    with pytest.raises(InputError, match=r"set `grader\.embedding_model`"):
        make_grader(cosine)


def test_the_version_names_model_prompt_and_endpoint() -> None:
    def version(config: dict[str, Any], judge: Judge) -> str:
        return make_grader(config, at_hand=AtHand(judge=judge)).version

    elsewhere = Judge({})
    elsewhere.url = "http://other"
    versions = {
        version(LABEL, Judge({})),
        version({**LABEL, "model": "another"}, Judge({})),
        version({**LABEL, "screen": False}, Judge({})),
        version(LABEL, elsewhere),
    }
    assert len(versions) == 4
    assert version(LABEL, Judge({})) == version(dict(LABEL), Judge({}))
