"""When a version that fails is left alone, and how long an answer of the candidate may take.

Both are plain state of one router replica, with the time handed in.
"""

from collections import deque
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # the client uses the breaker too, and loads no settings
    from cluster.settings.serving import FallbackSettings

Permit = int
"""What lets one request through a breaker."""
ENOUGH_ANSWERS = 20  # below it a 95th percentile says nothing


class BreakerLimits(Protocol):
    """The numbers of a breaker; `cluster.settings.serving.BreakerSettings` says what they mean."""

    @property
    def consecutive(self) -> int: ...
    @property
    def window(self) -> int: ...
    @property
    def window_share(self) -> float: ...
    @property
    def half_open_s(self) -> float: ...


class Breaker:
    """Closed, open, half-open: opens on failures in a row or on their share of a full window."""

    def __init__(self, settings: BreakerLimits) -> None:
        self._settings = settings
        self._latest: deque[bool] = deque(maxlen=settings.window)
        self._in_a_row = 0
        self._opened_at: float | None = None
        self._probing_since: float | None = None
        self._valid: Permit = 1
        """Permits of another number are of requests begun before it opened, or of a probe that was given up."""

    @property
    def is_open(self) -> bool:
        """Open or half-open."""
        return self._opened_at is not None

    def allow(self, now: float) -> Permit | None:
        """A permit where a request may go through, to come back with its end; half-open lets one through at a time."""
        if self._opened_at is None:
            return self._valid
        if now - self._opened_at < self._settings.half_open_s:
            return None
        if self._probing_since is not None and now - self._probing_since < self._settings.half_open_s:
            return None
        self._probing_since = now
        self._valid += 1
        return self._valid

    def record(self, permit: Permit, ok: bool, now: float) -> None:
        """Count the end of a request that was let through.

        While open only the probe counts: an answer that began before tells nothing of how things are.
        """
        if permit != self._valid:
            return
        if self._opened_at is not None and ok:
            self._close()
            return
        self._latest.append(ok)
        self._in_a_row = 0 if ok else self._in_a_row + 1
        if self._opened_at is not None or self._in_a_row >= self._settings.consecutive or self._window_is_bad():
            self._open(now)

    def forget(self, permit: Permit) -> None:
        """A request that was let through ended without telling anything (the client went away)."""
        if permit == self._valid:
            self._probing_since = None

    def _window_is_bad(self) -> bool:
        full = len(self._latest) == self._settings.window
        return full and self._latest.count(False) >= self._settings.window_share * self._settings.window

    def _open(self, now: float) -> None:
        self._opened_at, self._probing_since = now, None
        self._valid += 1

    def _close(self) -> None:
        self._opened_at = self._probing_since = None
        self._in_a_row = 0
        self._latest.clear()


class StableLatency:
    """Times to the first byte of stable's latest answers, from which the candidate's budget follows."""

    def __init__(self, settings: "FallbackSettings") -> None:
        self._settings = settings
        self._latest: deque[float] = deque(maxlen=settings.p95_window)
        self._p95: float | None = None
        self._uncounted = 0

    def record(self, seconds: float) -> None:
        """Count one answer."""
        self._latest.append(seconds)
        self._uncounted += 1
        if self._uncounted >= ENOUGH_ANSWERS:
            self._uncounted = 0
            ordered = sorted(self._latest)
            self._p95 = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]

    def budget_s(self) -> float:
        """What the candidate has for its first byte."""
        if self._p95 is None:
            return self._settings.budget_s
        wanted = min(self._settings.budget_s, self._settings.stable_p95_factor * self._p95)
        return max(wanted, self._settings.min_budget_s)
