"""The workers of one run agree on what happened, so that none waits for another that has given up.

An error on one worker is told to the others as a value and raised on all of them. It travels through a group of
its own on the CPU, which waits for as long as the first worker may measure; without other workers nothing is sent.
"""

import datetime as dt
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, TypeVar

from cluster.errors import RayloopError, UnavailableError

T = TypeVar("T")
P = ParamSpec("P")
PATIENCE = dt.timedelta(hours=12)  # a worker that died is noticed at once, by its closed connection


def on_first(work: Callable[[], T]) -> T:
    """What `work` gives on the first worker, given to all of them; what it raises there is raised on all."""
    if not _several():
        return work()
    import torch.distributed as dist

    first = dist.get_rank() == 0
    own: _Outcome[T] = _attempt(work) if first else _Outcome()
    box: list[Any] = [own.told()]
    dist.broadcast_object_list(box, src=0, group=_group())
    return (own if first else box[0]).given()


def together(work: Callable[P, T]) -> Callable[P, T]:
    """`work`, which every worker calls for itself; what it raises on one of them is raised on all."""

    @functools.wraps(work)
    def call(*arguments: P.args, **named: P.kwargs) -> T:
        if not _several():
            return work(*arguments, **named)
        import torch.distributed as dist

        own = _attempt(lambda: work(*arguments, **named))
        told: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(told, own.told().error, group=_group())
        found = own.given()
        for error in told:
            if error is not None:
                raise error
        return found

    return call


@dataclass(frozen=True)
class _Outcome(Generic[T]):
    """What a piece of work came to."""

    value: T | None = None
    error: Exception | None = None

    def given(self) -> T:
        """The value; raises the error where there is one."""
        if self.error is not None:
            raise self.error
        return self.value  # type: ignore[return-value]

    def told(self) -> "_Outcome[T]":
        """The same as other processes can read it: not every error of a library survives the way."""
        if self.error is None or isinstance(self.error, RayloopError):
            return self
        return _Outcome(error=UnavailableError(f"another worker failed: {type(self.error).__name__}: {self.error}"))


def _attempt(work: Callable[[], T]) -> _Outcome[T]:
    try:
        return _Outcome(work())
    except Exception as error:  # told to the other workers, then raised
        return _Outcome(error=error)


def _several() -> bool:
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@functools.cache
def _group() -> Any:
    import torch.distributed as dist

    return dist.new_group(backend="gloo", timeout=PATIENCE)
