"""How the client reaches a service: one POST, or a call that ends by its deadline whatever the service does.

The standard library only: this runs inside other people's agents.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from cluster.errors import UnavailableError
from cluster.http_post import Answer, post

T = TypeVar("T")


class UnreachableError(Exception):
    """No usable answer. `retry_after_s`: what an overloaded service asked us to wait."""

    def __init__(self, reason: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class Remote:
    """One service: its address and the key it wants."""

    url: str
    api_key: str | None = None

    def post(self, path: str, body: bytes, timeout_s: float) -> Answer:
        """Send JSON, take the answer. `timeout_s` bounds each wait on the connection, not their sum.

        Raises:
            UnreachableError: nothing there, or it fell silent, broke off or answered far too much.
        """
        headers = {"user-agent": "rayloop-client"}
        if self.api_key:
            headers["authorization"] = f"Bearer {self.api_key}"
        try:
            return post(self.url + path, body, headers, timeout_s)
        except UnavailableError as error:
            raise UnreachableError(str(error)) from None


class DeadlineCalls(Generic[T]):
    """Runs calls in threads of their own and stops waiting at the deadline.

    A socket's timeout starts again with every byte and a name look-up has none, so only somebody outside the
    call can hold a deadline. A call that is given up runs on until its own timeouts end it; at most `limit`
    do so at a time, further ones are refused at once.
    """

    def __init__(self, limit: int) -> None:
        self._free = threading.BoundedSemaphore(limit)

    def run(self, call: Callable[[], T], timeout_s: float) -> T:
        """The result of `call`.

        Raises:
            UnreachableError: it takes longer than `timeout_s`, too many calls hang already, or the call said so.
        """
        free = self._free
        if not free.acquire(blocking=False):
            raise UnreachableError("too many calls hang already")
        results: list[T] = []
        failures: list[BaseException] = []

        def work() -> None:
            try:
                results.append(call())
            except BaseException as error:
                failures.append(error)
            finally:
                free.release()

        thread = threading.Thread(target=work, name="rayloop-call", daemon=True)
        thread.start()
        thread.join(timeout_s)
        if failures:
            raise failures[0]
        if not results:
            raise UnreachableError(f"no answer within {timeout_s:g} s")
        return results[0]
