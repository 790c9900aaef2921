"""Rows of a curated dataset become token ids, the same ids an engine sees.

Trainers get ids, never messages: `data.template` is the only way from one to the other.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from cluster.errors import DatasetError
from cluster.settings.training import HeadWeights
from data.interaction_bodies import Message
from data.manifest import read_examples
from data.prompt import with_other_prompt
from data.template import content_text, render, render_pair, render_with_mask
from data.tool_calls import describe_call, recorded_results
from train.config import TrainedPrompt

IGNORED = -100  # label outside the loss
HEADS = tuple(HeadWeights.model_fields)
"""What reviewers score, in the order of a score-card model's outputs."""

Row = dict[str, Any]


@dataclass(frozen=True)
class TrainData:
    """The tables of one run, in a fixed order."""

    train: pa.Table
    validation: pa.Table
    liked: pa.Table | None = None
    """Training rows of kind `sft`: what people liked, against which pairs are checked."""


@dataclass(frozen=True)
class Encoded:
    """Tokenised rows of one split."""

    rows: list[Row]
    truncated: int = 0
    """How many did not fit `max_length`; those are cut, or dropped when their answer is lost."""
    dropped: int = 0
    lengths: list[int] = field(default_factory=list)
    """Answer lengths in tokens (of the chosen one, for pairs)."""
    kept: list[int] = field(default_factory=list)
    """Where each row stands in the table it was made from."""


