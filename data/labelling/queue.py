"""The labelling queue: which items wait for a reviewer. A projection of the log, kept in memory and caught up on use.

Items come from `label.requested` events, and from `shadow.pair` events that were marked for review. A day has room
for `labelling.per_day` of them; an evaluation's are asked for on purpose and always have. An item leaves a
reviewer's queue when they label or skip it, and everybody's when as many people have as were to.
"""

import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from cluster.clock import DAY_US, now_us
from cluster.errors import NotFoundError
from cluster.settings.labelling import LabellingSettings
from cluster.tables import events
from data.events import RecordedEvent
from data.labelling.requests import LABEL, REQUESTED, SKIPPED, answer_names, is_flipped, item_id
from data.log import EventLog

PAIR = "shadow.pair"
KINDS = (PAIR, REQUESTED, LABEL, SKIPPED, "erasure")
ORDER = {"evaluation": 0, "disagreement": 1, "uncertainty": 2, "spot_check": 3}
"""Evaluations first: somebody waits for them."""
Place = tuple[str, str]
"""Tenant and workspace."""


@dataclass(slots=True)
class Item:
    """Something to be judged."""

    item_id: str
    tenant: str
    workspace: str
    reason: str
    at_us: int
    seq: int
    agent: str | None
    user_id: str | None
    answers: list[dict[str, Any]]
    """As in `data.label_bodies.RequestedAnswer`."""
    messages: list[dict[str, Any]]
    reviewers: int
    done_by: set[str] = field(default_factory=set)
    """Who labelled or skipped it."""

    @property
    def names(self) -> list[str]:
        """What labels call its answers."""
        return answer_names(self.item_id, self.answers)

    def waits_for(self, reviewer: str | None) -> bool:
        """Whether this reviewer (`None`: anybody) has something to do here."""
        return len(self.done_by) < self.reviewers and reviewer not in self.done_by

    @property
    def flipped(self) -> bool:
        """Whether the second answer is shown first."""
        return len(self.answers) == 2 and is_flipped(self.item_id)


