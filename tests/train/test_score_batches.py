"""Scoring many conversations together gives each the score it has alone."""

import threading
import time
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForSequenceClassification

from cluster.errors import UnavailableError
from train.score_batches import BatchScorer, Node, Row, ScoreQueue, buckets, plan

ROWS = st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=40).map(tuple), min_size=1, max_size=30, unique=True)


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=64, pad_token_id=0, num_labels=2, initializer_range=0.3, **shape)
    return LlamaForSequenceClassification(config).eval()


def alone(model: Any, row: list[int]) -> list[float]:
    with torch.inference_mode():
        return [float(v) for v in model(input_ids=torch.tensor([row])).logits[0]]


def conversations(count: int) -> list[list[int]]:
    """Groups of answers to one prompt, lone rows, and repeated ones."""
    draw = Random(1)
    rows = []
    for _ in range(count):
        prompt = [draw.randrange(1, 64) for _ in range(draw.randrange(20, 60))]
        for _ in range(draw.choice((1, 4))):
            rows.append(prompt + [draw.randrange(1, 64) for _ in range(draw.randrange(1, 30))])
    rows += rows[:5]
    draw.shuffle(rows)
    return rows


def test_scores_are_those_of_each_row_alone(model: Any) -> None:
    rows, scorer = conversations(12), BatchScorer(model, budget=256, kept_mb=1)
    for batch in (rows[:20], rows[20:], rows):  # beginnings of earlier batches are known in later ones
        for row, scores in zip(batch, scorer.score(batch), strict=True):
            assert scores == pytest.approx(alone(model, row), abs=1e-4)
    assert 0 < scorer._bytes <= 2**20


@given(ROWS)
def test_a_plan_holds_every_row_once_and_shares_true_beginnings(rows: list[Row]) -> None:
    seen: list[int] = []

    def check(node: Node, beginning: Row) -> None:
        for i in node.rows:
            assert rows[i][: node.shared] == beginning and len(rows[i]) > node.shared
        seen.extend(node.rows)
        for bucket in buckets(rows, node.rows, node.shared, budget=64):
            assert len(bucket) * max(len(rows[i]) - node.shared for i in bucket) <= 64 or len(bucket) == 1
        for group in node.groups:
            longer = rows[group.first][: group.shared]
            assert longer[: node.shared] == beginning and group.shared >= node.shared + 3
            check(group, longer)

    check(plan(rows, range(len(rows)), min_shared=3), ())
    assert sorted(seen) == list(range(len(rows)))


def test_the_queue_scores_what_waits_together_and_knows_it_afterwards() -> None:
    seen: list[list[Row]] = []
    gate = threading.Event()

    def score(rows: Any) -> list[Any]:
        gate.wait(30)
        seen.append(list(rows))
        return [sum(row) for row in rows]

    queue = ScoreQueue(score)
    later = time.monotonic() + 60
    first = queue.submit([1], later)
    while queue._queue:  # taken
        time.sleep(0.001)
    others = [queue.submit([n], later + n) for n in (3, 2)]
    late = queue.submit([9], time.monotonic() - 1)
    gate.set()
    assert first.result(30) == 1 and [f.result(30) for f in others] == [3, 2]
    assert seen == [[(1,)], [(2,), (3,)]]  # the more urgent first
    with pytest.raises(UnavailableError, match="no time"):
        late.result(30)
    assert queue.submit([3], later).result(0) == 3 and len(seen) == 2
    queue.close()
    with pytest.raises(UnavailableError, match="shutting down"):
        queue.submit([4], later).result(0)


def test_a_model_that_fails_fails_its_batch_only() -> None:
    def score(rows: Any) -> list[Any]:
        if (0,) in rows:
            raise RuntimeError("no memory")
        return [1.0 for _ in rows]

    queue = ScoreQueue(score)
    later = time.monotonic() + 60
    with pytest.raises(UnavailableError, match="no memory"):
        queue.submit([0], later).result(30)
    assert queue.submit([1], later).result(30) == 1.0
    queue.close()
