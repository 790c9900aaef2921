"""Memory that a process has let go of and its allocators have kept.

A worker outlives its tasks by far: without this it holds the most that any of them needed, in pieces that fit no other.
"""

import ctypes
from functools import cache
from typing import Any

import pyarrow as pa


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