class LabelQueue:
    """The queues of all tenants. Thread-safe; every reading catches up with the log first."""

    def __init__(self, engine: Engine, settings: LabellingSettings) -> None:
        self._log, self._settings = EventLog(engine), settings
        self._lock = threading.Lock()
        self._seq: int | None = None
        self._items: dict[str, Item] = {}
        self._by_interaction: dict[tuple[str, str], set[str]] = {}
        self._days: Counter[tuple[Place, int, str]] = Counter()

    def waiting(
        self, tenant: str, workspace: str, *, reviewer: str | None = None, limit: int | None = None
    ) -> list[Item]:
        """Items that wait, the most urgent first and the oldest of these first."""
        with self._lock:
            self._catch_up()
            open_ = [
                item
                for item in self._items.values()
                if (item.tenant, item.workspace) == (tenant, workspace) and item.waits_for(reviewer)
            ]
        open_.sort(key=lambda item: (ORDER[item.reason], item.seq))
        return open_[:limit]

    def get(self, tenant: str, workspace: str, item: str) -> Item:
        """An item, judged or not.

        Raises:
            NotFoundError: the queue of this workspace has no such item.
        """
        with self._lock:
            self._catch_up()
            found = self._items.get(item)
        if found is None or (found.tenant, found.workspace) != (tenant, workspace):
            raise NotFoundError(f"item_id={item!r} is not in the labelling queue; take one that `queue` shows")
        return found

    def interactions(self, tenant: str) -> set[str]:
        """The interactions that items of the queue are about, judged or not."""
        with self._lock:
            self._catch_up()
            return {name for owner, name in self._by_interaction if owner == tenant}

    def today(self, tenant: str, workspace: str, now: int | None = None) -> Counter[str]:
        """How many items of each reason today has had."""
        day = (now_us() if now is None else now) // DAY_US
        with self._lock:
            self._catch_up()
            return Counter({r: self._days[(tenant, workspace), day, r] for r in ORDER})

    def _catch_up(self) -> None:
        oldest = now_us() - round(self._settings.keep_days * DAY_US)
        if self._seq is None:
            self._seq = first_seq_at(self._log.engine, oldest) - 1
        for recorded in self._log.scan(self._seq, kinds=KINDS, page=self._settings.page_events):
            self._seq = recorded.seq
            self._take(recorded)
        for name in [i.item_id for i in self._items.values() if i.at_us < oldest]:
            self._forget(name)

    def _take(self, recorded: RecordedEvent) -> None:
        event = recorded.event
        if recorded.erased:
            return
        if event.kind == "erasure":
            self._erase(event.body["events"])
        elif event.kind in (LABEL, SKIPPED):
            for item in self._named(recorded):
                item.done_by.add(event.body["reviewer"])
        elif event.kind == REQUESTED or event.body.get("for_review"):
            self._add(self._item(recorded))

    def _item(self, recorded: RecordedEvent) -> Item:
        event, body = recorded.event, recorded.event.body
        name = item_id(event.tenant, event.event_id)
        requested = event.kind == REQUESTED
        answers = body["answers"] if requested else _pair(event.interaction_id, body)
        overlap = int(name[:8], 16) / 2**32 < self._settings.overlap_share
        return Item(
            name, event.tenant, event.workspace, body["reason"] if requested else "disagreement",
            recorded.recorded_at_us, recorded.seq, event.agent, event.user_id, answers,
            body.get("messages", []), max(body.get("reviewers", 1), 2 if overlap else 1),
        )  # fmt: skip

    def _add(self, item: Item) -> None:
        place = (item.tenant, item.workspace)
        day = item.at_us // DAY_US
        if item.reason != "evaluation" and self._room(place, day, item.reason) < 1:
            return
        self._days[place, day, item.reason] += 1
        self._items[item.item_id] = item
        for name in item.names:
            self._by_interaction.setdefault((item.tenant, name), set()).add(item.item_id)

    def _room(self, place: Place, day: int, reason: str) -> int:
        """How many more items of this reason the day has room for."""
        given = {r: self._days[place, day, r] for r in ORDER if r != "evaluation"}
        left = self._settings.per_day - sum(given.values())
        if reason != "disagreement":
            return left
        return min(left, room_for(self._settings)["disagreement"] - given["disagreement"])

    def _named(self, recorded: RecordedEvent) -> Iterator[Item]:
        """The items that a label or a skip is about: those of its interaction, where it names none."""
        event = recorded.event
        named = event.body.get("item_id")
        names = {named} if named else self._by_interaction.get((event.tenant, event.interaction_id or ""), set())
        for name in names:
            if (item := self._items.get(name)) is not None and item.tenant == event.tenant:
                yield item

    def _erase(self, ranges: list[list[int]]) -> None:
        gone = [i.item_id for i in self._items.values() if any(first <= i.seq <= last for first, last in ranges)]
        for name in gone:
            self._forget(name)

    def _forget(self, name: str) -> None:
        item = self._items.pop(name)
        for interaction in item.names:
            known = self._by_interaction.get((item.tenant, interaction), set())
            known.discard(name)
            if not known:
                self._by_interaction.pop((item.tenant, interaction), None)


def room_for(settings: LabellingSettings) -> Mapping[str, int]:
    """How many items a day each reason gets where all of them have enough to offer."""
    uncertain = round(settings.per_day * settings.uncertainty_share)
    checks = min(round(settings.per_day * settings.spot_check_share), settings.per_day - uncertain)
    return {
        "uncertainty": uncertain,
        "spot_check": checks,
        "disagreement": settings.per_day - uncertain - checks,
    }


def _pair(live: str | None, body: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {"version": body["live_version"], "interaction_id": live},
        {"version": body["shadow_version"], "interaction_id": body["shadow_interaction_id"]},
    ]


def first_seq_at(engine: Engine, at_us: int) -> int:
    """The first `seq` recorded at this time or later: both grow together, so halving finds it."""
    with engine.connect() as connection:
        low, high = 1, (connection.execute(sa.select(sa.func.max(events.c.seq))).scalar() or 0) + 1
        while low < high:
            middle = (low + high) // 2
            query = sa.select(events.c.recorded_at_us).where(events.c.seq == middle)
            if (connection.execute(query).scalar() or 0) < at_us:
                low = middle + 1
            else:
                high = middle
    return low
