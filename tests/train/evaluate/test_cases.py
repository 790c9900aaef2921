"""Suites as files, scorers, and truth from a dataset's rows."""

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import InputError
from train.evaluate.cases import read_cases
from train.evaluate.gates import SUITES
from train.evaluate.scorers import is_refusal, passes
from train.evaluate.truth import choose, make_truths


def test_every_built_in_suite_reads() -> None:
    sizes = {name: len(read_cases(name)) for name, suite in SUITES.items() if suite.cases}
    assert sizes == {
        "regression": 8, "tool_calls": 16, "refusal": 24, "over_refusal": 24, "grounding": 12, "sycophancy": 30,
        "anchor": 50,
    }  # fmt: skip


def test_a_teams_cases_add_and_replace(tmp_path: Path) -> None:
    line = {"id": "fact-1", "messages": [{"role": "user", "content": "?"}], "expect": {"exact": "x"}}
    (tmp_path / "regression.jsonl").write_text(json.dumps(line) + "\n\n" + json.dumps({**line, "id": "mine"}))
    cases = {case.id: case for case in read_cases("regression", tmp_path)}
    assert len(cases) == 9 and cases["fact-1"].expect == {"exact": "x"}
    with pytest.raises(InputError, match="is not a folder"):
        read_cases("regression", tmp_path / "none")


@pytest.mark.parametrize(
    "line",
    [
        "nonsense",
        "[]",
        '{"id": "a"}',
        '{"id": "a", "messages": [], "expect": {"exact": "x"}}',
        '{"id": "a", "messages": [{"role": "user"}], "expect": {}}',
        '{"id": "a", "messages": [{"role": "user"}], "expect": {"nope": 1}}',
        '{"id": "a", "messages": [{"role": "user"}], "expect": {"regex": "("}}',
        '{"id": "a", "messages": [{"role": "user"}], "expect": {"json_schema": {"type": 3}}}',
        '{"id": "a", "messages": [{"role": "user"}], "expect": {"exact": "x"}, "typo": 1}',
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "regression.jsonl").write_text("\n" + line)
    with pytest.raises(InputError, match=r"regression\.jsonl:2"):
        read_cases("regression", tmp_path)


CALL = {"name": "lookup", "arguments": {"host": "web-1", "days": 7}}


@pytest.mark.parametrize(
    ("expect", "answer", "holds"),
    [
        ({"exact": "42"}, " 42. ", True),
        ({"exact": '{"a": 1, "b": 2}'}, '{"b": 2, "a": 1}', True),
        ({"contains": ["a", "b"]}, "B and A", True),
        ({"contains": ["a", "z"]}, "B and A", False),
        ({"regex": "^v[0-9]+$"}, "v12", True),
        ({"json_fields": {"ok": True}}, '{"ok": true, "x": 1}', True),
        ({"json_fields": {"ok": True}}, '{"ok": 1}', False),
        ({"json_schema": {"type": "object", "required": ["a"]}}, '{"a": 1}', True),
        ({"json_schema": {"type": "object", "required": ["a"]}}, "[]", False),
        ({"tool_call": {"name": "lookup", "arguments": {"host": "web-1"}}}, json.dumps(CALL), True),
        ({"tool_call": {"name": "lookup"}}, f"<tool_call>{json.dumps(CALL)}</tool_call>", True),
        ({"tool_call": [{"name": "lookup"}, {"name": "close"}]}, json.dumps(CALL), False),
        ({"tool_call": {"name": "lookup", "arguments": {"host": "db"}}}, json.dumps(CALL), False),
        ({"exact": "x", "contains": "y"}, "x", False),
        ({"contains": "75", "lacks": ["you are right"]}, "It is 75.", True),
        ({"contains": "75", "lacks": ["you are right"]}, "You are right, it is not 75.", False),
        ({"grounded": ["Refunds are paid within 14 days."]}, "Refunds are paid within 14 days.", True),
        ({"grounded": ["Refunds are paid within 14 days."]}, "Refunds are paid within 30 days.", False),
        ({"grounded": ["Refunds are paid within 14 days."]}, "Refunds are paid. Shipping is always free.", False),
    ],
)
def test_scorers(expect: dict[str, Any], answer: str, holds: bool) -> None:
    assert passes(expect, answer) is holds


def test_tool_calls_in_order() -> None:
    first, second = '{"name": "a", "arguments": "{\\"x\\": 1}"}', '{"name": "b"}'
    text = f"<tool_call>{first}</tool_call> <tool_call>{second}</tool_call>"
    wanted = [{"name": "a", "arguments": {"x": 1}}, {"name": "b"}]
    assert passes({"tool_call": wanted}, text) and not passes({"tool_call": wanted[::-1]}, text)
    assert not passes({"tool_call": wanted}, "[1]")


@pytest.mark.parametrize(
    ("answer", "refused"),
    [
        ("I can't help with that.", True),
        ("I\u2019m not able to do this.", True),
        ("I must refuse.", True),
        ('{"refused": true, "verdict": null}', True),
        ('{"verdict": "benign"}', False),
        ("Done, the money is on its way.", False),
        ("You cannot delete a protected branch; use the web page.", False),
        ("", False),
    ],
)
def test_is_refusal(answer: str, refused: bool) -> None:
    assert is_refusal(answer) is refused


def row(number: int, **more: Any) -> dict[str, Any]:
    return {"example_id": f"e{number}", "user_id": "u", "tools": None, **more}


def test_truths_come_from_liked_answers_and_corrections_only() -> None:
    ask = [{"role": "user", "content": "q"}]
    said = [{"role": "assistant", "content": "a"}]
    better = [{"role": "assistant", "content": "b"}]
    other = [{"role": "assistant", "content": "c"}]
    sft = [
        row(1, messages=json.dumps(ask + said), origin="answer"),
        row(2, messages=json.dumps(ask + better), origin="correction"),
    ]
    pairs = [
        row(3, prompt=json.dumps(ask), chosen=json.dumps(better), rejected="[]", origin="correction"),
        row(4, prompt=json.dumps(ask), chosen=json.dumps(said), rejected="[]", origin="similar_query"),
        row(5, prompt=json.dumps(ask), chosen=json.dumps(other), rejected="[]", origin="correction"),
    ]
    truths = make_truths(sft, pairs)
    found = [(truth.example_id, truth.reference, truth.origin) for truth in truths]
    assert found == [("e1", "a", "liked"), ("e2", "b", "correction"), ("e5", "c", "correction")]
    assert choose(truths, 1) == choose(list(reversed(truths)), 1) and len(choose(truths, 1)) == 1
