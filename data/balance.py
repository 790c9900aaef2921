"""Stages 8 and 9, balance and curriculum: how much each example counts, and in which order they come."""

from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np
import orjson
import pyarrow as pa

from cluster.settings.curation import BalanceSettings
from data.dedup import question_text
from data.minhash import word_arrays
from data.stages import Dropped, with_column
from data.template import content_text

LONG_ANSWER_WORDS = 400  # an answer of this length counts as long
MANY_TURNS = 8  # a conversation of this many turns counts as multi-step


def topics(table: pa.Table, settings: BalanceSettings) -> list[int]:
    """A topic for each example: the least used-word hash that the question holds, in `topics` groups.

    Coarse on purpose: it needs no fitted model and gives the same topic to the same question everywhere.
    """
    if settings.topics == 0 or len(table) == 0:
        return [0] * len(table)
    texts = [question_text(messages) for messages in _prompts(table)]
    words, offsets = word_arrays(pa.array(texts, pa.string()))
    least = np.minimum.reduceat(words, offsets[:-1])
    return [int(value) % settings.topics for value in least]


def topic_weights(table: pa.Table, settings: BalanceSettings) -> dict[int, float]:
    """Weight of each topic in one block."""
    totals: Counter[int] = Counter()
    for topic, weight in zip(topics(table, settings), table["weight"].to_pylist(), strict=True):
        totals[topic] += weight
    return dict(totals)


def topic_factors(blocks: Iterable[Mapping[int, float]], settings: BalanceSettings) -> dict[int, float]:
    """What the weights of each over-full topic are multiplied with; alone in the dataset, a topic stays."""
    totals: Counter[int] = Counter()
    for block in blocks:
        totals.update(block)
    if len(totals) < 2:
        return {}
    limit = settings.topic_share / (1 - settings.topic_share) if settings.topic_share < 1 else float("inf")
    everything = sum(totals.values())
    return {
        topic: limit * (everything - weight) / weight
        for topic, weight in sorted(totals.items())
        if weight > limit * (everything - weight)
    }


def balance(table: pa.Table, settings: BalanceSettings, factors: Mapping[int, float]) -> tuple[pa.Table, Dropped]:
    """Scales the weights of over-full topics down."""
    if not factors:
        return table, Counter()
    scaled = [
        weight * factors.get(topic, 1.0)
        for topic, weight in zip(topics(table, settings), table["weight"].to_pylist(), strict=True)
    ]
    return with_column(table, "weight", scaled, pa.float64()), Counter()


def curriculum(table: pa.Table) -> tuple[pa.Table, Dropped]:
    """Fills `order` in [0, 1]: from clear, short, single-step examples to doubtful, long, multi-step ones."""
    prompts = _prompts(table)
    columns = (table[name].to_pylist() for name in ("kind", "score", "margin", "chosen", "completion", "messages"))
    orders = []
    for prompt, kind, score, margin, *answers in zip(prompts, *columns, strict=True):
        confidence = margin if kind == "preference" else abs(2 * score - 1) if score is not None else 0.5
        text = next(answer for answer in answers if answer is not None)
        words = len(content_text(orjson.loads(text)[-1]).split())
        steps = min(1.0, (len(prompt) - 1) / MANY_TURNS)
        length = min(1.0, words / LONG_ANSWER_WORDS)
        orders.append(round(0.5 * (1 - min(1.0, confidence)) + 0.3 * steps + 0.2 * length, 6))
    return with_column(table, "order", orders, pa.float64()), Counter()


def _prompts(table: pa.Table) -> list[list[dict[str, object]]]:
    """The prompt of each example, whatever its kind."""
    pairs = zip(table["prompt"].to_pylist(), table["messages"].to_pylist(), strict=True)
    return [orjson.loads(prompt) if prompt else orjson.loads(messages)[:-1] for prompt, messages in pairs]
