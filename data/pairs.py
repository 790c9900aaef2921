"""Stage 7, examples: rows that may be imitated (SFT), preference pairs, judged answers (unpaired), answers
with a reward, and trajectories.

All examples of a cluster of questions are made together, within one split, so that no pair joins users of
two splits. The same answers in another order give the same examples.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from typing import Any

import orjson
import pyarrow as pa

from cluster.settings.curation import CurationSettings, ExampleSettings
from data.dedup import normalise_text
from data.interaction_bodies import Message
from data.join import to_json
from data.stages import Dropped, Row, rows_of, table_of
from data.template import content_text

ANSWERS = ("chosen", "rejected", "completion", "response", "trajectory")
KINDS = ("sft", "preference", "unpaired", "reward", "trajectory", "task")
EXAMPLES = pa.schema(
    [
        ("kind", pa.string()),
        ("split", pa.string()),
        ("example_id", pa.string()),
        ("user_id", pa.string()),
        ("interaction_ids", pa.list_(pa.string())),
        ("cluster_id", pa.string()),
        ("agent", pa.string()),
        ("prompt_digest", pa.string()),
        ("order", pa.float64()),
        ("messages", pa.string()),
        ("prompt", pa.string()),
        ("chosen", pa.string()),
        ("rejected", pa.string()),
        ("completion", pa.string()),
        ("response", pa.string()),
        ("reward", pa.float64()),
        ("score_card", pa.string()),
        ("category", pa.string()),
        ("logprob", pa.float64()),
        ("answer_tokens", pa.int64()),
        ("trajectory", pa.string()),
        ("item", pa.string()),
        ("synthetic", pa.bool_()),
        ("tools", pa.string()),
        ("weight", pa.float64()),
        ("score", pa.float64()),
        ("margin", pa.float64()),
        ("label", pa.bool_()),
        ("origin", pa.string()),
        ("at_us", pa.int64()),
        ("cluster", pa.uint64()),
        ("node", pa.uint64()),
        ("seen_in_test", pa.bool_()),
        ("turns", pa.int32()),  # messages of prompt and answer
        ("answer_words", pa.int32()),  # of the last message
    ]
)
"""Examples of all kinds; `data.manifest.COLUMNS` says which columns each kind keeps."""
UNUSED = (
    "context", "behaviours", "votes", "scrubbed", "session_key", "session_id", "version", "latency_s", "fields",
    "logged_us",
)  # fmt: skip
"""Columns that no example is made of: to make Python values of them takes time."""
NONE = "[]"
"""What a column holds where nobody said anything: looked at before JSON is parsed, for most rows hold it."""


@dataclass(frozen=True)
class Answer:
    """One answer to a question: what the agent said, or what a person said it should have been."""

    row: Row
    message: Message
    score: float
    origin: str
    """`answer`, `correction`, or `preferred` by a reviewer."""
    weight: float
    """That of its row; of a correction, what those who wrote it count for."""
    truncated: bool = False

    @cached_property
    def text(self) -> str:
        """What is compared: the text without regard to case and spacing."""
        return normalise_text(content_text(self.message))

    @cached_property
    def words(self) -> int:
        """In the text as it stands."""
        return len(content_text(self.message).split())

    @cached_property
    def json(self) -> str:
        """The message as a JSON list of one."""
        return to_json([self.message])

    @cached_property
    def columns(self) -> Row:
        """What all examples made of this answer alone have in common."""
        row = self.row
        return {
            "split": row["split"],
            "user_id": row["user_id"],
            "interaction_ids": sorted(set(row["interaction_ids"])),
            "cluster_id": f"{row['cluster']:016x}",
            "agent": row["agent"],
            "prompt_digest": row.get("prompt_digest"),
            "tools": row["tools"],
            "weight": min(1.0, self.weight),
            "origin": self.origin,
            "at_us": row["at_us"],
            "cluster": row["cluster"],
            "node": row["node"],
            "seen_in_test": row["seen_in_test"],
            "synthetic": False,
            "turns": len(orjson.loads(row["messages"])) + 1,
            "answer_words": self.words,
        }


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


def answers_of(row: Row, settings: CurationSettings) -> list[Answer]:
    """The agent's answer, then each distinct correction of it."""
    truncated = row["finish_reason"] in settings.examples.truncated_reasons
    found = [Answer(row, orjson.loads(row["response"]), row["score"], "answer", row["weight"], truncated)]
    if '"correction"' not in row["signals"] and row["labels"] == NONE:
        return found
    corrections: Counter[str] = Counter()
    for signal in orjson.loads(row["signals"]):
        if signal["type"] == "correction" and signal.get("text"):
            corrections[signal["text"]] += signal["weight"]
    corrections.update(label["corrected"] for label in orjson.loads(row["labels"]) if label.get("corrected"))
    for text, weight in sorted(corrections.items()):
        message = {"role": "assistant", "content": text}
        found.append(Answer(row, message, settings.score.correction_score, "correction", weight))
    return found


