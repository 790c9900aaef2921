"""Answers to questions, and the columns of what is made of them."""

import hashlib
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import orjson
import pyarrow as pa

from cluster.settings.curation import CurationSettings
from data.dedup import normalise_text
from data.interaction_bodies import Message
from data.join import to_json
from data.stages import Row
from data.template import content_text

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


def task_category(row: Row) -> str | None:
    """What most reviewers call the task; the first in the alphabet among equals."""
    if row["labels"] == NONE:
        return None
    named = Counter(c for label in orjson.loads(row["labels"]) if (c := label.get("task_category")))
    return min(named, key=lambda name: (-named[name], name)) if named else None


def example_of(kind: str, answers: list[Answer], **columns: Any) -> Row:
    """One row of `EXAMPLES`, made of these answers; its id follows from what it says."""
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
