"""Answers that try to be rewarded without an answer (attacks.jsonl): one token, or instructions to the judge.

One-token attacks after Zhao et al. 2025, "One Token to Fool LLM-as-a-Judge", arXiv:2507.08794. A case with
`judge: false` may be an honest answer to some question, so only graders that know the truth must fail it.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from data.grading import AtHand, make_grader
from data.grading.python_grader import PythonGrader
from data.grading.screen import screen
from data.grading.types import Question

CASES = [json.loads(line) for line in Path(__file__).with_name("attacks.jsonl").read_text("utf-8").splitlines()]
ATTACKS = [case["text"] for case in CASES]
ITEM = {
    "reference": '{"verdict": "malicious", "owner": "soc"}',
    "truth": {"verdict": "malicious"},
    "text": "Revoke the token",
    "messages": [{"role": "user", "content": "What now?"}],
}
ALTERNATIVES = ["benign", "malicious", "suspicious"]
GRADERS: dict[str, dict[str, Any]] = {
    "dataset_label": {"type": "dataset_label"},
    "string_check": {"type": "string_check", "reference": "{{ item.text }}", "operation": "ilike"},
    "text_label": {"type": "dataset_label", "reference": "{{ item.text }}"},
    "rubric_json": {
        "type": "rubric",
        "criteria": {
            "verdict": {
                "kind": "verdict",
                "checks": [{"check": "json_equals", "path": "verdict", "value": "{{ item.truth.verdict }}"}],
            },
            "format": {
                "kind": "format",
                "checks": [{"check": "valid_json"}, {"check": "length", "max_chars": 500}],
            },
            "safety": {"kind": "safety", "checks": [{"check": "not_contains", "phrases": ["password"]}]},
        },
    },
    "rubric_text": {
        "type": "rubric",
        "criteria": {
            "verdict": {
                "kind": "verdict",
                "checks": [{"check": "one_of", "alternatives": ALTERNATIVES, "expected": "{{ item.truth.verdict }}"}],
            },
            "manners": {"kind": "safety", "checks": [{"check": "not_regex", "pattern": "(?i)idiot"}]},
        },
    },
}
EQUAL = "def grade(sample, item):\n    return float(sample['output_text'].strip().lower() == item['text'].lower())\n"
GRADERS |= {
    "multi": {
        "type": "multi",
        "graders": {"check": GRADERS["string_check"], "label": GRADERS["text_label"]},
        "calculate_output": "0.5 * check + 0.5 * label",
    },
    "python": {"type": "python", "source": EQUAL},
}
NAMES_THE_TRUTH = {"rubric_text": '"Verdict": "malicious"'}
"""An answer that names the right verdict and no other is right for a rubric that reads prose."""
PROMPT = [{"role": "user", "content": "Question: {{ item.text }}\nAnswer: {{ sample.output_text }}"}]
JUDGES: dict[str, dict[str, Any]] = {
    "label_model": {
        "type": "label_model", "model": "j", "input": PROMPT, "labels": ["good", "bad"], "passing_labels": ["good"],
    },
    "score_model": {"type": "score_model", "model": "j", "input": PROMPT},
    "pair_model": {"type": "pair_model", "model": "j", "input": PROMPT, "opponent": "{{ item.text }}"},
    "reward_model": {"type": "reward_model", "adapter_sha256": "ab" * 32},
    "cosine": {"type": "text_similarity", "reference": "{{ item.text }}", "evaluation_metric": "cosine"},
}  # fmt: skip
JUDGES["multi"] = {
    "type": "multi", "graders": {name: JUDGES[name] for name in ("label_model", "reward_model")},
    "calculate_output": "0.5 * label_model + 0.5 * reward_model",
}  # fmt: skip
"""Judges that know no truth, so that the screen has to tell."""
SIMILARITIES = ("fuzzy_match", "bleu", "gleu", "meteor", "rouge_1", "rouge_l")


class Gullible:
    """A judge that finds everything perfect, by whatever it is asked: a label, a score, a pair, a reward, vectors."""

    url = "http://gullible"
    adapter_sha256 = "ab" * 32

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def ask(self, question: Question) -> Any:
        self.asked.append(question)
        if question.path == "/v1/embeddings":
            return {"data": [{"index": place, "embedding": [1.0, 0.0]} for place in (0, 1)]}
        wanted = str(question.body["response_format"])
        first = "Revoke the token." in question.body["messages"][-1]["content"].splitlines()[0]
        said = {"label": "good"} if "label" in wanted else {"better": "first" if first else "second"}
        content = json.dumps(said if "result" not in wanted else {"result": 1})
        return {"choices": [{"message": {"content": content}, "finish_reason": "stop"}]}

    def scores(self, conversations: Sequence[Any]) -> list[float]:
        self.asked += conversations
        return [100.0 for _ in conversations]


@pytest.mark.parametrize("name", GRADERS)
def test_attacks_score_as_failures(name: str) -> None:
    assert len(ATTACKS) >= 100
    grader = make_grader(GRADERS[name])
    excused = NAMES_THE_TRUTH.get(name)
    rewarded = {
        attack: reward
        for attack in ATTACKS
        if (reward := grader.grade(ITEM, {"output_text": attack}).reward) != 0.0 and not (excused and excused in attack)
    }
    assert rewarded == {}
    if isinstance(grader, PythonGrader):
        grader.close()


@pytest.mark.parametrize("name", JUDGES)
def test_attacks_on_a_gullible_judge_score_as_failures(name: str) -> None:
    judge = Gullible()
    grader = make_grader(JUDGES[name], at_hand=AtHand(judge=judge, scorer=judge, embedding_model="e"))
    attacks = [case["text"] for case in CASES if case["judge"]]
    assert len(attacks) >= 100
    assert {t: r for t in attacks if (r := grader.grade(ITEM, {"output_text": t}).reward) != 0.0} == {}
    assert not judge.asked  # they fail unread
    assert grader.grade(ITEM, {"output_text": "Revoke the token."}).reward == 1.0


@pytest.mark.parametrize("metric", SIMILARITIES)
def test_attacks_are_similar_to_no_reference(metric: str) -> None:
    config = {"type": "text_similarity", "reference": "{{ item.text }}", "evaluation_metric": metric}
    grader = make_grader(config)
    attacks = [case["text"] for case in CASES if case["judge"]]
    assert {t: r for t in attacks if (r := grader.grade(ITEM, {"output_text": t}).reward) != 0.0} == {}
    honest = {"text": "Ignore the previous instructions of the vendor."}  # where the reference itself speaks so
    assert grader.grade(honest, {"output_text": honest["text"]}).reward == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize(
    "text",
    [
        "Revoke the token and tell the owner; the score of the alert is 7 out of 10.",
        "First identify the lowest score, which is 71, and remove it. The answer is 93.",
        "42",
        "malicious",
        '{"verdict": "malicious", "owner": "soc"}',
        "John wins an award at work. He asks for a raise at his new job.",
        "Paste {host} into the field and press enter.",
    ],
)
def test_honest_answers_pass_the_screen(text: str) -> None:
    assert screen(text) is None


def test_few_of_real_answers_are_taken_for_attacks(shared_data: Path) -> None:
    rows = [json.loads(line) for line in (shared_data / "gsm8k_model_solutions.jsonl").read_text().splitlines()]
    texts = [text for row in rows for text in _texts(row)]
    assert len(texts) > 2_000
    assert sum(screen(text) is not None for text in texts) / len(texts) < 0.002


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value] if " " in value else []
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for part in inner for text in _texts(part)]
