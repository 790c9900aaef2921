"""What is done to blocks of rows: functions one after the other, and references to what comes of them."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from data.memory import give_back
from data.stages import join_counts, split_counts

ROWS_AT_ONCE = 8_000


def apply(block: Any, functions: Sequence[Callable[[Any], Any]]) -> Any:
    """What functions, one after the other, make of a block."""
    for function in functions:
        block = function(block)
    return block


def apply_to_rows(block: pa.Table, functions: Sequence[Callable[[Any], Any]], together: str | None = None) -> pa.Table:
    """The same for functions that look at each row alone, or at those of equal `together`: some rows at a time, so that
    what lies between two functions is small, and fewer rows are held as Python's."""
    rows, counts = split_counts(block)
    made = []
    for some in _some_at_once(rows, together):
        done, counted = split_counts(apply(some, functions))
        made.append(done)
        counts += counted
        give_back()
    return join_counts(in_one_piece(made), counts)


def in_one_piece(tables: list[pa.Table]) -> pa.Table:
    """Tables one after the other, a column at a time, so that two copies of all are never held; empties the list."""
    whole = pa.concat_tables(tables)
    tables.clear()
    columns = dict(zip(whole.column_names, whole.columns, strict=True))
    del whole
    for name in columns:
        columns[name] = columns[name].combine_chunks()
    return pa.table(columns)


def _some_at_once(rows: pa.Table, together: str | None) -> Iterator[pa.Table]:
    number = -(-len(rows) // ROWS_AT_ONCE)
    if number < 2:
        yield rows
    elif together is None:
        yield from (rows.slice(at * ROWS_AT_ONCE, ROWS_AT_ONCE) for at in range(number))
    else:
        keys, rank = np.unique(rows[together].to_numpy(), return_inverse=True)
        part = rank * number // len(keys)
        yield from (rows.take(np.flatnonzero(part == at)) for at in range(number))


def without_counts(table: pa.Table) -> pa.Table:
    """The rows that are examples or interactions."""
    return split_counts(table)[0]


def of_rows(table: pa.Table, function: Callable[..., Any], *shared: Any) -> Any:
    """The function's result for a block without its counting rows."""
    return function(without_counts(table), *shared)


def read_each(references: Sequence[Any]) -> Iterator[Any]:
    """What references stand for, one in memory at a time."""
    return map(ray.get, references)
