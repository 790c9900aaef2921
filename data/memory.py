"""Memory that a process has let go of and its allocators have kept.

A worker outlives its tasks by far: without this it holds the most that any of them needed, in pieces that fit no other.
"""

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pyarrow as pa


@contextmanager
def tidy() -> Iterator[None]:
    """The block begins and ends without what it or others have left, and no cycles are looked for in it: rows are lists
    and dicts without any, by the hundred thousand, and looking cost a third of the time."""
    give_back()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        give_back()  # a worker may wait for long until its next task


def give_back() -> None:
    """Hand what is free to the operating system; costs milliseconds."""
    pa.default_memory_pool().release_unused()
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Any:
    """`malloc_trim` of the GNU C library; `None` where there is another one."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
