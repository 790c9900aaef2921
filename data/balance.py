"""Stages 8 and 9, balance and curriculum: how much each example counts, and in which order they come."""

from collections import Counter
from collections.abc import Iterable, Mapping

import orjson
import pyarrow as pa
import pyarrow.compute as pc

from cluster.settings.curation import BalanceSettings, DetectorSettings
from data.dedup import question_text
from data.detectors.make import topics_of
from data.detectors.topics import TopicModel
from data.stages import Dropped, with_column

LONG_ANSWER_WORDS = 400  # an answer of this length counts as long
BILLION = 1e9
MANY_TURNS = 8  # a conversation of this many turns counts as multi-step


def sample_questions(table: pa.Table, most: int) -> pa.Table:
    """Rows (node, question) of up to `most` questions, those of the least hash: a sample that blocks agree on."""
    prompts = [question_text(messages) for messages in _prompts(table)]
    rows = pa.table({"node": table["node"], "question": pa.array(prompts, pa.string())})
    return least_nodes(rows, most)


def least_nodes(rows: pa.Table, most: int) -> pa.Table:
    """The `most` rows of the least nodes, each node once, in order."""
    once = rows.group_by("node").aggregate([("question", "min")]).rename_columns(["node", "question"])
    return once.take(pc.sort_indices(once, [("node", "ascending")])[:most])


def sample_of_all(samples: Iterable[pa.Table], most: int) -> pa.Table:
    """The sample of all blocks from each one's, of which two are held at once."""
    rows = pa.table({"node": pa.array([], pa.uint64()), "question": pa.array([], pa.string())})
    for sample in samples:
        rows = least_nodes(pa.concat_tables([rows, sample]), most)
    return rows


def fit(sample: pa.Table, settings: BalanceSettings, named: DetectorSettings) -> TopicModel:
    """The topics of a sample's questions."""
    return topics_of(sample["question"].to_pylist(), settings.topics, named)


def add_topics(table: pa.Table, model: TopicModel) -> pa.Table:
    """Adds `topic`, a number, to each example."""
    questions = [question_text(messages) for messages in _prompts(table)]
    return with_column(table, "topic", model.assign(questions), pa.int32())


def topic_weights(table: pa.Table) -> dict[int, int]:
    """Weight of each topic in one block with topics, in billionths: whole numbers add up alike in every order."""
    parts = pc.cast(pc.round(pc.multiply(table["weight"], BILLION)), pa.int64())
    sums = pa.table({"topic": table["topic"], "weight": parts}).group_by("topic").aggregate([("weight", "sum")])
    return dict(zip(sums["topic"].to_pylist(), sums["weight_sum"].to_pylist(), strict=True))


def topic_shares(blocks: Iterable[Mapping[int, int]], names: tuple[str, ...]) -> dict[str, float]:
    """Share of the weight that each topic has, by the topic's name."""
    totals: Counter[int] = Counter()
    for block in blocks:
        totals.update(block)
    everything = sum(totals.values()) or 1.0
    return {f"{topic}: {names[topic]}": round(totals[topic] / everything, 6) for topic in sorted(totals)}


def topic_factors(blocks: Iterable[Mapping[int, int]], settings: BalanceSettings) -> dict[int, float]:
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


def balance(table: pa.Table, factors: Mapping[int, float]) -> tuple[pa.Table, Dropped]:
    """Scales the weights of over-full topics down."""
    if not factors:
        return table, Counter()
    scaled = [
        weight * factors.get(topic, 1.0)
        for topic, weight in zip(table["topic"].to_pylist(), table["weight"].to_pylist(), strict=True)
    ]
    return with_column(table, "weight", scaled, pa.float64()), Counter()


def curriculum(table: pa.Table) -> tuple[pa.Table, Dropped]:
    """Fills `order` in [0, 1]: from clear, short, single-step examples to doubtful, long, multi-step ones."""
    columns = (table[name].to_pylist() for name in ("score", "reward", "margin", "turns", "answer_words"))
    orders = []
    for score, reward, margin, turns, words in zip(*columns, strict=True):
        judged = score if score is not None else reward
        confidence = margin if margin is not None else abs(2 * judged - 1) if judged is not None else 0.5
        steps = min(1.0, (turns - 2) / MANY_TURNS)
        length = min(1.0, words / LONG_ANSWER_WORDS)
        orders.append(round(0.5 * (1 - min(1.0, confidence)) + 0.3 * steps + 0.2 * length, 6))
    return with_column(table, "order", orders, pa.float64()), Counter()


def _prompts(table: pa.Table) -> list[list[dict[str, object]]]:
    """The prompt of each example, whatever its kind."""
    pairs = zip(table["prompt"].to_pylist(), table["messages"].to_pylist(), strict=True)
    return [orjson.loads(prompt) if prompt else orjson.loads(messages)[:-1] for prompt, messages in pairs]