@dataclass(frozen=True)
class Encoder:
    """How one method's rows are made."""

    tokenizer: Any
    max_length: int
    sft_loss: str = "answer"

    def sft(self, table: pa.Table) -> Encoded:
        """`input_ids` and `labels`."""
        return self._encode(table, self._sft_row)

    def preference(self, table: pa.Table) -> Encoded:
        """`prompt_ids`, `chosen_ids` and `rejected_ids`."""
        return self._encode(table, self._preference_row)

    def scored(self, table: pa.Table) -> Encoded:
        """`chosen_ids` and `rejected_ids`, each with the prompt before the answer."""
        encoded = self._encode(table, self._preference_row)
        rows = [
            {
                "chosen_ids": row["prompt_ids"] + row["chosen_ids"],
                "rejected_ids": row["prompt_ids"] + row["rejected_ids"],
            }
            for row in encoded.rows
        ]
        return replace(encoded, rows=rows)

    def cards(self, table: pa.Table) -> Encoded:
        """`input_ids`, `labels` (the four scores of `train.score_card`) and the task `category`."""
        return self._encode(with_scores(table), self._card_row)

    def prompts(self, table: pa.Table) -> Encoded:
        """`prompt`, its ids as JSON text, and `item`, what a grader knows of it, as JSON text.

        From trajectories, `prompt` holds the tools and the recorded results of their calls as well. Tasks have no
        answer to take a length of.
        """
        if "item" in table.column_names:
            return replace(self._encode(table, self._task_row), lengths=[])
        played = "trajectory" in table.column_names
        return self._encode(table, self._played_row if played else self._prompt_row)

    def unpaired(self, table: pa.Table) -> Encoded:
        """`prompt_ids`, `completion_ids` and `label`."""
        return self._encode(table, self._unpaired_row)

    def _encode(self, table: pa.Table, encode: Callable[[Row], tuple[Row, int, int]]) -> Encoded:
        encoded = [_readable(encode, row) for row in table.to_pylist()]
        kept = [place for place, (_, _, answer) in enumerate(encoded) if answer > 0]
        return Encoded(
            rows=[encoded[place][0] for place in kept],
            truncated=sum(total > self.max_length for _, total, _ in encoded),
            dropped=len(encoded) - len(kept),
            lengths=[encoded[place][2] for place in kept],
            kept=kept,
        )

    def _sft_row(self, row: Row) -> tuple[Row, int, int]:
        messages, tools = _messages(row["messages"]), _tools(row)
        if self.sft_loss == "answer":
            prompt, answer = render_pair(self.tokenizer, messages[:-1], messages[-1:], tools)
            ids, labels = prompt + answer, [IGNORED] * len(prompt) + answer
        else:
            ids, mask = render_with_mask(self.tokenizer, messages, tools)
            labels = [i if self.sft_loss == "all" or m else IGNORED for i, m in zip(ids, mask, strict=True)]
        cut = {"input_ids": ids[: self.max_length], "labels": labels[: self.max_length]}
        return cut, len(ids), sum(label != IGNORED for label in cut["labels"])

    def _preference_row(self, row: Row) -> tuple[Row, int, int]:
        prompt, tools = _messages(row["prompt"]), _tools(row)
        prompt_ids, chosen = render_pair(self.tokenizer, prompt, _messages(row["chosen"]), tools)
        _, rejected = render_pair(self.tokenizer, prompt, _messages(row["rejected"]), tools)
        room = max(0, self.max_length - len(prompt_ids))
        ids = {"prompt_ids": prompt_ids, "chosen_ids": chosen[:room], "rejected_ids": rejected[:room]}
        return ids, len(prompt_ids) + max(len(chosen), len(rejected)), len(chosen[:room])

    def _card_row(self, row: Row) -> tuple[Row, int, int]:
        prompt, answer = render_pair(self.tokenizer, _messages(row["prompt"]), _messages(row["response"]), _tools(row))
        ids = prompt + answer
        cut = {"input_ids": ids[: self.max_length], "labels": scores_of(row["score_card"]), "category": row["category"]}
        return cut, len(ids), max(0, self.max_length - len(prompt)) and len(answer)

    def _prompt_row(self, row: Row) -> tuple[Row, int, int]:
        messages = _messages(row["messages"])
        ids, answer = render_pair(self.tokenizer, messages[:-1], messages[-1:], _tools(row))
        item = {
            "reference": content_text(messages[-1]),
            "messages": messages[:-1],
            "example_id": row["example_id"],
        }
        fits = len(ids) < self.max_length
        return {"prompt": json.dumps(ids), "item": json.dumps(item)}, len(ids), len(answer) if fits else 0

    def _task_row(self, row: Row) -> tuple[Row, int, int]:
        messages = _messages(row["prompt"])
        ids = render(self.tokenizer, messages, _tools(row), add_generation_prompt=True)
        item = {"example_id": row["example_id"], **json.loads(row["item"]), "messages": messages}
        return {"prompt": json.dumps(ids), "item": json.dumps(item)}, len(ids), int(len(ids) < self.max_length)

    def _played_row(self, row: Row) -> tuple[Row, int, int]:
        prompt, tools = _messages(row["prompt"]), _tools(row)
        said = _messages(row["trajectory"])
        results = recorded_results(said)
        names = [(tool.get("function") or tool)["name"] for tool in tools or []]
        ids = render(self.tokenizer, prompt, tools, add_generation_prompt=True)
        shown = {"ids": ids, "tools": names, "results": [[c.name, c.arguments, r] for c, r in results]}
        last = next((m for m in reversed(said) if m["role"] == "assistant"), {})
        item = {
            "reference": content_text(last),
            "messages": prompt,
            "example_id": row["example_id"],
            "recorded_tools": [describe_call(call) for call, _ in results],
            "recorded_reward": row["reward"],
        }
        written = render(self.tokenizer, [*prompt, *said], tools)[len(ids) :]
        fits = len(ids) < self.max_length
        return {"prompt": json.dumps(shown), "item": json.dumps(item)}, len(ids), len(written) if fits else 0

    def _unpaired_row(self, row: Row) -> tuple[Row, int, int]:
        prompt_ids, completion = render_pair(
            self.tokenizer, _messages(row["prompt"]), _messages(row["completion"]), _tools(row)
        )
        kept = completion[: max(0, self.max_length - len(prompt_ids))]
        ids = {"prompt_ids": prompt_ids, "completion_ids": kept, "label": bool(row["label"])}
        return ids, len(prompt_ids) + len(completion), len(kept)


def _readable(encode: Callable[[Row], tuple[Row, int, int]], row: Row) -> tuple[Row, int, int]:
    """One encoded row; a cell that is no conversation names its example instead of a line of ours."""
    try:
        return encode(row)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        if isinstance(error, DatasetError):
            raise DatasetError(f"example {row['example_id']!r}: {error}") from error
        raise DatasetError(
            f"example {row['example_id']!r} is not a conversation with an answer "
            f"({type(error).__name__}: {error}); curate the dataset again"
        ) from error


def _messages(cell: str) -> list[Message]:
    """The messages in a cell.

    Raises:
        ValueError: it holds no list of them.
    """
    messages = json.loads(cell)
    if not isinstance(messages, list) or not messages:
        raise ValueError("not a list of messages")
    if not all(isinstance(message, dict) and isinstance(message.get("role"), str) for message in messages):
        raise ValueError("a message is no object with a role")
    return messages


