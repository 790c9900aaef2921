"""What one key may use: requests a minute and tokens a day.

Requests are held in a bucket per key and replica, filled at the key's share of this replica, so nothing is
asked of anybody. Tokens are counted here and added up in the database with every poll of the snapshot, so the
budget is the same on every replica, up to what was spent since the last poll and what is still being answered.
"""

import threading
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from cluster import metrics
from cluster.database import write
from cluster.settings.serving import KeyLimitSettings
from cluster.tables import key_usage
from serve.keys import Key
from serve.openai import ApiError

KEPT_DAYS = 31
MINUTE_S = 60.0


@dataclass(slots=True)
class _Bucket:
    """Requests that may come now."""

    tokens: float
    filled_at: float


class KeyLimits:
    """The limits of all keys in one router replica. `admit` and `spend` are for the event loop."""

    def __init__(self, settings: KeyLimitSettings, replicas: int) -> None:
        self._settings, self._replicas = settings, replicas
        self._buckets: dict[str, _Bucket] = {}
        self._lock = threading.Lock()
        self._unsaved: dict[tuple[str, str], int] = defaultdict(int)
        self._spent: Mapping[str, int] = {}
        self._day = ""
        self._is_used = False

    def admit(self, key: Key, now: float | None = None) -> None:
        """Count one request of a key.

        Raises:
            ApiError: 429, its minute or its day is used up; `retry-after` says when to come again.
        """
        per_minute = key.requests_per_minute or self._settings.requests_per_minute
        if per_minute is not None:
            self._take(key.key_id, per_minute, time.monotonic() if now is None else now)

    def require_budget(self, key: Key) -> None:
        """Raises ApiError 429 when the key's tokens of this day are used up."""
        budget = self.budget_of(key)
        self._is_used = self._is_used or budget is not None
        if budget is None or self.spent_today(key.key_id) < budget:
            return
        metrics.LIMITED.labels("tokens_per_day").inc()
        raise ApiError(
            429, f"The key {key.name} has used up its {budget} tokens of this day (UTC).",
            code="insufficient_quota", type="insufficient_quota", retry_after_s=_until_midnight_s(), retry=False,
        )  # fmt: skip

    def budget_of(self, key: Key) -> int | None:
        """Tokens a day that the key may use, if there is a bound."""
        return key.tokens_per_day or self._settings.tokens_per_day

    def spend(self, key: Key, tokens: int) -> None:
        """Count tokens against a key's day."""
        if self.budget_of(key) is not None:
            with self._lock:
                self._unsaved[key.key_id, _today()] += tokens

    def spent_today(self, key_id: str) -> int:
        """Tokens used this day, by all replicas as of the last poll and by this one since."""
        today = _today()
        known = self._spent.get(key_id, 0) if self._day == today else 0
        return known + self._unsaved.get((key_id, today), 0)

    def exchange(self, engine: Engine) -> None:
        """Bring what was spent into the database and read the sums; off the event loop."""
        if not self._is_used:
            return
        today = _today()
        with self._lock:
            unsaved = dict(self._unsaved)
        with write(engine).begin() if unsaved else engine.connect() as connection:
            for (key_id, day), tokens in unsaved.items():
                _add(connection, key_id, day, tokens)
            if unsaved:
                oldest = (datetime.now(UTC) - timedelta(days=KEPT_DAYS)).strftime("%Y-%m-%d")
                connection.execute(key_usage.delete().where(key_usage.c.day < oldest))
            rows = connection.execute(sa.select(key_usage.c.key_id, key_usage.c.tokens).where(key_usage.c.day == today))
            spent: dict[str, int] = {row.key_id: row.tokens for row in rows}
        with self._lock:
            for place, tokens in unsaved.items():
                self._unsaved[place] -= tokens
                if not self._unsaved[place]:
                    del self._unsaved[place]
            self._spent, self._day = spent, today

    def _take(self, key_id: str, per_minute: int, now: float) -> None:
        per_second = per_minute / self._replicas / MINUTE_S
        most = max(1.0, per_second * self._settings.burst_s)
        bucket = self._buckets.setdefault(key_id, _Bucket(most, now))
        bucket.tokens = min(most, bucket.tokens + (now - bucket.filled_at) * per_second)
        bucket.filled_at = now
        if bucket.tokens < 1:
            metrics.LIMITED.labels("requests_per_minute").inc()
            raise ApiError(
                429, f"This key may send {per_minute} requests a minute; slow down.",
                code="rate_limit_exceeded", retry_after_s=(1 - bucket.tokens) / per_second,
            )  # fmt: skip
        bucket.tokens -= 1


def _add(connection: sa.Connection, key_id: str, day: str, tokens: int) -> None:
    where = (key_usage.c.key_id == key_id) & (key_usage.c.day == day)
    raised = key_usage.update().where(where).values(tokens=key_usage.c.tokens + tokens)
    if connection.execute(raised).rowcount:
        return
    try:
        with connection.begin_nested():
            connection.execute(key_usage.insert().values(key_id=key_id, day=day, tokens=tokens))
    except sa.exc.IntegrityError:  # another replica made the row in between
        connection.execute(raised)


def _today() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d")


def _until_midnight_s() -> float:
    now = datetime.now(UTC)
    return ((now + timedelta(days=1)).replace(hour=0, minute=0, second=0, microsecond=0) - now).total_seconds()
