"""Implicit signals: what people's behaviour after an answer says about it. Pure functions, no store.

`signals_of` goes from events to signals a interaction; `session_signals` is the rule book for one session.
Numbers come from `implicit` and `rewards` in the settings. Every signal keeps its reason in words.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from cluster.clock import SECOND_US
from cluster.settings import Settings
from cluster.settings.capture import ImplicitSettings
from data.events import Event
from data.feedback import reward
from data.similarity import ngram_similarity

Similarity = Callable[[str, str], float]

ACTS = {"copy": "copied the answer", "citation_click": "opened a source"}
"""Actions that use an answer, and how a reason puts them."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What a user asked and when the answer was there."""

    interaction_id: str
    query: str
    answer: str
    answered_at_us: int
    asked_at_us: int


@dataclass(frozen=True, slots=True)
class Action:
    """Something a user did; `interaction_id` is `None` where only the session is known."""

    action: str
    at_us: int
    interaction_id: str | None = None
    duration_s: float | None = None
    text: str | None = None


@dataclass(frozen=True, slots=True)
class Signal:
    """One implicit signal about one interaction."""

    type: str
    reason: str


@dataclass(frozen=True, slots=True)
class Session:
    """Consecutive turns of one user, with what the user did, both in order of time."""

    turns: tuple[Turn, ...]
    actions: tuple[Action, ...]

    @property
    def length_s(self) -> float:
        """From the first question, or action, to the last thing that happened."""
        began = [t.asked_at_us for t in self.turns] + [a.at_us for a in self.actions]
        ended = [t.answered_at_us for t in self.turns] + [a.at_us for a in self.actions]
        return (max(ended) - min(began)) / SECOND_US


def signals_of(
    events: Iterable[Event], settings: Settings, similarity: Similarity = ngram_similarity
) -> dict[str, list[Signal]]:
    """Signals an interaction id, for the interactions among `events` that got any.

    `events` are interactions, behaviour and feedback of any number of sessions, in any order. They are
    grouped by session, else by user and agent, and cut where a session ends. Answers nobody saw
    (shadow) are left out.
    """
    kinds: dict[str, list[Event]] = defaultdict(list)
    for event in events:
        kinds[event.kind].append(event)
    turns: dict[tuple[str, ...], list[Turn]] = defaultdict(list)
    group_of: dict[str, tuple[str, ...]] = {}
    for event in kinds["interaction"]:
        if event.interaction_id is not None and not event.body.get("flags", {}).get("shadow"):
            group_of[event.interaction_id] = _group(event)
            turns[_group(event)].append(_turn(event, event.interaction_id))
    actions: dict[tuple[str, ...], list[Action]] = defaultdict(list)
    for event in kinds["behaviour"]:
        actions[group_of.get(event.interaction_id or "", _group(event))].append(_action(event))
    explicit: dict[str, set[str]] = defaultdict(set)
    for event in kinds["feedback"]:
        if event.interaction_id is not None and event.body.get("source") == "explicit":
            explicit[event.interaction_id].add(event.body["type"])
    found: dict[str, list[Signal]] = {}
    for group, group_turns in turns.items():
        for session in split_sessions(group_turns, actions.get(group, []), settings.implicit):
            found |= session_signals(session, explicit, settings.implicit, similarity)
    return found


def split_sessions(turns: Sequence[Turn], actions: Sequence[Action], settings: ImplicitSettings) -> list[Session]:
    """Cut one user's turns and actions at `session_end` and after a long idle time."""
    moments: list[Turn | Action] = sorted([*turns, *actions], key=_at)
    sessions: list[list[Turn | Action]] = [[]]
    idle_us = settings.session_idle_min * 60 * SECOND_US
    for moment in moments:
        if sessions[-1] and _at(moment) - _at(sessions[-1][-1]) > idle_us:
            sessions.append([])
        sessions[-1].append(moment)
        if isinstance(moment, Action) and moment.action == "session_end":
            sessions.append([])
    return [
        Session(
            tuple(m for m in session if isinstance(m, Turn)),
            tuple(m for m in session if isinstance(m, Action)),
        )
        for session in sessions
        if any(isinstance(m, Turn) for m in session)
    ]


def session_signals(
    session: Session,
    explicit: Mapping[str, Set[str]],
    settings: ImplicitSettings,
    similarity: Similarity = ngram_similarity,
) -> dict[str, list[Signal]]:
    """The signals of one session, by interaction id; `explicit` holds the types of explicit feedback."""
    found: dict[str, list[Signal]] = {}
    long_enough = session.length_s >= settings.min_session_s
    for place, turn in enumerate(session.turns):
        mine = [a for a in session.actions if _concerns(a, turn, session.turns)]
        signals = _reformulation(session, place, settings, similarity)
        signals += _use(turn, mine, settings, long_enough)
        if long_enough:
            signals += _thorough_read(turn, mine, settings)
        is_last = place == len(session.turns) - 1
        if is_last and not signals and not explicit.get(turn.interaction_id):
            signals += _abandonment(turn, mine, settings)
        if signals:
            found[turn.interaction_id] = signals
    return found


