"""Writes the implicit signals of ended sessions into the log, as feedback events.

A reader with a cursor: it goes on where it stopped, keeps back the sessions that may still go on, and
gives every signal an id made from what it is about, so reading something twice adds nothing. Behaviour
that arrives after its session was written down has no effect.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from cluster.clock import SECOND_US, now_us
from cluster.settings import Settings
from data.events import Event, RecordedEvent, parse_body
from data.feedback import reward
from data.implicit import Signal, Similarity, session_group, signals_of
from data.log import EventLog
from data.similarity import ngram_similarity

KINDS = ("interaction", "behaviour", "feedback")
Group = tuple[str, ...]


@dataclass(slots=True)
class OpenSession:
    """Events of one group that may still go on."""

    first_seq: int
    events: list[Event] = field(default_factory=list)
    last_at_us: int = 0
    ended: bool = False

    def add(self, event: Event) -> None:
        """Take an event in."""
        self.events.append(event)
        self.last_at_us = max(self.last_at_us, event.occurred_at_us)
        self.ended = event.kind == "behaviour" and event.body.get("action") == "session_end"


@dataclass(slots=True)
class OpenSessions:
    """All sessions that may still go on, by group."""

    idle_us: float
    by_group: dict[Group, OpenSession] = field(default_factory=dict)
    group_of: dict[str, Group] = field(default_factory=dict)
    """Interaction id -> group: behaviour and feedback follow their interaction."""

    def add(self, recorded: RecordedEvent) -> None:
        """Put an event into its group."""
        event = recorded.event
        group = self.group_of.get(event.interaction_id or "", session_group(event))
        if event.kind == "interaction" and event.interaction_id is not None:
            self.group_of[event.interaction_id] = group
        self.by_group.setdefault(group, OpenSession(recorded.seq)).add(event)

    def take_ended(self, at_us: int) -> Iterator[OpenSession]:
        """Remove and give the sessions that ended by word, or have been idle for too long."""
        for group, session in list(self.by_group.items()):
            if session.ended or at_us - session.last_at_us > self.idle_us:
                del self.by_group[group]
                for event in session.events:
                    self.group_of.pop(event.interaction_id or "", None)
                yield session

    def resume_after(self, last_seq: int) -> int:
        """Where the next reader starts: before the first event that is kept back."""
        return min((s.first_seq - 1 for s in self.by_group.values()), default=last_seq)


def record_signals(
    log: EventLog, settings: Settings, *, at_us: int | None = None, similarity: Similarity = ngram_similarity
) -> int:
    """Append the signals of sessions that ended since the last call; how many were new.

    `at_us` is the time now. Only the configured tenant is read.
    """
    name = f"signals/{settings.tenant}"
    open_sessions = OpenSessions(settings.implicit.session_idle_min * 60 * SECOND_US)
    at_us, after, added = at_us or now_us(), log.cursor(name), 0
    page = settings.log.reader_page_events
    while batch := log.read(after, page, kinds=KINDS, tenant=settings.tenant):
        for recorded in batch:
            if recorded.event.body.get("source") != "implicit" and not recorded.erased:
                open_sessions.add(recorded)
        after = batch[-1].seq
        newest = max(recorded.event.occurred_at_us for recorded in batch)
        added += _write(log, open_sessions.take_ended(min(newest, at_us)), settings, similarity)
    added += _write(log, open_sessions.take_ended(at_us), settings, similarity)
    log.save_cursor(name, open_sessions.resume_after(after))
    return added


def _write(log: EventLog, sessions: Iterator[OpenSession], settings: Settings, similarity: Similarity) -> int:
    """Signals of ended sessions into the log."""
    found: list[Event] = []
    for session in sessions:
        about = {e.interaction_id: e for e in session.events if e.kind == "interaction"}
        for interaction_id, signals in signals_of(session.events, settings, similarity).items():
            found += _feedback(about[interaction_id], signals, session.last_at_us, settings)
    return sum(verdict.status == "accepted" for verdict in log.append(found))


def _feedback(interaction: Event, signals: list[Signal], at_us: int, settings: Settings) -> Iterator[Event]:
    """One feedback event a signal, with an id made from interaction, type and number."""
    numbers: dict[str, int] = defaultdict(int)
    about = hashlib.sha256((interaction.interaction_id or "").encode()).hexdigest()[:24]
    for signal in signals:
        numbers[signal.type] += 1
        body = {
            "type": signal.type,
            "source": "implicit",
            "reward": reward(signal.type, None, settings.rewards),
            "reason": signal.reason,
        }
        yield Event(
            kind="feedback",
            tenant=interaction.tenant,
            workspace=interaction.workspace,
            body=parse_body("feedback", body),
            event_id=f"implicit-{about}-{signal.type}-{numbers[signal.type]}",
            occurred_at_us=at_us,
            user_id=interaction.user_id,
            session_id=interaction.session_id,
            agent=interaction.agent,
            interaction_id=interaction.interaction_id,
        )
