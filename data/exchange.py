"""Tasks over blocks of rows, and the exchange that brings all rows of a key into one block.

The pieces of an exchange lie in Ray's object store, which moves to disk what does not fit, so memory stays that of a
block a task. The keyed repartition of Ray Data keeps everything in the heaps of actors until its last row has come, and
starts these actors anew each time (docs/decisions/0036).
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import ray
from numpy.typing import NDArray

from data.memory import tidy
from data.minhash import mix

Blocks = Sequence[Any]
"""References to Arrow tables in the object store."""
Places = NDArray[np.int64]
"""The part of each row, from 0."""
MOST_PIECES = 4096
"""Pieces of one round of an exchange: the driver remembers each with some 10 kB, until what is made of it is gone."""


@dataclass(frozen=True, slots=True)
class Tasks:
    """Runs functions on blocks; references among their arguments are resolved before a task starts."""

    num_cpus: float
    """Logical CPUs of one task."""
    parts: int
    """Blocks that an exchange makes."""

    def each(self, blocks: Blocks, function: Callable[..., Any], *shared: Any) -> list[Any]:
        """A reference to `function(block, *shared)` for each block."""
        task = ray.remote(run).options(num_cpus=self.num_cpus)
        return [task.remote(function, block, *shared) for block in blocks]

    def zipped(self, *blocks: Blocks, function: Callable[..., Any]) -> list[Any]:
        """A reference to `function(a, b, …)` for the first blocks of each sequence, the second ones, and so on."""
        task = ray.remote(run).options(num_cpus=self.num_cpus)
        return [task.remote(function, *row) for row in zip(*blocks, strict=True)]

    def gathered(self, blocks: Blocks, function: Callable[..., Any]) -> Any:
        """A reference to `function(*blocks)`."""
        return ray.remote(run).options(num_cpus=self.num_cpus).remote(function, *blocks)

    def exchange(
        self,
        blocks: Sequence[Any],
        key: str,
        *shared: Any,
        before: Callable[..., pa.Table] | None = None,
        after: Callable[[pa.Table], pa.Table] | None = None,
    ) -> list[Any]:
        """`parts` blocks with the same rows, all rows of a key in one of them; null is a key.

        With `before`, the rows are what `before(block, *shared)` makes of each block, in the task that cuts it; with
        `after`, blocks are what it makes of each of those, in the task that joins it.
        """
        place = partial(_part_of_key, key=key, parts=self.parts)
        return self.dealt(blocks, place, self.parts, *shared, before=before, after=after)

    def dealt(
        self,
        blocks: Sequence[Any],
        place: Callable[[pa.Table], Places],
        parts: int,
        *shared: Any,
        before: Callable[..., pa.Table] | None = None,
        after: Callable[[pa.Table], pa.Table] | None = None,
    ) -> list[Any]:
        """The same with the rows that `place(table)` gives each part.

        Every block is cut into a piece a part. Where that makes more than `MOST_PIECES`, there are two rounds: some
        blocks at a time are cut for groups of parts, and what a group has got then for each of its parts.
        """
        if len(blocks) * parts <= MOST_PIECES:
            return self._round(blocks, partial(_cut, place, parts, before), parts, shared, after)
        size, some = math.isqrt(parts), math.isqrt(len(blocks))
        groups = -(-parts // size)
        coarse, fine = partial(_group_of, place, size), partial(_place_in_group, place, size)
        batches = (blocks[at : at + some] for at in range(0, len(blocks), some))
        cut = partial(_cut, coarse, groups, before)
        first = [self._round(few, cut, groups, shared) for few in batches]
        made = []
        for group, pieces in enumerate(zip(*first, strict=True)):
            own = min(size, parts - group * size)
            made += self._round(pieces, partial(_cut, fine, own, None), own, after=after)
        return made

    def _round(
        self,
        blocks: Sequence[Any],
        cut: Callable[..., Any],
        parts: int,
        shared: Sequence[Any] = (),
        after: Callable[[pa.Table], pa.Table] | None = None,
    ) -> list[Any]:
        task = ray.remote(run).options(num_cpus=self.num_cpus, num_returns=parts)
        made = [task.remote(cut, block, *shared) for block in blocks]
        pieces = [[one] for one in made] if parts == 1 else made
        return [self.gathered(column, partial(_join, after=after)) for column in zip(*pieces, strict=True)]


def parts_of(column: pa.ChunkedArray, parts: int) -> Places:
    """The part of each key, from 0: the same in every process."""
    if pa.types.is_integer(column.type):
        hashed = mix(pc.fill_null(column, 0).to_numpy().astype(np.uint64))
    else:
        hashed = pd.util.hash_array(pc.fill_null(column, "").to_numpy(), categorize=False)
    return (hashed % np.uint64(parts)).astype(np.int64)


def _part_of_key(table: pa.Table, key: str, parts: int) -> Places:
    return parts_of(table[key], parts)


def _group_of(place: Callable[[pa.Table], Places], size: int, table: pa.Table) -> Places:
    return place(table) // size


def _place_in_group(place: Callable[[pa.Table], Places], size: int, table: pa.Table) -> Places:
    return place(table) % size


def _cut(
    place: Callable[[pa.Table], Places], parts: int, before: Callable[..., pa.Table] | None, block: Any, *shared: Any
) -> Any:
    """A table for each part; where there is one part, that table."""
    table = block if before is None else before(block, *shared)
    if parts == 1:
        return table
    if not table.column_names:  # Ray Data's block without rows, which has no columns either
        return [table] * parts
    places = place(table)
    order = np.argsort(places, kind="stable")
    edges = np.searchsorted(places[order], np.arange(parts + 1)).tolist()
    ordered = table.take(order)  # once: each take of a column in several chunks would join them anew
    return [ordered.slice(begin, end - begin) for begin, end in itertools.pairwise(edges)]


def _join(*pieces: pa.Table, after: Callable[[pa.Table], pa.Table] | None) -> pa.Table:
    whole = [piece for piece in pieces if piece.column_names]
    table = pa.concat_tables(whole) if whole else pieces[0]
    return table.combine_chunks() if after is None else after(table)


def run(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)`, as the body of a task."""
    with tidy():
        return function(*arguments)
