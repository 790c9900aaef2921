"""Stage 7, examples: rows that may be imitated (SFT), preference pairs, and judged answers (unpaired).

All examples of a cluster of questions are made together, within one split, so that no pair joins users of
two splits. The same answers in another order give the same examples.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import orjson
import pyarrow as pa

from cluster.settings.curation import CurationSettings, ExampleSettings
from data.dedup import normalise_text
from data.events import Message
from data.join import to_json
from data.stages import Dropped
from data.template import content_text

ANSWERS = ("chosen", "rejected", "completion")
KINDS = ("sft", "preference", "unpaired")
EXAMPLES = pa.schema(
    [
        ("kind", pa.string()),
        ("split", pa.string()),
        ("example_id", pa.string()),
        ("user_id", pa.string()),
        ("interaction_ids", pa.list_(pa.string())),
        ("cluster_id", pa.string()),
        ("agent", pa.string()),
        ("order", pa.float64()),
        ("messages", pa.string()),
        ("prompt", pa.string()),
        ("chosen", pa.string()),
        ("rejected", pa.string()),
        ("completion", pa.string()),
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
    ]
)
"""Examples of all kinds; `data.manifest.COLUMNS` says which columns each kind keeps."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """One answer to a question: what the agent said, or what a person said it should have been."""

    row: Row
    message: Message
    score: float
    origin: str
    """`answer`, `correction` or `label`."""
    truncated: bool = False

    @property
    def text(self) -> str:
        """What is compared: the text without regard to case and spacing."""
        return normalise_text(content_text(self.message))


def make_examples(table: pa.Table, settings: CurationSettings) -> tuple[pa.Table, Dropped]:
    """Rows of `EXAMPLES`. Needs all rows of a cluster; the tally counts refused pairs and silent rows."""
    groups: dict[tuple[int, str], list[Row]] = defaultdict(list)
    for row in table.to_pylist():
        groups[row["cluster"], row["split"]].append(row)
    dropped: Dropped = Counter()
    examples: list[Row] = []
    for key in sorted(groups):
        rows = sorted(groups[key], key=lambda r: (r["at_us"], r["interaction_id"]))
        answers = [answer for row in rows for answer in answers_of(row, settings)]
        made = [*sft_examples(answers, settings.examples), *unpaired_examples(answers, settings.examples)]
        made += preference_examples(answers, settings.examples, dropped)
        used = {i for example in made for i in example["interaction_ids"]}
        made, repeated = _without_repeats(made)
        dropped["repeated example"] += repeated
        dropped["no example"] += sum(not used.intersection(row["interaction_ids"]) for row in rows)
        examples += made
    examples.sort(key=lambda example: (example["kind"], example["example_id"]))
    return pa.Table.from_pylist(examples, EXAMPLES), +dropped


def _without_repeats(examples: list[Row]) -> tuple[list[Row], int]:
    """Each example once: several people may write the same correction. The heaviest stays."""
    by_content: dict[tuple[Any, ...], Row] = {}
    for example in examples:
        texts = (normalise_text(example.get(name) or "") for name in ("messages", "prompt", *ANSWERS))
        key = (example["kind"], example.get("label"), *texts)
        kept = by_content.setdefault(key, example)
        if example["weight"] > kept["weight"]:
            by_content[key] = example
    return list(by_content.values()), len(examples) - len(by_content)


def answers_of(row: Row, settings: CurationSettings) -> list[Answer]:
    """The agent's answer, then each distinct correction of it."""
    truncated = row["finish_reason"] in settings.examples.truncated_reasons
    found = [Answer(row, orjson.loads(row["response"]), row["score"], "answer", truncated)]
    corrections = [s["text"] for s in orjson.loads(row["signals"]) if s["type"] == "correction" and s.get("text")]
    corrections += [label["corrected"] for label in orjson.loads(row["labels"]) if label.get("corrected")]
    for text in sorted(set(corrections)):
        message = {"role": "assistant", "content": text}
        found.append(Answer(row, message, settings.score.correction_score, "correction"))
    return found


def sft_examples(answers: list[Answer], settings: ExampleSettings) -> Iterator[Row]:
    """Answers good enough to imitate, and corrections."""
    for answer in answers:
        if answer.score < settings.sft_min_score or answer.truncated or not answer.text:
            continue
        if answer.origin == "correction" and not settings.sft_corrections:
            continue
        messages = [*orjson.loads(answer.row["messages"]), answer.message]
        yield _example("sft", [answer], messages=to_json(messages), score=answer.score)


def unpaired_examples(answers: list[Answer], settings: ExampleSettings) -> Iterator[Row]:
    """Answers that people judged, with their verdict; a correction is a good answer."""
    for answer in answers:
        explicit = answer.row["explicit"]
        if answer.origin == "correction":
            label = True if settings.unpaired_corrections else None
        else:
            label = None if not explicit else explicit > 0
        if label is None or answer.truncated or not answer.text:
            continue
        completion = to_json([answer.message])
        yield _example("unpaired", [answer], prompt=answer.row["messages"], completion=completion, label=label)


def preference_examples(answers: list[Answer], settings: ExampleSettings, dropped: Dropped) -> list[Row]:
    """Corrections against what they correct, then different answers to one question by score."""
    pairs = [
        (chosen, rejected, "correction")
        for chosen in answers
        for rejected in answers
        if chosen.origin == "correction" and rejected.origin == "answer" and chosen.row is rejected.row
    ]
    examples = [e for pair in pairs if (e := _pair(*pair, settings, dropped)) is not None]
    return examples + _question_pairs(answers, settings, dropped)


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
        origin = "same_query" if chosen.row["node"] == rejected.row["node"] else "similar_query"
        if (chosen.text, rejected.text) in seen:
            continue
        seen.add((chosen.text, rejected.text))
        example = _pair(chosen, rejected, origin, settings, dropped)
        if example is not None:
            made.append(example)
    return made


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
        chosen=to_json([chosen.message]),
        rejected=to_json([rejected.message]),
        margin=chosen.score - rejected.score,
        score=chosen.score,
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
    row = answers[0].row
    ids = sorted({i for answer in answers for i in answer.row["interaction_ids"]})
    content = {name: value for name, value in columns.items() if isinstance(value, str)}
    identity = to_json([kind, row["split"], ids, content])
    return {
        "kind": kind,
        "split": row["split"],
        "example_id": hashlib.sha256(identity.encode()).hexdigest()[:32],
        "user_id": row["user_id"],
        "interaction_ids": ids,
        "cluster_id": f"{row['cluster']:016x}",
        "agent": row["agent"],
        "tools": row["tools"],
        "weight": min(1.0, *(answer.row["weight"] for answer in answers)),
        "origin": answers[0].origin,
        "at_us": max(answer.row["at_us"] for answer in answers),
        "cluster": row["cluster"],
        "node": row["node"],
        "seen_in_test": row["seen_in_test"],
        **columns,
    }