def implicit_reward(signals: Iterable[Signal], settings: Settings) -> float:
    """The sum of the signals' rewards, clamped to [-1, 1]."""
    total = sum(reward(s.type, None, settings.rewards) for s in signals)
    return max(-1.0, min(1.0, total))


def _reformulation(session: Session, place: int, settings: ImplicitSettings, similarity: Similarity) -> list[Signal]:
    turn = session.turns[place]
    said = [
        (a.at_us, a.text)
        for a in session.actions
        if a.action == "message" and a.text and a.at_us >= turn.answered_at_us
    ]
    if place + 1 < len(session.turns):
        following = session.turns[place + 1]
        said.append((following.answered_at_us, following.query))
    if not said:
        return []
    alike = similarity(turn.query, min(said)[1])
    if alike < settings.reformulation_similarity:
        return []
    return [Signal("reformulation", f"the user asked the same again (similarity {alike:.2f})")]


def _use(turn: Turn, mine: list[Action], settings: ImplicitSettings, long_enough: bool) -> list[Signal]:
    """Quick accept, copying and clicks on sources."""
    signals: list[Signal] = []
    used = [(_elapsed_s(a, turn), a.action) for a in mine if a.action in ACTS]
    if long_enough and used and min(used)[0] <= settings.quick_accept_s:
        elapsed_s, action = min(used)
        signals.append(Signal("quick_accept", f"the user {ACTS[action]} after {elapsed_s:.1f} s"))
    if copies := sum(action == "copy" for _, action in used):
        signals.append(Signal("copy_response", f"the user copied the answer ({copies} times)"))
    clicks = sum(action == "citation_click" for _, action in used)
    return signals + [Signal("citation_click", "the user opened a source")] * clicks


def _thorough_read(turn: Turn, mine: list[Action], settings: ImplicitSettings) -> list[Signal]:
    expected_s = _reading_time_s(turn, settings)
    read_s = sum(a.duration_s or 0.0 for a in mine if a.action == "read")
    if not expected_s or read_s < settings.thorough_read_share * expected_s:
        return []
    return [Signal("thorough_read", f"the user read for {read_s:.1f} s of {expected_s:.1f} s expected")]


def _abandonment(turn: Turn, mine: list[Action], settings: ImplicitSettings) -> list[Signal]:
    expected_s = _reading_time_s(turn, settings)
    left = [_elapsed_s(a, turn) for a in mine if a.action == "leave"]
    if not left or min(left) >= settings.abandonment_share * expected_s:
        return []
    return [Signal("abandonment", f"the user left after {min(left):.1f} s of {expected_s:.1f} s expected")]


def _reading_time_s(turn: Turn, settings: ImplicitSettings) -> float:
    return len(turn.answer.split()) / settings.words_per_minute * 60


def _elapsed_s(action: Action, turn: Turn) -> float:
    """Time since the answer: as the client measured it, else by the clocks."""
    if action.duration_s is not None:
        return action.duration_s
    return max(0.0, (action.at_us - turn.answered_at_us) / SECOND_US)


def _concerns(action: Action, turn: Turn, turns: Sequence[Turn]) -> bool:
    """Whether `action` is about `turn`: named, or the last answer there was at the time."""
    if action.interaction_id is not None:
        return action.interaction_id == turn.interaction_id
    before = [t for t in turns if t.answered_at_us <= action.at_us]
    return bool(before) and before[-1] is turn


def _at(moment: Turn | Action) -> int:
    return moment.answered_at_us if isinstance(moment, Turn) else moment.at_us


def _group(event: Event) -> tuple[str, ...]:
    """What is looked at together: a session, else a user's time with an agent, else one interaction."""
    if event.session_id is not None:
        return (event.tenant, "session", event.session_id)
    if event.user_id is not None:
        return (event.tenant, "user", event.user_id, event.agent or "")
    return (event.tenant, "interaction", event.interaction_id or event.event_id)


def _turn(event: Event, interaction_id: str) -> Turn:
    asked = [m for m in event.body["messages"] if m.get("role") == "user"]
    answered_at_us = event.occurred_at_us + round(event.body.get("latency_s", 0.0) * SECOND_US)
    query = _text(asked[-1]) if asked else ""
    return Turn(interaction_id, query, _text(event.body.get("response") or {}), answered_at_us, event.occurred_at_us)


def _action(event: Event) -> Action:
    body = event.body
    return Action(body["action"], event.occurred_at_us, event.interaction_id, body.get("duration_s"), body.get("text"))


def _text(message: Mapping[str, Any]) -> str:
    """The text of an OpenAI message, whose content may be a list of parts."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "\n".join(part.get("text", "") for part in content if isinstance(part, dict))
