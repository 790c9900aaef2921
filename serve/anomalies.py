"""Versions whose live behaviour is out of the ordinary: slow, failing, wrong with tools, or unsafe.

A router keeps the latest requests of each version. A candidate is held against its route's stable, stable against
its own requests before; what sticks out becomes an `anomaly.detected` event, a metric and a line of
`/v1/agents/status`. During a rollout a candidate's anomaly that the statistics bear out counts as a breached
guardrail (`serve.experiments.readings`).
"""

import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

from cluster import metrics
from cluster.clock import SECOND_US, now_us
from cluster.settings.serving import AnomalySettings
from data.events import Event
from serve.capture import Record
from serve.experiments.metrics import tool_results
from serve.routes import Route

Signal = Literal["latency", "errors", "tool_errors", "safety"]
Seen = tuple[float | None, bool, int, int, bool]
"""Latency in seconds (`None` where the version did not answer), failed, tool results, failed ones, filtered."""


@dataclass(frozen=True, slots=True)
class Anomaly:
    """One signal of one version past its limit."""

    route: Route
    version: str
    signal: Signal
    value: float
    baseline: float
    limit: float
    requests: int

    @property
    def name(self) -> tuple[str, str, str, str]:
        """What makes two anomalies the same one."""
        return (self.route.tenant, self.route.agent, self.version, self.signal)

    @property
    def experiment_id(self) -> str | None:
        """The experiment of the version."""
        own = (arm.experiment_id for arm in self.route.arms if arm.version == self.version)
        return next(own, self.route.experiment_id)

    def event(self, workspace: str, repeat_s: float) -> Event:
        """As `data.events.AnomalyDetected` describes it; the same from every replica while it persists."""
        body = {
            "version": self.version, "signal": self.signal, "value": self.value, "baseline": self.baseline,
            "limit": self.limit, "requests": self.requests, "experiment_id": self.experiment_id,
        }  # fmt: skip
        window = now_us() // round(repeat_s * SECOND_US)
        return Event(
            "anomaly.detected", self.route.tenant, workspace, {k: v for k, v in body.items() if v is not None},
            event_id=f"anomaly-{self.route.agent}-{self.version}-{self.signal}-{window}"[:128], agent=self.route.agent,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Summary:
    """What a stretch of requests comes to."""

    requests: int
    p95_s: float
    errors: float
    tool_results: int
    tool_errors: float
    safety: float


@dataclass(slots=True)
class AnomalyWatch:
    """The windows of one router replica: `observe` from the event loop, `check` from any thread."""

    settings: AnomalySettings
    _windows: dict[str, deque[Seen]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _said: dict[tuple[str, str, str, str], float] = field(default_factory=dict)
    _checked_at: float = float("-inf")
    current: tuple[Anomaly, ...] = ()
    """Those of the last check."""

    def observe(self, record: Record) -> None:
        """Count a request for the version it was assigned to. One that is wrong itself, or left, tells nothing."""
        failed = record.error is not None or record.fallback is not None
        if not self.settings.enabled or record.disconnected or (record.rejected is not None and not failed):
            return
        results = list(tool_results(record.request.get("messages") or []))
        latency_s = record.latency_s if record.served_version == record.plan.version and not failed else None
        seen = (latency_s, failed, len(results), sum(results), record.answer.filtered)
        with self._lock:
            window = self._windows.get(record.plan.version)
            if window is None:
                window = self._windows[record.plan.version] = deque(maxlen=2 * self.settings.window)
            window.append(seen)

    def check(self, routes: Iterable[Route], now: float | None = None) -> list[Anomaly]:
        """Anomalies that have not been told of lately (`told`); nothing when it is not time to look."""
        now = time.monotonic() if now is None else now
        if not self.settings.enabled or now - self._checked_at < self.settings.check_s:
            return []
        self._checked_at = now
        self.current = tuple(anomaly for route in routes for anomaly in self._of(route))
        said, again_s = self._said, self.settings.repeat_s
        return [a for a in self.current if now - said.get(a.name, float("-inf")) >= again_s]

    def told(self, anomalies: Iterable[Anomaly], now: float | None = None) -> None:
        """These are in the log: they are not told of again for a while."""
        for anomaly in anomalies:
            self._said[anomaly.name] = time.monotonic() if now is None else now
            metrics.ANOMALIES.labels(anomaly.route.tenant, anomaly.version, anomaly.signal).inc()

    def _of(self, route: Route) -> Iterator[Anomaly]:
        stable, before = self._halves(route.stable)
        if stable is not None and before is not None:
            yield from self._compare(route, route.stable, stable, before)
        for arm in route.arms if stable is not None else ():
            candidate, _ = self._halves(arm.version)
            if candidate is not None and stable is not None:
                yield from self._compare(route, arm.version, candidate, stable)

    def _halves(self, version: str) -> tuple[_Summary | None, _Summary | None]:
        """The latest window of a version and the one before it, where they hold enough."""
        with self._lock:
            seen = list(self._windows.get(version, ()))
        cut = max(0, len(seen) - self.settings.window)
        return self._summary(seen[cut:]), self._summary(seen[:cut])

    def _summary(self, seen: list[Seen]) -> _Summary | None:
        if len(seen) < self.settings.min_requests:
            return None
        latencies = sorted(s[0] for s in seen if s[0] is not None)
        results = sum(s[2] for s in seen)
        return _Summary(
            requests=len(seen),
            p95_s=next(islice(latencies, int(0.95 * len(latencies)), None), 0.0),
            errors=sum(s[1] for s in seen) / len(seen),
            tool_results=results,
            tool_errors=sum(s[3] for s in seen) / results if results else 0.0,
            safety=sum(s[4] for s in seen) / len(seen),
        )

    def _compare(self, route: Route, version: str, one: _Summary, base: _Summary) -> Iterator[Anomaly]:
        settings = self.settings
        slowest = max(settings.latency_factor * base.p95_s, settings.latency_min_s)
        found: list[tuple[Signal, float, float, float]] = [
            ("latency", one.p95_s, base.p95_s, slowest),
            ("errors", one.errors, base.errors, base.errors + settings.error_excess),
            ("safety", one.safety, base.safety, base.safety + settings.safety_excess),
        ]
        if one.tool_results >= settings.min_requests:
            limit = base.tool_errors + settings.tool_error_excess
            found.append(("tool_errors", one.tool_errors, base.tool_errors, limit))
        for signal, value, baseline, limit in found:
            if value > limit:
                yield Anomaly(route, version, signal, value, baseline, limit, one.requests)
