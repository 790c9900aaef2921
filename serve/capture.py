"""Interactions on their way into the log, off the request's path.

A request leaves a record in a bounded ring; a thread turns records into events and hands them to the group
commit. When the log takes nothing they go to a spool (`serve.spool`), which is replayed when it answers again.
Nothing here can change or delay an answer; what is lost is counted.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from cluster import metrics
from cluster.clock import now_us, to_iso
from cluster.errors import RayloopError
from cluster.settings.capture import LogSettings
from cluster.settings.serving import CaptureQueueSettings
from data.events import ROUTER, Event, interaction_event_id
from data.group_commit import GroupCommit, Transient
from data.intake.metadata import PAIRS, bounded, scrubbed
from serve.arms import Plan
from serve.keys import Key
from serve.rewrite import Answer
from serve.spool import Spool

log = logging.getLogger(__name__)

PARAMETERS = (
    "temperature", "top_p", "max_tokens", "max_completion_tokens", "n", "stop", "seed", "presence_penalty",
    "frequency_penalty", "response_format", "tool_choice", "stream", "suffix", "echo",
)  # fmt: skip
REPLAY_EVENTS = 500
Alert = Callable[[str, str, dict[str, Any]], Event]
"""`data.alerts.alert` with its settings: name, reason, facts."""


@dataclass(slots=True)
class Record:
    """What a request leaves behind; becomes an `interaction` event."""

    interaction_id: str
    key: Key
    plan: Plan
    request: Mapping[str, Any]
    modality: str
    user: str | None
    """Pseudonym."""
    session: str | None
    trace_id: str | None
    user_tier: str | None = None
    """As the request says; else the key's."""
    prompt_digest: str | None = None
    """Of the agent's prompt, where `request` begins with one."""
    answer: Answer = field(default_factory=Answer)
    served_version: str | None = None
    adapter_digest: str | None = None
    latency_s: float = 0.0
    ttft_s: float | None = None
    fallback: str | None = None
    """Why stable answered in place of the candidate."""
    disconnected: bool = False
    timeout: bool = False
    error: str | None = None
    rejected: str | None = None
    """The request itself was turned down; tells nothing of the version."""
    details: dict[str, str | int | float | bool] = field(default_factory=dict)
    """What the router itself has to say; joins the client's metadata."""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    """Calls that were answered for this interaction, as `data.events.ToolCall`."""
    at_us: int = field(default_factory=now_us)

    def refuse(self, status: int, code: str | None) -> None:
        """Note an error for an answer: below 500 it is the request's, or want of room; else of who should answer."""
        if status < 500:
            self.rejected = code or str(status)
        else:
            self.error = code or str(status)

    def event(self) -> Event:
        """The event, as `data.events.Interaction` describes it, with absent fields left out."""
        body = {name: value for name, value in self._body().items() if value is not None}
        return Event(
            "interaction", self.key.tenant, self.key.workspace, body,
            event_id=interaction_event_id(self.interaction_id, ROUTER), occurred_at_us=self.at_us,
            user_id=self.user, session_id=self.session, agent=self.plan.agent, interaction_id=self.interaction_id,
        )  # fmt: skip

    def _body(self) -> dict[str, Any]:
        plan, answer, request = self.plan, self.answer, self.request
        own = self.details if self.fallback is None else self.details | {"fallback_cause": self.fallback}
        metadata = scrubbed(bounded(request.get("metadata"), keep=max(0, PAIRS - len(own)))) | own
        flags = {
            "fallback": self.fallback is not None, "shadow": plan.arm == "shadow", "disconnected": self.disconnected,
            "safety": answer.filtered, "quality": self._poor(), "timeout": self.timeout,
        }  # fmt: skip
        told = {"error": self.error, "rejected": self.rejected}
        return {
            "messages": request.get("messages") or prompt_messages(request.get("prompt")),
            "tools": request.get("tools") or None,
            "tool_calls": self.tool_calls,
            "context": passages(request.get("documents")),
            "response": {"role": "assistant"} | answer.said if answer.message else None,
            "finish_reason": answer.finish_reason,
            "prompt_token_ids": answer.prompt_token_ids,
            "completion_token_ids": answer.token_ids,
            "completion_logprobs": answer.logprobs,
            "parameters": {k: request[k] for k in PARAMETERS if request.get(k) is not None},
            "requested": plan.requested,
            "assigned_version": plan.version,
            "served_version": self.served_version,
            "adapter_digest": self.adapter_digest,
            "arm": plan.arm,
            "experiment_id": plan.experiment_id,
            "propensity": plan.propensity,
            "bucket": plan.bucket,
            "assignment_unit": plan.unit,
            "split": plan.route.split if plan.route and plan.propensity is not None else None,
            "route_revision": plan.route.revision if plan.route else None,
            "prompt_digest": self.prompt_digest,
            "latency_s": self.latency_s,
            "ttft_s": self.ttft_s,
            "modality": self.modality,
            "user_tier": self.user_tier or self.key.user_tier,
            "metadata": metadata,
            "trace_id": self.trace_id,
            "flags": flags | {name: code for name, code in told.items() if code is not None},
        }

    def _poor(self) -> bool:
        """An answer that was promised and is empty, or was cut off."""
        if self.served_version is None or self.disconnected:
            return False
        message = self.answer.message
        return self.answer.finish_reason == "length" or not (message.get("content") or message.get("tool_calls"))


