"""How many requests may be under way at once: one more is refused at once, in OpenAI's shape.

Serve itself lets any number wait for a free place, so each application counts its own, a little below Serve's limit.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from cluster import metrics
from serve.openai import ApiError

SPARE_REQUESTS = 64
"""Serve's limit stands this far above an application's, for what is answered or refused at once."""


@dataclass(slots=True)
class Places:
    """The places of one replica. Belongs to one event loop."""

    most: int
    retry_after_s: float
    taken: int = 0

    @contextmanager
    def one(self) -> Iterator[None]:
        """Hold a place.

        Raises:
            ApiError: 429, there is none.
        """
        if self.taken >= self.most:
            metrics.OVERLOADED.inc()
            message = f"{self.taken} requests are being answered already; try again later."
            raise ApiError(429, message, code="overloaded", retry_after_s=self.retry_after_s)
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1
