"""What is done to blocks of rows: functions one after the other, and references to what comes of them."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import ray

from data.stages import join_counts, split_counts

ROWS_AT_ONCE = 8_000


def apply(block: Any, functions: Sequence[Callable[[Any], Any]]) -> Any:
    """What functions, one after the other, make of a block."""
    for function in functions:
        block = function(block)
    return block


def apply_to_rows(block: pa.Table, functions: Sequence[Callable[[Any], Any]]) -> pa.Table:
    """The same for functions that look at each row alone: some rows at a time, so that fewer are held as Python's."""
    rows, counts = split_counts(block)
    made = []
    for at in range(0, max(1, len(rows)), ROWS_AT_ONCE):
        done, counted = split_counts(apply(rows.slice(at, ROWS_AT_ONCE), functions))
        made.append(done)
        counts += counted
    return join_counts(pa.concat_tables(made).combine_chunks(), counts)


def without_counts(table: pa.Table) -> pa.Table:
    """The rows that are examples or interactions."""
    return split_counts(table)[0]


def of_rows(table: pa.Table, function: Callable[..., Any], *shared: Any) -> Any:
    """The function's result for a block without its counting rows."""
    return function(without_counts(table), *shared)


def read_each(references: Sequence[Any]) -> Iterator[Any]:
    """What references stand for, one in memory at a time."""
    return map(ray.get, references)
