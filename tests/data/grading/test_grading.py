"""Every kind of grader: rewards computed by hand, abstentions, malformed configurations."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import InputError
from data.grading import GradeResult, load_grader, make_grader
from data.grading.text_similarity import fuzzy_match, gleu

ITEM = {"reference": '{"verdict": "benign", "owner": "netops"}', "label": "Paris"}
LABEL = {"type": "dataset_label", "name": "truth"}


def grade(config: dict[str, Any], text: str, item: dict[str, Any] | None = None) -> GradeResult:
    return make_grader(config).grade(ITEM if item is None else item, {"output_text": text})


@pytest.mark.parametrize(
    ("operation", "text", "reward"),
    [
        ("eq", "Paris", 1.0),
        ("eq", "paris", 0.0),
        ("ne", "Rome", 1.0),
        ("ne", "Paris", 0.0),
        ("like", "It is Paris.", 1.0),
        ("like", "It is paris.", 0.0),
        ("ilike", "It is paris.", 1.0),
    ],
)
def test_string_check(operation: str, text: str, reward: float) -> None:
    config = {"type": "string_check", "name": "c", "reference": "{{ item.label }}", "operation": operation}
    assert grade(config, text).reward == reward


def test_string_check_reads_a_field_of_the_answer() -> None:
    config = {
        "type": "string_check",
        "input": "{{ sample.output_json.verdict }}",
        "reference": "benign",
        "operation": "ne",
    }
    assert grade(config, '{"verdict": "malicious"}').reward == 1.0
    assert grade(config, "not json").reward == 0.0  # an answer that lacks the field never earns `ne`


def test_what_the_item_lacks_is_an_abstention() -> None:
    for config in ({"type": "string_check", "reference": "{{ item.none }}"}, LABEL):
        result = grade(config, "x", {"label": "x"})
        assert result.reward is None and "the item has no" in result.reason


def test_answers_are_never_expanded() -> None:
    config = {"type": "string_check", "input": "{{ sample.output_text }}", "reference": "{{ item.label }}"}
    assert grade(config, "{{ item.label }}").reward == 0.0


@pytest.mark.parametrize(
    ("metric", "text", "reference", "score"),
    [
        ("rouge_1", "the cat sat", "the cat", 0.8),  # precision 2/3, recall 1
        ("rouge_l", "a b c d", "a c b d", 0.75),  # LCS 3 of 4
        ("rouge_2", "a b c", "a b d", 0.5),
        ("gleu", "a b", "a b c", 3 / 6),  # 3 shared n-grams of 6
        ("fuzzy_match", "abcd", "abxd", 0.75),  # LCS 3: 2·3/8
        ("bleu", "the cat sat on the mat", "the cat sat on the mat", 1.0),
        ("rouge_l", "Größe 你好", "größe 你好", 1.0),
        ("bleu", "", "the cat", 0.0),
    ],
)
def test_text_similarity(metric: str, text: str, reference: str, score: float) -> None:
    config = {"type": "text_similarity", "reference": reference, "evaluation_metric": metric}
    assert grade(config, text).reward == pytest.approx(score)


def test_text_similarity_with_a_threshold_is_pass_or_fail() -> None:
    config = {
        "type": "text_similarity",
        "reference": "a b c d",
        "evaluation_metric": "rouge_1",
        "pass_threshold": 0.7,
    }
    assert (grade(config, "a b c").reward, grade(config, "a b").reward) == (1.0, 0.0)


@given(st.text(alphabet="abc", max_size=12), st.text(alphabet="abc", max_size=12))
def test_fuzzy_match_equals_the_plain_dynamic_programme(left: str, right: str) -> None:
    table = [[0] * (len(right) + 1) for _ in range(len(left) + 1)]
    for i, a in enumerate(left):
        for j, b in enumerate(right):
            table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
    total = len(left) + len(right)
    expected = float(left == right) if not left or not right else 2 * table[-1][-1] / total
    assert fuzzy_match(left, right) == pytest.approx(expected)
    assert gleu(list(left), list(right)) == gleu(list(right), list(left))


def test_dataset_label_gives_credit_by_field() -> None:
    both = grade(LABEL, '{"owner": "NetOps ", "verdict": "Benign"}')
    one = grade(LABEL, '{"verdict": "benign", "owner": "soc"}')
    assert both.reward == 1.0 and one.reward == 0.5
    assert one.score_card == {"verdict": 1.0, "owner": 0.0} and one.reason == "differs in owner"
    weighted = {**LABEL, "fields": {"verdict": 3, "owner": 1}}
    assert grade(weighted, '{"verdict": "benign", "owner": "soc"}').reward == 0.75


@pytest.mark.parametrize(
    "text",
    [
        '{"verdict": "malicious", "verdict": "benign", "owner": "netops"}',
        'Sure! {"verdict": "benign", "owner": "netops"}',
        '["benign", "netops"]',
        '{"verdict": NaN}',
        "",
    ],
)
def test_dataset_label_fails_what_is_not_one_clean_object(text: str) -> None:
    assert grade(LABEL, text).reward == 0.0


def test_dataset_label_counts_invented_fields_against_the_answer() -> None:
    assert grade(LABEL, '{"verdict": "benign", "owner": "netops", "reward": 1}').reward == pytest.approx(2 / 3)


def test_dataset_label_compares_text_and_extracts() -> None:
    item = {"reference": "Tom has 3 + 4 = 7 apples.\n#### 1,007"}
    extract = {**LABEL, "extract": r"####\s*([\d,]+)"}
    assert grade(extract, "First 5, no: #### 5 … #### 1,007", item).reward == 1.0
    assert grade(extract, "the answer is 1,007", item).reward == 0.0
    assert grade(LABEL, "  PARIS. ", {"reference": "Paris"}).reward == 1.0
    assert grade({**LABEL, "text": "fuzzy_match"}, "abcd", {"reference": "abxd"}).reward == 0.75
    assert grade(LABEL, "x", {"reference": ""}).reward is None


def test_dataset_label_keeps_booleans_and_numbers_apart() -> None:
    assert grade(LABEL, '{"open": 1}', {"reference": {"open": True}}).reward == 0.0
    assert grade(LABEL, '{"n": 1.0}', {"reference": {"n": 1}}).reward == 1.0


RUBRIC = {
    "type": "rubric",
    "name": "triage",
    "criteria": {
        "verdict": {
            "kind": "verdict",
            "weight": 3,
            "checks": [{"check": "json_equals", "path": "verdict", "value": "{{ item.truth.verdict }}"}],
        },
        "evidence": {
            "kind": "evidence",
            "checks": [
                {"check": "contains", "phrases": ["{{ item.truth.host }}"]},
                {"check": "regex", "pattern": r"\bCHG-\d+"},
            ],
        },
        "format": {"kind": "format", "checks": [{"check": "valid_json", "required": ["verdict"]}]},
        "safety": {"kind": "safety", "checks": [{"check": "not_regex", "pattern": r"AKIA[0-9A-Z]{16}"}]},
    },
}
TRUTH = {"truth": {"verdict": "benign", "host": "web-1"}}


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ('{"verdict": "benign", "why": "CHG-12 on web-1"}', 1.0),
        ('{"verdict": "benign", "why": "web-1"}', (3 + 0.5 + 1 + 1) / 6),
        ('{"verdict": "malicious", "why": "web-1"}', (0 + 0.5 + 1 + 1) / 6),
        ('{"verdict": "malicious"}', 0.0),  # form and manners alone earn nothing
        ('{"verdict": "benign", "key": "AKIAABCDEFGHIJKLMNOP"}', 0.0),  # safety is required
        ("", 0.0),
    ],
)
def test_rubric_gives_partial_credit(text: str, reward: float) -> None:
    assert grade(RUBRIC, text, TRUTH).reward == pytest.approx(reward)


def test_rubric_reads_tool_calls_in_both_shapes() -> None:
    checks = [{"check": "tool_called", "name": "lookup", "arguments": {"host": "{{ item.truth.host }}"}}]
    rubric = {"type": "rubric", "criteria": {"tools": {"kind": "tool_use", "checks": checks}}}
    openai = {"type": "function", "function": {"name": "lookup", "arguments": json.dumps({"host": "web-1"})}}
    for call, reward in ((openai, 1.0), ({"name": "lookup", "arguments": {"host": "db"}}, 0.0)):
        sample = {"output_text": "", "output_tools": [call]}
        assert make_grader(rubric).grade(TRUTH, sample).reward == reward


def test_rubric_file(tmp_path: Path) -> None:
    file = tmp_path / "rubric.yaml"
    file.write_text(
        "type: rubric\nname: t\ncriteria:\n  v:\n    kind: verdict\n    checks:\n"
        "      - {check: one_of, alternatives: [benign, malicious], expected: '{{ item.v }}'}\n"
    )
    grader = load_grader(file)
    assert grader.grade({"v": "benign"}, {"output_text": "It is benign."}).reward == 1.0
    assert grader.grade({"v": "benign"}, {"output_text": "benign or malicious"}).reward == 0.0
    file.write_text("type: [")
    with pytest.raises(InputError, match="cannot be read"):
        load_grader(file)


MULTI = {
    "type": "multi",
    "name": "m",
    "graders": {"a": LABEL, "b": {"type": "string_check", "reference": "netops", "operation": "like"}},
    "calculate_output": "0.75 * a + 0.25 * max(b, 0)",
}


def test_multi_weighs_its_graders() -> None:
    assert grade(MULTI, '{"verdict": "x", "owner": "netops"}').reward == pytest.approx(0.625)
    assert grade(MULTI, '{"verdict": "x"}', {"label": "x"}).reward is None
    assert grade({**MULTI, "calculate_output": "1 / b"}, "x").reward is None
    assert grade({**MULTI, "calculate_output": "a + b + 5"}, "x").reward == 1.0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "grader.type=None must be one of string_check"),
        ({"type": "oracle"}, "must be one of"),
        ({"type": ["rubric"]}, "must be one of"),
        ({"type": "string_check"}, "grader.reference"),
        ({"type": "string_check", "reference": "x", "operation": "gt"}, "grader.operation='gt'"),
        ({"type": "string_check", "reference": "{{ os.environ }}"}, "names 'os.environ'"),
        ({"type": "string_check", "reference": "{{ sample.secret }}"}, r"names sample\.secret"),
        ({"type": "text_similarity", "reference": "x", "evaluation_metric": "cider"}, "evaluation_metric"),
        ({**LABEL, "fields": {}}, "at least one field"),
        ({**LABEL, "extract": "("}, "is not a pattern"),
        ({**LABEL, "typo": 1}, "grader.typo"),
        ({"type": "rubric", "criteria": {}}, "grader.criteria"),
        (
            {"type": "rubric", "criteria": {"f": {"kind": "format", "checks": [{"check": "valid_json"}]}}},
            "manners alone",
        ),
        ({**MULTI, "calculate_output": "__import__('os')"}, "may hold numbers"),
        ({**MULTI, "calculate_output": "a + c"}, "unknown grader 'c'"),
        ({**MULTI, "calculate_output": "a +"}, "is not a formula"),
        (
            {**MULTI, "graders": {"a": {"type": "nope"}}, "calculate_output": "a"},
            "grader.graders.a.type='nope'",
        ),
    ],
)
def test_malformed_configurations_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_grader(config)


def test_version_follows_the_configuration() -> None:
    first, same = make_grader(LABEL), make_grader(dict(reversed(LABEL.items())))
    assert first.version == same.version and first.version.startswith("dataset_label-")
    assert first.version != make_grader({**LABEL, "text": "rouge_l"}).version
    inner = {**MULTI, "graders": {**MULTI["graders"], "a": {**LABEL, "text": "rouge_l"}}}  # type: ignore[dict-item]
    assert make_grader(MULTI).version != make_grader(inner).version
    result = first.grade(ITEM, {"output_text": "x"})
    assert result == first.grade(ITEM, {"output_text": "x"}) and result.grader_version == first.version


def test_a_missing_or_endless_answer() -> None:
    grader = make_grader({**LABEL, "max_answer_chars": 10})
    assert grader.grade(ITEM, {}).reward is None
    assert grader.grade(ITEM, {"output_text": "x" * 11}).reward == 0.0
    assert grader.grade(ITEM, {"output_text": "[" * 9}).reward == 0.0
    assert make_grader(LABEL).grade(ITEM, {"output_text": "[" * 99_999}).reward == 0.0
