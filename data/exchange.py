"""All rows of a key in one block: tasks that cut blocks into pieces, and tasks that join the pieces.

The pieces lie in Ray's object store, which moves to disk what does not fit, so memory stays that of a block a
task. The keyed repartition of Ray Data keeps everything in the heaps of actors until its last row has come, and
starts these actors anew each time (docs/decisions/0036).
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import ray
from numpy.typing import NDArray

from data.memory import give_back
from data.minhash import mix

Blocks = Sequence[Any]
"""References to Arrow tables in the object store."""


def each(blocks: Blocks, function: Callable[..., Any], *shared: Any, num_cpus: float) -> list[Any]:
    """A reference to `function(block, *shared)` for each block; references among `shared` are resolved."""
    task = ray.remote(_call).options(num_cpus=num_cpus)
    return [task.remote(function, block, *shared) for block in blocks]


def zipped(*blocks: Blocks, function: Callable[..., Any], num_cpus: float) -> list[Any]:
    """A reference to `function(a, b, …)` for the first blocks of each sequence, the second ones, and so on."""
    task = ray.remote(_call).options(num_cpus=num_cpus)
    return [task.remote(function, *row) for row in zip(*blocks, strict=True)]


def gathered(blocks: Blocks, function: Callable[..., Any], num_cpus: float) -> Any:
    """A reference to `function(*blocks)`."""
    return ray.remote(_call).options(num_cpus=num_cpus).remote(function, *blocks)


def exchange(
    blocks: Sequence[Any], key: str, parts: int, num_cpus: float, before: Callable[[Any], pa.Table] | None = None
) -> list[Any]:
    """`parts` blocks with the same rows, all rows of a key in one of them; null is a key.

    With `before`, the rows are what it makes of each block, in the task that cuts them.
    """
    if parts == 1:
        made = list(blocks) if before is None else each(blocks, before, num_cpus=num_cpus)
        return [gathered(made, _joined, num_cpus)] if len(made) > 1 else made
    cut = ray.remote(_cut).options(num_cpus=num_cpus, num_returns=parts)
    pieces = [cut.remote(block, key, parts, before) for block in blocks]
    return [gathered(column, _joined, num_cpus) for column in zip(*pieces, strict=True)]


def parts_of(column: pa.ChunkedArray, parts: int) -> NDArray[np.int16]:
    """The part of each key, from 0: the same in every process."""
    if pa.types.is_integer(column.type):
        hashed = mix(pc.fill_null(column, 0).to_numpy().astype(np.uint64))
    else:
        hashed = pd.util.hash_array(pc.fill_null(column, "").to_numpy(), categorize=False)
    return (hashed % np.uint64(parts)).astype(np.int16)


def _cut(block: Any, key: str, parts: int, before: Callable[[Any], pa.Table] | None) -> list[pa.Table]:
    give_back()
    table = block if before is None else before(block)
    if not table.column_names:  # Ray Data's block without rows, which has no columns either
        return [table] * parts
    place = parts_of(table[key], parts)
    order = np.argsort(place, kind="stable")
    edges = np.searchsorted(place[order], np.arange(parts + 1))
    return [table.take(order[begin:end]) for begin, end in itertools.pairwise(edges)]


def _joined(*pieces: pa.Table) -> pa.Table:
    whole = [piece for piece in pieces if piece.column_names]
    return pa.concat_tables(whole).combine_chunks() if whole else pieces[0]


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    give_back()
    return function(*arguments)
