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

MMAP_THRESHOLD = -3, 4 * 2**20
"""`M_MMAP_THRESHOLD` of `mallopt`: larger pieces are the system's again as soon as they are free. The GNU C library
raises it to 32 MB by itself, and keeps twice as much that is free."""


@contextmanager
def tidy() -> Iterator[None]:
    """The block begins and ends without what it or others have left, and no cycles are looked for in it: rows are lists
    and dicts without any, by the hundred thousand, and looking cost a third of the time."""
    _return_large_pieces()
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
    trim = _libc("malloc_trim")
    if trim is not None:
        trim(0)


@cache
def _return_large_pieces() -> None:
    """From now on; Arrow's own allocator kept as much again as a stage needed."""
    pa.set_memory_pool(pa.system_memory_pool())
    set_option = _libc("mallopt")
    if set_option is not None:
        set_option(*MMAP_THRESHOLD)


def _libc(name: str) -> Any:
    """A function of the GNU C library; `None` where there is another one."""
    return getattr(ctypes.CDLL(None), name, None)