def sft_examples(answers: list[Answer], settings: ExampleSettings) -> Iterator[Row]:
    """Answers good enough to imitate, and corrections."""
    for answer in answers:
        if answer.score < settings.sft_min_score or answer.truncated or not answer.words:
            continue
        if answer.origin == "correction" and not settings.sft_corrections:
            continue
        yield _example("sft", [answer], messages=_joined(answer.row["messages"], answer.json), score=answer.score)


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
        yield _example("unpaired", [answer], prompt=answer.row["messages"], completion=answer.json, label=label)


def reward_examples(answers: list[Answer]) -> Iterator[Row]:
    """Answers with what reviewers, graders or users gave them, the first of these that there is."""
    for answer in answers:
        if answer.origin != "answer" or not answer.words:
            continue
        parts = orjson.loads(answer.row["parts"])
        source = next((name for name in ("label", "grade", "explicit") if parts[name] is not None), None)
        if source is None:
            continue
        yield _example(
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


def task_category(row: Row) -> str | None:
    """What most reviewers call the task; the first in the alphabet among equals."""
    if row["labels"] == NONE:
        return None
    named = Counter(c for label in orjson.loads(row["labels"]) if (c := label.get("task_category")))
    return min(named, key=lambda name: (-named[name], name)) if named else None


def trajectory_examples(rows: list[Row]) -> Iterator[Row]:
    """Whole trajectories with their reward; those of one task share the prompt, so GRPO can group them."""
    for row in rows:
        if row["tail"] is None or (reward := orjson.loads(row["parts"])["grade"]) is None:
            continue
        steps = [*orjson.loads(row["messages"]), orjson.loads(row["response"]), *orjson.loads(row["tail"])]
        begin = next((i for i, step in enumerate(steps) if step["role"] == "assistant"), len(steps))
        answer = Answer(row, steps[-1], row["score"], "trajectory", row["weight"])
        prompt, rest = to_json(steps[:begin]), to_json(steps[begin:])
        yield _example("trajectory", [answer], prompt=prompt, trajectory=rest, reward=reward, turns=len(steps))


def preference_examples(answers: list[Answer], settings: CurationSettings, dropped: Dropped) -> list[Row]:
    """Corrections against what they correct, answers a reviewer preferred, then answers to one question by score."""
    if len(answers) == 1 and answers[0].row["labels"] == NONE:
        return []
    pairs = [
        (chosen, rejected, "correction")
        for chosen in answers
        for rejected in answers
        if chosen.origin == "correction" and rejected.origin == "answer" and chosen.row is rejected.row
    ]
    if any(answer.row["labels"] != NONE for answer in answers):
        pairs += preferred_pairs(answers, settings.score.preferred_score, dropped)
    examples = [e for pair in pairs if (e := _pair(*pair, settings.examples, dropped)) is not None]
    return examples + _question_pairs(answers, settings.examples, dropped)


def preferred_pairs(
    answers: list[Answer], preferred_score: float, dropped: Dropped
) -> list[tuple[Answer, Answer, str]]:
    """What reviewers preferred to an answer, by their word and not by the score."""
    by_id = {i: answer for answer in answers if answer.origin == "answer" for i in answer.row["interaction_ids"]}
    pairs = []
    for answer in (a for a in answers if a.origin == "answer"):
        for wanted in sorted({w for label in orjson.loads(answer.row["labels"]) if (w := label.get("preferred"))}):
            better = by_id.get(wanted)
            if better is None:
                dropped["pair: preferred answer is not among those to this question"] += 1
            elif better is not answer:
                chosen = replace(better, score=max(better.score, preferred_score), origin="preferred")
                rejected = replace(answer, score=min(answer.score, 1 - preferred_score))
                pairs.append((chosen, rejected, "preferred"))
    return pairs


def _question_pairs(answers: list[Answer], settings: ExampleSettings, dropped: Dropped) -> list[Row]:
    """Up to `pairs_per_question` pairs of one question, the widest margins first, no answer pair twice."""
    if len({id(answer.row) for answer in answers}) < 2:
        return []
    good = sorted((a for a in answers if a.score >= settings.chosen_min_score), key=_by_score, reverse=True)
    wide = sorted(
        (
            (chosen, rejected)
            for chosen in good
            for rejected in answers
            if chosen.row is not rejected.row and chosen.score - rejected.score >= settings.min_margin
        ),
        key=lambda pair: (pair[1].score - pair[0].score, _by_score(pair[0]), _by_score(pair[1])),
    )
    made: list[Row] = []
    seen: set[tuple[str, str]] = set()
    for chosen, rejected in wide:
        if len(made) >= settings.pairs_per_question:
            break
        if (chosen.text, rejected.text) in seen:
            continue
        seen.add((chosen.text, rejected.text))
        example = _pair(chosen, rejected, pair_origin(chosen.row, rejected.row), settings, dropped)
        if example is not None:
            made.append(example)
    return made


def pair_origin(chosen: Row, rejected: Row) -> str:
    """Where the difference comes from: `shadow`, `ab` (two arms), `grader`, `same_query` or `similar_query`."""
    arms = {chosen["arm"], rejected["arm"]}
    if "shadow" in arms or any(orjson.loads(row["flags"]).get("shadow") for row in (chosen, rejected)):
        return "shadow"
    if arms == {"stable", "candidate"}:
        return "ab"
    parts = [orjson.loads(row["parts"]) for row in (chosen, rejected)]
    if all(p["grade"] is not None and all(p[n] is None for n in ("explicit", "implicit", "label")) for p in parts):
        return "grader"
    return "same_query" if chosen["node"] == rejected["node"] else "similar_query"


def _joined(first: str, second: str) -> str:
    """Two JSON lists as one."""
    return second if first == NONE else f"{first[:-1]},{second[1:]}"


def _by_score(answer: Answer) -> tuple[float, str]:
    return answer.score, answer.row["interaction_id"]


def _pair(chosen: Answer, rejected: Answer, origin: str, settings: ExampleSettings, dropped: Dropped) -> Row | None:
    reason = refusal(chosen, rejected, settings)
    if reason is not None:
        dropped[f"pair: {reason}"] += 1
        return None
    return _example(
        "preference",
        [chosen, rejected],
        prompt=chosen.row["messages"],
        chosen=chosen.json,
        rejected=rejected.json,
        margin=chosen.score - rejected.score,
        score=chosen.score,
        category=task_category(chosen.row) or task_category(rejected.row),
        origin=origin,
    )


def refusal(chosen: Answer, rejected: Answer, settings: ExampleSettings) -> str | None:
    """Why two answers make no pair, or `None`."""
    if not chosen.text or not rejected.text:
        return "empty"
    if chosen.truncated or rejected.truncated:
        return "truncated"
    if chosen.text == rejected.text:
        return "identical"
    if chosen.score < rejected.score:
        return "swapped"
    if chosen.score < settings.chosen_min_score:
        return "chosen too weak"
    return "margin too small" if chosen.score - rejected.score < settings.min_margin else None


def _example(kind: str, answers: list[Answer], **columns: Any) -> Row:
    shared = answers[0].columns
    if len(answers) > 1:
        all_of = [answer.columns for answer in answers]
        shared = shared | {
            "interaction_ids": sorted({i for one in all_of for i in one["interaction_ids"]}),
            "weight": min(one["weight"] for one in all_of),
            "at_us": max(one["at_us"] for one in all_of),
        }
    content = {name: value for name, value in columns.items() if isinstance(value, str)}
    identity = [kind, shared["split"], shared["interaction_ids"], content]
    digest = hashlib.sha256(orjson.dumps(identity, option=orjson.OPT_SORT_KEYS)).hexdigest()
    return {**shared, "kind": kind, "example_id": digest[:32], **columns}
