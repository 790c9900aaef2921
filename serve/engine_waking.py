"""Wakes engines that have no replica and are asked to hold a version they do not know.

A rollout waits until its candidate is loaded everywhere, and sends nothing before; so nobody's request would wake
the engine. One request to its health page does.
"""

import logging
import threading
import urllib.request
from collections.abc import Callable

from sqlalchemy.engine import Engine

from cluster.settings import Settings
from serve.servables import asleep

log = logging.getLogger(__name__)


class EngineWaker:
    """Asks sleeping engines for their health, each by one request at a time."""

    def __init__(self, settings: Settings, url_of: Callable[[str], str]) -> None:
        self._settings, self._url_of = settings, url_of
        self._asking: dict[str, threading.Thread] = {}

    def wake(self, database: Engine) -> set[str]:
        """Wake who must be woken, without waiting for it; returns their names."""
        if self._settings.engine.autoscaling.scale_to_zero == "never":
            return set()
        sleeping = asleep(database, live_after_s=self._settings.engine.live_after_s)
        for name in sleeping:
            if (asking := self._asking.get(name)) is None or not asking.is_alive():
                thread = threading.Thread(target=self._ask, args=(name,), name=f"wake-{name}", daemon=True)
                self._asking[name] = thread
                thread.start()
        return sleeping

    def _ask(self, name: str) -> None:
        url = f"{self._url_of(name)}/healthz"
        log.info("engine %s is asked to hold a version it does not know; waking it", name)
        try:
            with urllib.request.urlopen(url, timeout=self._settings.serve.start_timeout_s):
                pass
        except OSError as error:
            log.warning("engine %s could not be woken (%s); trying again", name, error)
