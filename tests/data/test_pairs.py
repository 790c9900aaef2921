import random
from typing import Any

import orjson
import pyarrow as pa
import pytest

from cluster.settings.curation import BalanceSettings, CurationSettings, ExampleSettings
from data.answers import Answer
from data.balance import balance, curriculum, topic_factors, topic_weights
from data.examples import make_examples
from data.manifest import COLUMNS
from data.pairs import refusal
from data.stages import with_column
from tests.data.rows import rows, signal

SETTINGS = CurationSettings()


EXTRA = {
    "score": (pa.float64(), 0.9),
    "explicit": (pa.float64(), None),
    "weight": (pa.float64(), 1.0),
    "parts": (pa.string(), '{"explicit":null,"implicit":null,"grade":null,"label":null}'),
    "node": (pa.uint64(), 7),
    "cluster": (pa.uint64(), 7),
    "split": (pa.string(), "train"),
    "seen_in_test": (pa.bool_(), False),
}
"""Columns that earlier stages add: type and default."""


def judged(*answers: dict[str, Any]) -> pa.Table:
    """Answers to one question by one user; the columns of `EXTRA` as given."""
    plain = [{k: v for k, v in answer.items() if k not in EXTRA} for answer in answers]
    table = rows(*({"interaction_id": f"i{n}", **answer} for n, answer in enumerate(plain)))
    for name, (kind, default) in EXTRA.items():
        table = with_column(table, name, [answer.get(name, default) for answer in answers], kind)
    ids = [[i] for i in table["interaction_id"].to_pylist()]
    return with_column(table, "interaction_ids", ids, pa.list_(pa.string()))


def say(text: str, **more: Any) -> dict[str, Any]:
    return {"response": {"role": "assistant", "content": text}} | more


def of_kind(table: pa.Table, kind: str) -> list[dict[str, Any]]:
    return [row for row in table.to_pylist() if row["kind"] == kind]


def content(text: str) -> str:
    return orjson.loads(text)[-1]["content"]


def verdicts(table: pa.Table) -> set[tuple[str, bool]]:
    return {(content(row["completion"]), row["label"]) for row in of_kind(table, "unpaired")}


def test_liked_answer_is_imitated_and_a_disliked_one_is_not() -> None:
    table, dropped = make_examples(
        judged(say("good", score=0.9, explicit=1.0), say("bad", score=0.1, explicit=-1.0)), SETTINGS
    )
    assert [content(row["messages"]) for row in of_kind(table, "sft")] == ["good"]
    assert verdicts(table) == {
        ("good", True),
        ("bad", False),
    }
    (pair,) = of_kind(table, "preference")
    assert (content(pair["chosen"]), content(pair["rejected"])) == ("good", "bad")
    assert pair["margin"] == pytest.approx(0.8) and pair["origin"] == "same_query"
    assert pair["interaction_ids"] == ["i0", "i1"] and not dropped


def test_correction_is_preferred_to_what_it_corrects() -> None:
    said = say("wrong", score=0.2, explicit=-0.5, signals=[signal("correction", -0.5, text="right", weight=0.5)])
    table, _ = make_examples(judged(said), SETTINGS)
    (pair,) = of_kind(table, "preference")
    assert (content(pair["chosen"]), content(pair["rejected"]), pair["origin"]) == (
        "right",
        "wrong",
        "correction",
    )
    assert [content(row["messages"]) for row in of_kind(table, "sft")] == ["right"]
    assert verdicts(table) == {
        ("wrong", False),
        ("right", True),
    }


def test_a_pair_knows_the_kind_of_task_that_reviewers_named() -> None:
    named = [{"reviewer": "a", "task_category": "refund"}]
    pairs = [
        (say("good", score=0.9), say("bad", score=0.1, labels=named)),
        (say("good", score=0.9, labels=named), say("bad", score=0.1)),
    ]
    for answers in pairs:
        (pair,) = of_kind(make_examples(judged(*answers), SETTINGS)[0], "preference")
        assert pair["category"] == "refund"
    assert "category" in COLUMNS["preference"]


def test_the_same_correction_of_two_answers_is_one_example_to_imitate() -> None:
    said = [signal("correction", -0.5, text="right", weight=1.0)]
    answers = judged(say("wrong", score=0.2, signals=said), say("worse", score=0.1, signals=said, weight=0.5))
    table, dropped = make_examples(answers, SETTINGS)
    (example,) = of_kind(table, "sft")
    assert (example["weight"], example["interaction_ids"]) == (1.0, ["i0"])
    pairs = {(content(row["chosen"]), content(row["rejected"])) for row in of_kind(table, "preference")}
    assert pairs == {("right", "wrong"), ("right", "worse")} and len(of_kind(table, "preference")) == 2
    # the second SFT row, the second unpaired row, and each correction against the other's answer
    assert dropped == {"repeated example": 4}


