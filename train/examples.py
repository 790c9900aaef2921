"""Rows of a curated dataset become token ids, the same ids an engine sees.

Trainers get ids, never messages: `data.template` is the only way from one to the other.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from cluster.errors import DatasetError
from data.manifest import read_examples
from data.template import render_pair, render_with_mask

IGNORED = -100  # label outside the loss

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

    def unpaired(self, table: pa.Table) -> Encoded:
        """`prompt_ids`, `completion_ids` and `label`."""
        return self._encode(table, self._unpaired_row)

    def _encode(self, table: pa.Table, encode: Callable[[Row], tuple[Row, int, int]]) -> Encoded:
        encoded = [encode(row) for row in table.to_pylist()]
        fitting = [(row, answer) for row, total, answer in encoded if answer > 0]
        return Encoded(
            rows=[row for row, _ in fitting],
            truncated=sum(total > self.max_length for _, total, _ in encoded),
            dropped=len(encoded) - len(fitting),
            lengths=[answer for _, answer in fitting],
        )

    def _sft_row(self, row: Row) -> tuple[Row, int, int]:
        messages, tools = json.loads(row["messages"]), _tools(row)
        if self.sft_loss == "answer":
            prompt, answer = render_pair(self.tokenizer, messages[:-1], messages[-1:], tools)
            ids, labels = prompt + answer, [IGNORED] * len(prompt) + answer
        else:
            ids, mask = render_with_mask(self.tokenizer, messages, tools)
            labels = [i if self.sft_loss == "all" or m else IGNORED for i, m in zip(ids, mask, strict=True)]
        cut = {"input_ids": ids[: self.max_length], "labels": labels[: self.max_length]}
        return cut, len(ids), sum(label != IGNORED for label in cut["labels"])

    def _preference_row(self, row: Row) -> tuple[Row, int, int]:
        prompt, tools = json.loads(row["prompt"]), _tools(row)
        prompt_ids, chosen = render_pair(self.tokenizer, prompt, json.loads(row["chosen"]), tools)
        _, rejected = render_pair(self.tokenizer, prompt, json.loads(row["rejected"]), tools)
        room = max(0, self.max_length - len(prompt_ids))
        ids = {"prompt_ids": prompt_ids, "chosen_ids": chosen[:room], "rejected_ids": rejected[:room]}
        return ids, len(prompt_ids) + max(len(chosen), len(rejected)), len(chosen[:room])

    def _unpaired_row(self, row: Row) -> tuple[Row, int, int]:
        prompt_ids, completion = render_pair(
            self.tokenizer, json.loads(row["prompt"]), json.loads(row["completion"]), _tools(row)
        )
        kept = completion[: max(0, self.max_length - len(prompt_ids))]
        ids = {"prompt_ids": prompt_ids, "completion_ids": kept, "label": bool(row["label"])}
        return ids, len(prompt_ids) + len(completion), len(kept)


def _tools(row: Row) -> Any:
    return json.loads(row["tools"]) if row.get("tools") else None


def in_order(table: pa.Table) -> pa.Table:
    """Rows sorted by example id, so that neither files nor parallel readers decide the order."""
    return table.sort_by("example_id") if table.num_rows else table


def read_split(dataset: Path, kind: str, split: str) -> pa.Table:
    """One split of a curated dataset, in the order of example ids.

    Raises:
        NotFoundError: there is no dataset there.
        DatasetError: its files cannot be read.
    """
    try:
        return in_order(read_examples(dataset, kind, split))
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"dataset {str(dataset)!r} cannot be read ({error})") from None


def read_data(dataset: Path, kind: str) -> TrainData:
    """Train and validation rows of one kind, straight from the files."""
    liked = read_split(dataset, "sft", "train") if kind == "preference" else None
    return TrainData(read_split(dataset, kind, "train"), read_split(dataset, kind, "validation"), liked)


def check_data(method: str, data: TrainData, dataset: Path) -> None:
    """Refuse data that a method cannot learn from.

    Raises:
        DatasetError: no rows, or thumbs of one direction only.
    """
    kind = {"sft": "sft", "dpo": "preference", "kto": "unpaired"}[method]
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
    if method == "dpo":
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
