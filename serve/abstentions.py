"""Tells the people who run this when graders abstain too often, which training only sees as missing rewards."""

import asyncio
import logging
from collections import Counter, deque

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from cluster.errors import RayloopError
from cluster.settings import Settings
from data.alerts import alert
from data.grading.types import GradeResult
from data.log import EventLog

log = logging.getLogger(__name__)


class AbstentionWatch:
    """The latest grades of one replica: why each of them was an abstention, or that it was none."""

    def __init__(self, share: float, window: int) -> None:
        self._share = share
        self._latest: deque[str | None] = deque(maxlen=window)

    def note(self, result: GradeResult) -> None:
        """Count a grade."""
        self._latest.append((result.error or "abstained") if result.reward is None else None)

    def breach(self) -> tuple[str, dict[str, int]] | None:
        """What is to be told, in words and as counts by cause; `None` below the share or before the window is full."""
        causes = Counter(cause for cause in self._latest if cause is not None)
        graded, most = len(self._latest), self._latest.maxlen
        if graded != most or causes.total() <= self._share * graded:
            return None
        return f"{causes.total()} of the latest {graded} grades: {causes.most_common(1)[0][0]} most of all", dict(
            causes
        )


class AbstentionAlerts:
    """Writes the alert `abstentions` while a watch is in breach; once in a while, by the event's id."""

    def __init__(self, settings: Settings, database: Engine) -> None:
        self._settings, self._log = settings, EventLog(database)
        self._loop: asyncio.Task[None] | None = None

    def start(self, watch: AbstentionWatch) -> None:
        """Begin, on the running event loop."""
        self._loop = asyncio.ensure_future(self._repeat(watch))

    async def close(self) -> None:
        """Stop."""
        if self._loop is not None:
            self._loop.cancel()
            await asyncio.gather(self._loop, return_exceptions=True)

    async def _repeat(self, watch: AbstentionWatch) -> None:
        while True:
            await asyncio.sleep(self._settings.grader.abstention_check_s)
            try:
                await asyncio.to_thread(self.tell, watch)
            except (sa.exc.SQLAlchemyError, RayloopError) as error:
                log.warning("abstentions are not told of (%s)", str(error).splitlines()[0])

    def tell(self, watch: AbstentionWatch) -> None:
        """Write the alert, where there is one."""
        if (found := watch.breach()) is not None:
            self._log.append([alert(self._settings, "abstentions", *found)])
