"""What is done to blocks of rows: functions one after the other in a task, and references to what comes of them."""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import ray

from data.memory import give_back
from data.stages import split_counts


def apply(block: Any, functions: Sequence[Callable[[Any], Any]]) -> pa.Table:
    """What functions, one after the other, make of a block."""
    give_back()
    with _no_collection():
        for function in functions:
            block = function(block)
        return block


@contextmanager
def _no_collection() -> Iterator[None]:
    """Rows are lists and dicts without cycles, by the hundred thousand: looking for cycles cost a third of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def without_counts(table: pa.Table) -> pa.Table:
    """The rows that are examples or interactions."""
    return split_counts(table)[0]


def with_rows(dataset: Any) -> list[Any]:
    """References to the blocks that hold rows: Ray Data's empty ones have no columns either."""
    bundles = dataset.iter_internal_ref_bundles()
    return [block.ref for bundle in bundles for block in bundle.blocks if block.metadata.num_rows]


def of_rows(table: pa.Table, function: Callable[..., Any], *shared: Any) -> Any:
    """The function's result for a block without its counting rows."""
    return function(without_counts(table), *shared)


def read_each(references: Sequence[Any]) -> Iterator[Any]:
    """What references stand for, one in memory at a time."""
    return map(ray.get, references)
