"""API keys for applications beside the router, which has them in its snapshot."""

import asyncio
import logging
import time
from typing import Any

from cluster.database import connect
from cluster.settings import Settings
from serve.keys import Key, KeyRing

log = logging.getLogger(__name__)


class KnownKeys:
    """API keys from the database, read again when older than `refresh_s`; a failure keeps the last ones."""

    def __init__(self, settings: Settings, refresh_s: float) -> None:
        self._settings, self._refresh_s = settings, refresh_s
        self._database: Any = None
        self._ring = KeyRing()
        self._read_at = float("-inf")
        self._reading = asyncio.Lock()

    async def find(self, secret: str) -> Key | None:
        """The key behind a secret."""
        async with self._reading:
            if time.monotonic() - self._read_at > self._refresh_s:
                self._read_at = time.monotonic()
                await asyncio.to_thread(self._read)
        return self._ring.find(secret)

    def _read(self) -> None:
        try:
            if self._database is None:
                self._database = connect(self._settings)
            self._ring = KeyRing.read(self._database)
        except Exception as error:  # whatever the database says, the keys known so far stay good
            log.warning("API keys could not be read (%s); the last known ones stay in use", error)
