"""What a stage of the curation pipeline is, and how its rows are counted.

A stage is a pure function from one Arrow table to another and a tally of what it dropped. Counts travel
with the rows, as extra rows that carry nothing else: a task that is run again after a worker died is
then counted once, which a counter on the side would not do.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.compute as pc

Dropped = Counter[str]
"""Reason -> rows."""
StageFunction = Callable[[pa.Table], tuple[pa.Table, Dropped]]
Row = dict[str, Any]
ROWS_AT_ONCE = 1000
COUNTS = "counts"
"""Column that is null in rows, and in a counting row holds JSON `{stage, rows_in, rows_out, dropped}`."""


@dataclass(frozen=True)
class StageCount:
    """What one stage did, summed over all blocks."""

    name: str
    rows_in: int
    rows_out: int
    dropped: dict[str, int]


@dataclass(frozen=True)
class Stage:
    """A named stage."""

    name: str
    run: StageFunction

    def __call__(self, table: pa.Table) -> pa.Table:
        """The stage on one block; counting rows of earlier stages pass through."""
        rows, counts = split_counts(table)
        result, dropped = self.run(rows)
        line = {"stage": self.name, "rows_in": len(rows), "rows_out": len(result), "dropped": dict(dropped)}
        return join_counts(result, [*counts, orjson.dumps(line).decode()])


def split_counts(table: pa.Table) -> tuple[pa.Table, list[str]]:
    """The rows of a block without the column of counts, and its counting rows."""
    if COUNTS not in table.column_names:
        return table, []
    counts = table[COUNTS].drop_null().to_pylist()
    rows, last = table.slice(0, len(table) - len(counts)), table[COUNTS].slice(len(table) - len(counts))
    if last.null_count:  # pieces of several blocks; else the counting rows stand at the end and nothing is copied
        rows = table.filter(pc.is_null(table[COUNTS]))
    return rows.drop_columns([COUNTS]), counts


def join_counts(table: pa.Table, counts: list[str]) -> pa.Table:
    """The reverse of `split_counts`."""
    nulls = {field.name: pa.nulls(len(counts), field.type) for field in table.schema}
    plain = table.append_column(COUNTS, pa.nulls(len(table), pa.string()))
    counting = pa.table({**nulls, COUNTS: pa.array(counts, pa.string())}, schema=plain.schema)
    return pa.concat_tables([plain, counting])


def sum_counts(lines: Iterable[str], order: list[str]) -> list[StageCount]:
    """The counting rows of all blocks added up, in the order of the stages that ran."""
    totals: dict[str, tuple[int, int, Counter[str]]] = {}
    for text in lines:
        line: dict[str, Any] = orjson.loads(text)
        rows_in, rows_out, dropped = totals.get(line["stage"], (0, 0, Counter()))
        dropped.update(line["dropped"])
        totals[line["stage"]] = (rows_in + line["rows_in"], rows_out + line["rows_out"], dropped)
    return [
        StageCount(name, totals[name][0], totals[name][1], dict(sorted(totals[name][2].items())))
        for name in order
        if name in totals
    ]


def rows_of(table: pa.Table) -> Iterator[Row]:
    """The rows as dicts, a few at a time: memory that is soon used again costs no page fault."""
    for batch in table.to_batches(max_chunksize=ROWS_AT_ONCE):
        names = batch.schema.names
        for values in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            yield dict(zip(names, values, strict=True))


def table_of(rows: Iterable[Row], schema: pa.Schema) -> pa.Table:
    """The reverse of `rows_of`."""
    source = iter(rows)
    chunks = iter(lambda: list(islice(source, ROWS_AT_ONCE)), [])
    return pa.Table.from_batches((pa.RecordBatch.from_pylist(chunk, schema) for chunk in chunks), schema)


def keep(table: pa.Table, reasons: list[str | None]) -> tuple[pa.Table, Dropped]:
    """The rows whose reason is `None`, and a tally of the other reasons."""
    if not any(reasons):
        return table, Counter()
    kept = pa.array([reason is None for reason in reasons], pa.bool_())
    return table.filter(kept), Counter(reason for reason in reasons if reason is not None)


def with_column(table: pa.Table, name: str, values: Any, type_: pa.DataType | None = None) -> pa.Table:
    """The table with a column added or replaced."""
    column = values if isinstance(values, pa.Array | pa.ChunkedArray) else pa.array(values, type_)
    if name in table.column_names:
        return table.set_column(table.column_names.index(name), name, column)
    return table.append_column(name, column)
