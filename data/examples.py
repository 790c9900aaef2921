"""Stage 7, examples: rows that may be imitated (SFT), preference pairs, judged answers (unpaired), answers
with a reward, and trajectories.

All examples of a cluster of questions are made together, within one split, so that no pair joins users of
two splits. The same answers in another order give the same examples.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from typing import Any

import orjson
import pyarrow as pa

from cluster.settings.curation import CurationSettings, ExampleSettings
from data.answers import EXAMPLES, NONE, Answer, answers_of, example_of, task_category
from data.dedup import normalise_text
from data.join import to_json
from data.pairs import preference_examples
from data.stages import Dropped, Row, rows_of, table_of

ANSWERS = ("chosen", "rejected", "completion", "response", "trajectory")
UNUSED = (
    "context", "behaviours", "votes", "scrubbed", "session_key", "session_id", "version", "latency_s", "fields",
    "logged_us",
)  # fmt: skip
"""Columns that no example is made of: to make Python values of them takes time."""


def make_examples(table: pa.Table, settings: CurationSettings) -> tuple[pa.Table, Dropped]:
    """Rows of `EXAMPLES`. Needs all rows of a cluster; the tally counts refused pairs and silent rows."""
    dropped: Dropped = Counter()
    plain = table.drop_columns([name for name in UNUSED if name in table.column_names])
    rows = rows_of(plain.sort_by([("cluster", "ascending"), ("split", "ascending")]))
    groups = groupby(rows, key=itemgetter("cluster", "split"))
    examples = (example for _, group in groups for example in _examples_of(list(group), settings, dropped))
    made = table_of(examples, EXAMPLES)
    return made, +dropped


def _examples_of(rows: list[Row], settings: CurationSettings, dropped: Dropped) -> list[Row]:
    """All examples of one cluster in one split."""
    rows.sort(key=lambda r: (r["at_us"], r["interaction_id"]))
    answers = [answer for row in rows for answer in answers_of(row, settings)]
    made = [*sft_examples(answers, settings.examples), *unpaired_examples(answers, settings.examples)]
    made += [*reward_examples(answers), *trajectory_examples(rows)]
    made += preference_examples(answers, settings, dropped)
    used = {i for example in made for i in example["interaction_ids"]}
    dropped["no example"] += sum(used.isdisjoint(row["interaction_ids"]) for row in rows)
    if len(answers) > 1:
        made, repeated = _without_repeats(made)
        dropped["repeated example"] += repeated
    return made


def _without_repeats(examples: list[Row]) -> tuple[list[Row], int]:
    """Each example once: several people may write the same correction. The heaviest stays."""
    by_content: dict[tuple[Any, ...], Row] = {}
    known: dict[str, str] = {}  # most texts are in several examples

    def plain(text: str) -> str:
        return known[text] if text in known else known.setdefault(text, normalise_text(text))

    for example in examples:
        texts = ((name, plain(text)) for name in ("messages", "prompt", *ANSWERS) if (text := example.get(name)))
        key = (example["kind"], example.get("label"), *texts)
        kept = by_content.setdefault(key, example)
        if example["weight"] > kept["weight"]:
            by_content[key] = example
    return list(by_content.values()), len(examples) - len(by_content)


def sft_examples(answers: list[Answer], settings: ExampleSettings) -> Iterator[Row]:
    """Answers good enough to imitate, and corrections."""
    for answer in answers:
        if answer.score < settings.sft_min_score or answer.truncated or not answer.words:
            continue
        if answer.origin == "correction" and not settings.sft_corrections:
            continue
        yield example_of("sft", [answer], messages=_joined(answer.row["messages"], answer.json), score=answer.score)


def unpaired_examples(answers: list[Answer], settings: ExampleSettings) -> Iterator[Row]:
    """Answers that people judged, with their verdict; a correction is a good answer."""
    for answer in answers:
        explicit = answer.row["explicit"]
        if answer.origin == "correction":
            label = True if settings.unpaired_corrections else None
        else:
            label = None if not explicit else explicit > 0
        if label is None or answer.truncated or not answer.words:
            continue
        yield example_of("unpaired", [answer], prompt=answer.row["messages"], completion=answer.json, label=label)


def reward_examples(answers: list[Answer]) -> Iterator[Row]:
    """Answers with what reviewers, graders or users gave them, the first of these that there is."""
    for answer in answers:
        if answer.origin != "answer" or not answer.words:
            continue
        parts = orjson.loads(answer.row["parts"])
        source = next((name for name in ("label", "grade", "explicit") if parts[name] is not None), None)
        if source is None:
            continue
        yield example_of(
            "reward",
            [answer],
            prompt=answer.row["messages"],
            response=answer.json,
            reward=parts[source],
            score_card=to_json(score_card(answer.row, parts)),
            category=task_category(answer.row),
            logprob=answer.row["answer_logprob"],
            answer_tokens=answer.row["answer_tokens"],
            origin=source,
        )


def score_card(row: Row, parts: dict[str, float | None]) -> dict[str, float]:
    """Every number there is about an answer, in [0, 1]: the score's components, reviewers' means (`success`,
    `helpfulness`, `tone`, `safety`), and each grader's own card."""
    card = {name: value for name, value in parts.items() if value is not None}
    if row["labels"] == row["grades"] == NONE:
        return card
    given: dict[str, list[float]] = defaultdict(list)
    for label in orjson.loads(row["labels"]):
        for name, value in (label.get("scores") or {}).items():
            given[name].append(value)
    card |= {name: sum(values) / len(values) for name, values in sorted(given.items()) if name not in parts}
    for grade in orjson.loads(row["grades"]):
        card |= {f"{grade['grader']}.{name}": value for name, value in (grade.get("score_card") or {}).items()}
    return card


def trajectory_examples(rows: list[Row]) -> Iterator[Row]:
    """Whole trajectories with their reward; those of one task share the prompt, so GRPO can group them."""
    for row in rows:
        if row["tail"] is None or (reward := orjson.loads(row["parts"])["grade"]) is None:
            continue
        steps = [*orjson.loads(row["messages"]), orjson.loads(row["response"]), *orjson.loads(row["tail"])]
        begin = next((i for i, step in enumerate(steps) if step["role"] == "assistant"), len(steps))
        answer = Answer(row, steps[-1], row["score"], "trajectory", row["weight"])
        prompt, rest = to_json(steps[:begin]), to_json(steps[begin:])
        yield example_of("trajectory", [answer], prompt=prompt, trajectory=rest, reward=reward, turns=len(steps))


def _joined(first: str, second: str) -> str:
    """Two JSON lists as one."""
    return second if first == NONE else f"{first[:-1]},{second[1:]}"
