"""Interactions on their way into the log, off the request's path.

A request leaves a record in a bounded ring; a thread turns records into events and hands them to the group
commit. When the log takes nothing they go to a spool, one file of JSON lines a router, which is replayed when
it answers again. Nothing here can change or delay an answer; what is lost is counted.
"""

import logging
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import orjson

from cluster import metrics
from cluster.clock import now_us, to_iso
from cluster.errors import RayloopError
from cluster.settings.capture import LogSettings
from cluster.settings.serving import CaptureQueueSettings
from data.events import ROUTER, Event, interaction_event_id, uuid7
from data.group_commit import GroupCommit, Transient
from data.intake.metadata import PAIRS, bounded, scrubbed
from serve.arms import Plan
from serve.keys import Key
from serve.rewrite import Answer

log = logging.getLogger(__name__)

PARAMETERS = (
    "temperature", "top_p", "max_tokens", "max_completion_tokens", "n", "stop", "seed", "presence_penalty",
    "frequency_penalty", "response_format", "tool_choice", "stream", "suffix", "echo",
)  # fmt: skip
REPLAY_EVENTS = 500
Alert = Callable[[str, str, dict[str, Any]], Event]
"""`data.alerts.alert` with its settings: name, reason, facts."""
GONE = "client_disconnected"


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
    details: dict[str, str | int | float | bool] = field(default_factory=dict)
    """What the router itself has to say; joins the client's metadata."""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    """Calls that were answered for this interaction, as `data.events.ToolCall`."""
    at_us: int = field(default_factory=now_us)

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
            "safety": answer.refused, "quality": self._poor(), "timeout": self.timeout,
        }  # fmt: skip
        return {
            "messages": request.get("messages") or prompt_messages(request.get("prompt")),
            "tools": request.get("tools") or None,
            "tool_calls": self.tool_calls,
            "context": passages(request.get("documents")),
            "response": {"role": "assistant"} | answer.message if answer.message else None,
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
            "latency_s": self.latency_s,
            "ttft_s": self.ttft_s,
            "modality": self.modality,
            "user_tier": self.user_tier or self.key.user_tier,
            "metadata": metadata,
            "trace_id": self.trace_id,
            "flags": flags if self.error is None else flags | {"error": self.error},
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
        self, settings: CaptureQueueSettings, log_settings: LogSettings, spool: Path, alert: Alert | None = None
    ) -> None:
        self._settings = settings
        self._alert, self._lost = alert, 0
        self._batch = log_settings.group_commit_events
        self._linger_s = settings.linger_ms / 1000
        self._ring: deque[Recordable] = deque()
        self._wake = threading.Event()
        self._closing = False
        self._retry_at = 0.0
        self._spool = Spool(spool, settings.spool_max_mb * 2**20)
        self.commit: GroupCommit | None = None
        self._thread = threading.Thread(target=self._run, name="capture", daemon=True)
        self._thread.start()

    def offer(self, record: Recordable) -> None:
        """Take a record; never waits and never raises. A full ring loses it, and counts that."""
        if len(self._ring) >= self._settings.queue_events:
            metrics.CAPTURED.labels("lost").inc()
            self._lost += 1
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
        self._spool.adopt()
        while not self._closing:
            self._wake.wait(self._settings.retry_s)
            if not self._closing:
                time.sleep(self._linger_s)  # a moment in which the batch grows
            self._wake.clear()
            while self._ring or (self._spool.size and self._up and not self._closing):
                self._drain()
                self._replay()
        while self._ring:
            self._drain()

    @property
    def _up(self) -> bool:
        """The log is there, or it is time to try it again."""
        return self.commit is not None and time.monotonic() >= self._retry_at

    def _drain(self) -> None:
        """One batch from the ring to the log, else to the spool."""
        records = [self._ring.popleft() for _ in range(min(len(self._ring), self._batch))]
        metrics.CAPTURE_WAITING.set(len(self._ring))
        events = [event for record in records if (event := _event_of(record)) is not None]
        events = [*self._alerts_of_loss(), *events]
        if events and not self._append(events):
            self._spool_out(events)

    def _replay(self) -> None:
        """One batch from the spool, oldest first, home to the log."""
        if self._spool.size and self._up:
            events, end = self._spool.read(REPLAY_EVENTS)
            if not events or self._append(events):
                self._spool.forget(end)

    def _append(self, events: list[Event]) -> bool:
        """True when the events are in the log."""
        if self.commit is None or not self._up:
            return False
        try:
            verdicts = self.commit.append(events)
        except (RayloopError, *Transient) as error:
            log.warning("the event log takes no interactions (%s); they go to %s", error, self._spool.path)
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

    def _alerts_of_loss(self) -> list[Event]:
        if self._alert is None or not self._lost:
            return []
        lost, self._lost = self._lost, 0
        limits = f"queue_events={self._settings.queue_events}, spool_max_mb={self._settings.spool_max_mb}"
        reason = f"{lost} interactions found queue or spool full (serve.capture: {limits})"
        return [self._alert("interactions_lost", reason, {"lost": lost})]

    def _spool_out(self, events: list[Event]) -> None:
        if self._alert is not None and not self._spool.size:  # it begins; what follows needs no further word
            reason = f"since {to_iso(now_us())} interactions went to {self._spool.path}; they are home now"
            events = [self._alert("spool", reason, {}), *events]
        kept = self._spool.add(events)
        metrics.CAPTURED.labels("spooled").inc(kept)
        metrics.CAPTURED.labels("lost").inc(len(events) - kept)
        self._lost += len(events) - kept