def _tools(row: Row) -> Any:
    return json.loads(row["tools"]) if row.get("tools") else None


def scores_of(card: str | None) -> list[float]:
    """The four scores in a cell `score_card`; `nan` where the card has none."""
    found = json.loads(card) if card else {}
    return [float(found.get(head, float("nan"))) for head in HEADS]


def with_scores(table: pa.Table) -> pa.Table:
    """The rows whose card has at least one of the four."""
    keep = [any(score == score for score in scores_of(card)) for card in table.column("score_card").to_pylist()]
    return table.filter(pa.array(keep, pa.bool_()))


def in_order(table: pa.Table) -> pa.Table:
    """Rows sorted by example id, so that neither files nor parallel readers decide the order."""
    return table.sort_by("example_id") if table.num_rows else table


def read_split(dataset: Path, kind: str, split: str) -> pa.Table:
    """One split of a curated dataset, in the order of example ids.

    Raises:
        NotFoundError: there is no dataset there.
        DatasetError: its files cannot be read.
    """
    return in_order(read_examples(dataset, kind, split))


def read_data(dataset: Path, kind: str) -> TrainData:
    """Train and validation rows of one kind, straight from the files."""
    liked = read_split(dataset, "sft", "train") if kind == "preference" else None
    return TrainData(read_split(dataset, kind, "train"), read_split(dataset, kind, "validation"), liked)


def under_prompt(data: TrainData, prompt: TrainedPrompt | None) -> TrainData:
    """The tables with the agent's prompt of now in front of every conversation."""
    if prompt is None:
        return data
    liked = None if data.liked is None else behind(data.liked, prompt)
    return TrainData(behind(data.train, prompt), behind(data.validation, prompt), liked)


def behind(table: pa.Table, prompt: TrainedPrompt) -> pa.Table:
    """One table with the prompt in front; its examples keep the digest of the one they were recorded behind."""
    name = "messages" if "messages" in table.column_names else "prompt"
    digests = table["prompt_digest"].to_pylist() if "prompt_digest" in table.column_names else [None] * len(table)
    cells = [_behind(cell, digest, prompt) for cell, digest in zip(table[name].to_pylist(), digests, strict=True)]
    return table.set_column(table.column_names.index(name), name, pa.array(cells, pa.string()))


def _behind(cell: str, digest: str | None, prompt: TrainedPrompt) -> str:
    """A cell that holds no conversation stays: whoever encodes it says so, with its example's id."""
    try:
        messages = _messages(cell)
    except ValueError:
        return cell
    return json.dumps(with_other_prompt(messages, prompt.recorded.get(digest or ""), prompt.text))


def check_data(method: str, kind: str, data: TrainData, dataset: Path) -> None:
    """Refuse data that a method cannot learn from.

    Raises:
        DatasetError: no rows, or thumbs of one direction only.
    """
    if not data.train.num_rows:
        raise DatasetError(f"dataset {dataset.name!r} has no {kind} examples to train on; collect more feedback")
    if method == "kto":
        labels = set(data.train.column("label").to_pylist())
        if len(labels) < 2:
            missing = "disliked" if True in labels else "liked"
            raise DatasetError(
                f"dataset {dataset.name!r} is one-sided: KTO needs liked and disliked answers, "
                f"there are no {missing} ones"
            )
    if method == "score_card" and not with_scores(data.train).num_rows:
        raise DatasetError(f"dataset {dataset.name!r} has no score cards of reviewers; label some answers")
    if kind == "preference":
        pairs = zip(data.train.column("chosen").to_pylist(), data.train.column("rejected").to_pylist(), strict=True)
        if all(chosen == rejected for chosen, rejected in pairs):
            raise DatasetError(
                f"dataset {dataset.name!r} is one-sided: every pair's chosen and rejected answers are equal"
            )


def with_kl_completions(rows: Sequence[Row], batch_size: int) -> list[Row]:
    """Rows with another row's completion beside their own, from which KTO estimates its KL term.

    The completions of one batch are rotated by one (Ethayarajh et al. 2024, section 4.2), so rows must
    be read in this order.
    """
    paired = []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        for index, row in enumerate(batch):
            paired.append({**row, "KL_completion_ids": batch[index - 1]["completion_ids"]})
    return paired
