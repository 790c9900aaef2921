"""API keys for applications beside the router, which has them in its snapshot: who calls, and how often it may.

Keys are read again when they are older than `refresh_s`. Whoever comes meanwhile waits for a moment at most; while
the database is away the last known keys stay good.
"""

import asyncio
import logging
import time
from typing import Any

from cluster import metrics
from cluster.database import connect
from cluster.settings import Settings
from serve.asgi import bearer_key
from serve.keys import Key, KeyRing
from serve.limits import KeyLimits
from serve.openai import ApiError, Scope, Send, send_response

log = logging.getLogger(__name__)

FIRST_WAIT_S = 5.0  # for the first reading: the connection is made, and maybe the schema
WAIT_S = 0.5  # for a later one


class KnownKeys:
    """The keys of one replica of an application that has `replicas`. Belongs to one event loop."""

    def __init__(self, settings: Settings, refresh_s: float, replicas: int = 1) -> None:
        self._settings, self._refresh_s = settings, refresh_s
        self.limits = KeyLimits(settings.serve.limits, replicas)
        self._database: Any = None
        self._ring: KeyRing | None = None
        self._began_at = float("-inf")
        self._reading: asyncio.Task[None] | None = None

    async def find(self, secret: str) -> Key | None:
        """The key behind a secret.

        Raises:
            ApiError: 503, no keys have been read yet.
        """
        if self._reading is None and time.monotonic() - self._began_at > self._refresh_s:
            self._began_at = time.monotonic()
            self._reading = asyncio.ensure_future(asyncio.to_thread(self._read))
            self._reading.add_done_callback(self._ended)
        if self._reading is not None:
            left_s = self._began_at + (FIRST_WAIT_S if self._ring is None else WAIT_S) - time.monotonic()
            await asyncio.wait([self._reading], timeout=max(0.0, left_s))
        if self._ring is None:
            retry_after_s = self._settings.serve.retry_after_s
            message = "Keys have not been read yet; the database does not answer."
            raise ApiError(503, message, code="not_ready", retry_after_s=retry_after_s)
        return self._ring.find(secret)

    async def admit(self, scope: Scope, needed: str | None = None) -> Key:
        """The caller's key, which must carry the scope `needed`; one request of it is counted.

        Raises:
            ApiError: 401, 403, 429 by its limits, or 503.
        """
        key = await bearer_key(scope, self.find, needed)
        self.limits.admit(key)
        return key

    async def send_metrics(self, scope: Scope, send: Send) -> None:
        """Answer `/metrics`, which names every tenant: to an admin of the tenant that runs the installation.

        Raises:
            ApiError: another key, and `serve.open_metrics` is off.
        """
        if not self._settings.serve.open_metrics:
            key = await self.admit(scope, "admin")
            if key.tenant != self._settings.tenant:
                raise ApiError(403, f"The key {key.name} is of another tenant.", code="insufficient_scope")
        await send_response(send, 200, metrics.exposition(), [metrics.CONTENT_TYPE])

    def close(self) -> None:
        """Drop the connections to the database."""
        if self._database is not None:
            self._database.dispose()

    def _ended(self, _reading: "asyncio.Task[None]") -> None:
        self._reading = None

    def _read(self) -> None:
        try:
            if self._database is None:
                self._database = connect(self._settings)
            self._ring = KeyRing.read(self._database)
            self.limits.exchange(self._database)
        except Exception as error:  # whatever the database says, the keys known so far stay good
            log.warning("API keys could not be read (%s); the last known ones stay in use", error)