def prompt_messages(prompt: Any) -> list[dict[str, Any]]:
    """A prompt without roles as a conversation of its own; of several prompts the first, whose answer is kept."""
    first = prompt[0] if isinstance(prompt, list) and prompt and isinstance(prompt[0], str) else prompt
    return [{"role": "user", "content": first if isinstance(first, str) else ""}]


def passages(documents: Any) -> list[str]:
    """The texts of a request's `documents`, the field in which vLLM takes passages for its template."""
    if not isinstance(documents, list):
        return []
    texts = (d.get("text", d.get("content")) if isinstance(d, dict) else d for d in documents)
    return [text for text in texts if isinstance(text, str)]


class Recordable(Protocol):
    """Something that becomes an event once there is time for it."""

    def event(self) -> Event:
        """The event."""
        ...


class Capture:
    """The ring and its thread. `commit` appears once the database has answered for the first time."""

    def __init__(
        self, settings: CaptureQueueSettings, log_settings: LogSettings, home: Path, alert: Alert | None = None
    ) -> None:
        self._settings = settings
        self._alert, self._lost = alert, 0
        self._trouble: str | None = None
        self._batch = log_settings.group_commit_events
        self._linger_s = settings.linger_ms / 1000
        self._ring: deque[Recordable] = deque()
        self._wake = threading.Event()
        self._closing = False
        self._retry_at = self._adopt_at = 0.0
        self._spool = Spool(home, settings.spool_max_mb * 2**20)
        self.commit: GroupCommit | None = None
        self._thread = threading.Thread(target=self._run, name="capture", daemon=True)
        self._thread.start()

    def offer(self, record: Recordable) -> None:
        """Take a record; never waits and never raises. A full ring loses it, and counts that."""
        if len(self._ring) >= self._settings.queue_events:
            self._count_lost(1)
            return
        self._ring.append(record)
        if not self._wake.is_set():
            self._wake.set()

    def close(self) -> None:
        """Write what waits, to the log or to the spool, and end."""
        self._closing = True
        self._wake.set()
        self._thread.join(timeout=10)

    def _run(self) -> None:
        while not self._closing:
            try:
                self._turn()
            except Exception as error:  # nobody else records interactions: the thread must outlive any surprise
                log.exception("interactions could not be brought to the log or to the spool; trying again")
                self._trouble = f"{type(error).__name__}: {error}"
        while self._ring:
            self._drain()
        self._spool.close()

    def _turn(self) -> None:
        """Wait for records, and bring them and what the spool holds to the log."""
        if time.monotonic() >= self._adopt_at:
            self._adopt_at = time.monotonic() + self._settings.adopt_s
            self._spool.adopt()
        self._wake.wait(self._settings.retry_s)
        if not self._closing:
            time.sleep(self._linger_s)  # a moment in which the batch grows
        self._wake.clear()
        while self._ring or (self._spool.size and self._up and not self._closing):
            self._drain()
            self._replay()

    @property
    def _up(self) -> bool:
        """The log is there, or it is time to try it again."""
        return self.commit is not None and time.monotonic() >= self._retry_at

    def _drain(self) -> None:
        """One batch from the ring to the log, else to the spool."""
        records = [self._ring.popleft() for _ in range(min(len(self._ring), self._batch))]
        metrics.CAPTURE_WAITING.set(len(self._ring))
        events = [event for record in records if (event := _event_of(record)) is not None]
        try:
            events = [*self._alerts(), *events] if self._up else events
            if events and not self._append(events):
                self._spool_out(events)
        except Exception as error:
            log.exception("%d interactions are lost", len(records))
            self._count_lost(len(records))
            self._trouble = f"{type(error).__name__}: {error}"

    def _replay(self) -> None:
        """One batch from the spool, oldest first, home to the log."""
        if self._spool.size and self._up:
            events = self._spool.read(REPLAY_EVENTS)
            if not events or self._append(events):
                self._spool.forget()

    def _append(self, events: list[Event]) -> bool:
        """True when the events are in the log."""
        if self.commit is None or not self._up:
            return False
        try:
            verdicts = self.commit.append(events)
        except (RayloopError, *Transient) as error:
            log.warning("the event log takes no interactions (%s); they go to %s", error, self._spool.folder)
            self._retry_at = time.monotonic() + self._settings.retry_s
            return False
        except Exception:
            if len(events) > 1:  # one bad event must not take the others with it
                taken = [self._append([event]) for event in events]
                return all(taken)
            log.exception("an interaction was refused by the event log and is lost")
            metrics.CAPTURED.labels("lost").inc()
            return True
        for label, status in (("logged", "accepted"), ("duplicate", "duplicate"), ("refused", "refused")):
            metrics.CAPTURED.labels(label).inc(sum(verdict.status == status for verdict in verdicts))
        return True

    def _count_lost(self, number: int) -> None:
        metrics.CAPTURED.labels("lost").inc(number)
        self._lost += number

    def _alerts(self) -> list[Event]:
        """What people should know of since the last batch."""
        if self._alert is None:
            return []
        told = []
        if self._lost:
            lost, self._lost = self._lost, 0
            limits = f"queue_events={self._settings.queue_events}, spool_max_mb={self._settings.spool_max_mb}"
            reason = f"{lost} interactions found queue, spool or disk full (serve.capture: {limits})"
            told.append(self._alert("interactions_lost", reason, {"lost": lost}))
        if self._trouble:
            reason, self._trouble = f"what records interactions failed and goes on ({self._trouble})", None
            told.append(self._alert("capture_failed", reason, {}))
        return told

    def _spool_out(self, events: list[Event]) -> None:
        if self._alert is not None and not self._spool.size:  # it begins; what follows needs no further word
            reason = f"since {to_iso(now_us())} interactions went to {self._spool.folder}; they are home now"
            events = [self._alert("spool", reason, {}), *events]
        kept = self._spool.add(events)
        metrics.CAPTURED.labels("spooled").inc(kept)
        if kept < len(events):
            self._count_lost(len(events) - kept)


def _event_of(record: Recordable) -> Event | None:
    try:
        return record.event()
    except Exception:  # a request we could not describe must not stop the others
        log.exception("an interaction could not be recorded")
        metrics.CAPTURED.labels("lost").inc()
        return None
