"""Recorded truth of the held-out split: what people liked or wrote themselves.

Nothing else decides which version is better: only feedback on prompts that no training has seen.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cluster.errors import DatasetError
from train.evaluate.types import Prompt, Truth, message_text

Row = Mapping[str, Any]
ORIGINS = {"answer": "liked", "label": "correction"}
"""The dataset's word for where an answer comes from, and ours."""


def read_truths(dataset: Path, *, split: str = "test", limit: int) -> list[Truth]:
    """Truths of one split, at most `limit`, chosen by a hash of their ids so that order does not matter.

    Raises:
        DatasetError: the dataset cannot be read.
    """
    from data.manifest import read_examples

    sft = read_examples(dataset, "sft", split).to_pylist()
    pairs = read_examples(dataset, "preference", split).to_pylist()
    return choose(make_truths(sft, pairs), limit)


def make_truths(sft: Iterable[Row], preference: Iterable[Row] = ()) -> list[Truth]:
    """One truth a prompt and answer, the rows of `sft` first.

    Of the pairs only corrections are read: what else a pair prefers is an answer that `sft` has too.
    """
    by_content: dict[tuple[str, str], Truth] = {}
    for truth in (*_from_sft(sft), *_from_preference(preference)):
        key = (json.dumps(truth.prompt.messages, sort_keys=True), truth.reference)
        by_content.setdefault(key, truth)
    return sorted(by_content.values(), key=lambda truth: truth.example_id)


def choose(truths: list[Truth], limit: int) -> list[Truth]:
    """At most `limit` of them, always the same ones."""
    by_hash = sorted(truths, key=lambda truth: hashlib.sha256(truth.example_id.encode()).digest())
    return sorted(by_hash[:limit], key=lambda truth: truth.example_id)


def _from_sft(rows: Iterable[Row]) -> Iterator[Truth]:
    for row in rows:
        *prompt, answer = _said(row, "messages")
        if answer.get("role") == "assistant" and (text := message_text(answer)).strip():
            yield _truth(row, prompt, text, ORIGINS.get(row["origin"], str(row["origin"])))


def _from_preference(rows: Iterable[Row]) -> Iterator[Truth]:
    for row in rows:
        text = message_text(_said(row, "chosen")[-1])
        if row["origin"] == "correction" and text.strip():
            yield _truth(row, _said(row, "prompt"), text, "correction")


def _said(row: Row, column: str) -> list[Any]:
    """The messages in a cell.

    Raises:
        DatasetError: it holds none; the error names the example.
    """
    try:
        messages = json.loads(row[column])
        if messages and all(isinstance(message, dict) for message in messages):
            return list(messages)
    except (ValueError, TypeError):
        pass
    raise DatasetError(f"example {row['example_id']!r}: `{column}` holds no messages; curate the dataset again")


def _truth(row: Row, prompt: list[Any], reference: str, origin: str) -> Truth:
    tools = json.loads(row["tools"]) if row.get("tools") else None
    asked = Prompt(tuple(prompt), tuple(tools) if tools else None)
    return Truth(str(row["example_id"]), str(row["user_id"]), asked, reference, origin)