def _event_of(record: Recordable) -> Event | None:
    try:
        return record.event()
    except Exception:  # a request we could not describe must not stop the others
        log.exception("an interaction could not be recorded")
        metrics.CAPTURED.labels("lost").inc()
        return None


def _line_of(event: Event) -> bytes | None:
    try:
        return orjson.dumps(asdict(event)) + b"\n"
    except TypeError as error:  # nested deeper than JSON can be written
        log.error("interaction %s cannot be written (%s)", event.interaction_id, error)
        return None


class Spool:
    """Events on disk that wait for the log: JSON lines, and how many bytes of them are home already."""

    def __init__(self, path: Path, limit: int) -> None:
        self.path, self._limit = path, limit
        self.size = 0
        """Bytes that are not in the log yet."""
        self._done = 0

    def adopt(self) -> None:
        """Take over what dead routers left in the same folder, this one's file first.

        A file is claimed by a rename that carries this process, then copied, then removed: whoever dies in
        between leaves a claim that the next router takes over. Its events may then come twice, which their
        ids make harmless.
        """
        folder = self.path.parent
        folder.mkdir(parents=True, exist_ok=True)
        for left in sorted((*folder.glob("*.jsonl"), *folder.glob("*.claimed"))):
            if left != self.path and not _alive(left):
                self._take_over(left)
        self.size = self.path.stat().st_size if self.path.exists() else 0
        metrics.SPOOL_BYTES.set(self.size)

    def _take_over(self, left: Path) -> None:
        claimed = left.with_name(f"{left.name.partition('.')[0]}.{uuid7()}.router-{os.getpid()}.claimed")
        try:
            left.rename(claimed)
        except FileNotFoundError:  # another router was quicker
            return
        with claimed.open("rb") as source, self.path.open("ab") as file:
            shutil.copyfileobj(source, file)
            if file.tell() and not _ends_in_newline(claimed):
                file.write(b"\n")  # half a line must not spoil the next one
            file.flush()
            os.fsync(file.fileno())
        claimed.unlink()

    def add(self, events: list[Event]) -> int:
        """Write events down, durably; returns how many found room."""
        lines = [line for event in events if (line := _line_of(event)) is not None]
        kept, total = 0, self.size
        while kept < len(lines) and total + len(lines[kept]) <= self._limit:
            total += len(lines[kept])
            kept += 1
        try:
            with self.path.open("ab") as file:
                file.writelines(lines[:kept])
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            log.error("the spool %s cannot be written (%s)", self.path, error)
            return 0
        self.size = total
        metrics.SPOOL_BYTES.set(self.size)
        return kept

    def read(self, limit: int) -> tuple[list[Event], int]:
        """The oldest events and the place in the file after them."""
        events: list[Event] = []
        with self.path.open("rb") as file:
            file.seek(self._done)
            while len(events) < limit and (line := file.readline()):
                try:
                    events.append(Event(**orjson.loads(line)))
                except (orjson.JSONDecodeError, TypeError):  # half a line: the machine stopped in mid-write
                    metrics.CAPTURED.labels("lost").inc()
            return events, file.tell()

    def forget(self, end: int) -> None:
        """The events before `end` are home."""
        self.size -= end - self._done
        self._done = end
        if self.size <= 0:
            self.path.unlink(missing_ok=True)
            self.size = self._done = 0
        metrics.SPOOL_BYTES.set(self.size)


def spool_path(home: Path) -> Path:
    """This process's spool under `home`; its name carries the process, so a dead one's is known."""
    return home / "spool" / f"router-{os.getpid()}.jsonl"


def _ends_in_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(0, os.SEEK_END)
        if file.tell() == 0:
            return True
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _alive(path: Path) -> bool:
    """Whether the process in the name of a spool or of a claim still runs.

    A claim in this process's own name is an earlier process's that had the same number, as in a container.
    """
    pid = path.stem.rpartition("-")[2]
    if path.suffix == ".claimed" and pid == str(os.getpid()):
        return False
    return pid.isdigit() and Path(f"/proc/{pid}").exists()