def test_pairs_are_never_formed_between_splits_or_questions() -> None:
    table, _ = make_examples(
        judged(say("good"), say("bad", score=0.1, split="test"), say("worse", score=0.1, node=8, cluster=8)),
        SETTINGS,
    )
    assert of_kind(table, "preference") == []


def test_similar_questions_pair_by_score_and_say_so() -> None:
    table, _ = make_examples(judged(say("good"), say("bad", score=0.1, node=8)), SETTINGS)
    assert [row["origin"] for row in of_kind(table, "preference")] == ["similar_query"]


def test_pairs_of_a_question_are_capped_and_widest_first() -> None:
    answers = [say(f"a{n}", score=n / 10) for n in range(11)]
    settings = CurationSettings(examples=ExampleSettings(pairs_per_question=2))
    table, _ = make_examples(judged(*answers), settings)
    assert sorted(round(row["margin"], 1) for row in of_kind(table, "preference")) == [0.9, 1.0]


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        (("a", 0.9, False), ("b", 0.1, False), None),
        (("a", 0.9, False), (" A ", 0.1, False), "identical"),
        (("a", 0.1, False), ("b", 0.9, False), "swapped"),
        (("", 0.9, False), ("b", 0.1, False), "empty"),
        (("a", 0.9, False), ("b", 0.1, True), "truncated"),
        (("a", 0.6, False), ("b", 0.1, False), "chosen too weak"),
        (("a", 0.9, False), ("b", 0.8, False), "margin too small"),
    ],
)
def test_pairs_are_refused_with_a_reason(
    chosen: tuple[str, float, bool], rejected: tuple[str, float, bool], reason: str | None
) -> None:
    sides = [Answer({}, {"role": "assistant", "content": t}, s, "answer", 1.0, cut) for t, s, cut in (chosen, rejected)]
    assert refusal(*sides, ExampleSettings()) == reason


def test_a_truncated_answer_becomes_no_example() -> None:
    table, dropped = make_examples(judged(say("cut off", finish_reason="length", explicit=1.0)), SETTINGS)
    assert len(table) == 0 and dropped == {"no example": 1}


def test_the_order_of_rows_changes_nothing() -> None:
    table = judged(*(say(f"a{n}", score=n / 10, explicit=n / 5 - 1) for n in range(8)))
    one, _ = make_examples(table, SETTINGS)
    other, _ = make_examples(table.take(list(reversed(range(8)))), SETTINGS)
    assert one.equals(other)


def test_curriculum_goes_from_clear_and_short_to_doubtful_and_long() -> None:
    table, _ = make_examples(
        judged(say("clear", score=1.0), say("doubtful " + "w " * 400, score=0.6, node=8, cluster=8)), SETTINGS
    )
    ordered, _ = curriculum(table)
    orders = {content(row["messages"])[:5]: row["order"] for row in of_kind(ordered, "sft")}
    assert orders == {"clear": pytest.approx(0.0005), "doubt": pytest.approx(0.5 * 0.8 + 0.2)}


def test_blocks_do_not_decide_what_an_overfull_topic_is_scaled_by() -> None:
    rng = random.Random(1)
    topics = pa.array([int(n % 7 == 0) for n in range(999)], pa.int32())
    table = pa.table({"topic": topics, "weight": [rng.random() / 3 for _ in range(999)]})
    settings = BalanceSettings(topics=2, topic_share=0.5)
    found = {
        tuple(topic_factors((topic_weights(table[n : n + size]) for n in range(0, 999, size)), settings).items())
        for size in (1, 7, 100, 999)
    }
    assert len(found) == 1


def test_an_overfull_topic_is_scaled_to_its_share() -> None:
    factors = topic_factors([{0: 60, 1: 20}, {0: 30}], BalanceSettings(topics=2, topic_share=0.5))
    assert factors == {0: pytest.approx(20 / 90)}
    assert topic_factors([{0: 60}], BalanceSettings(topics=2)) == {}
    table, _ = make_examples(judged(say("good")), SETTINGS)
    assert balance(table, {})[0].equals(table)
