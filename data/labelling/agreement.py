"""How far the reviewers of a workspace agree, on what more than one of them judged."""

from collections import defaultdict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass

from data.events import Event
from data.labelling.krippendorff import Level, krippendorff_alpha
from data.labelling.requests import LABEL, is_flipped
from data.log import EventLog

PREFERENCE = "preference"
Unit = tuple[str, ...]
Said = tuple[str, str, str]
"""Reviewer, item and answer."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """Krippendorff's alpha of one thing that is judged."""

    name: str
    """`preference`, or a criterion of the score card."""
    alpha: float | None
    """`None`: nothing that two people judged differs in the least, or there is nothing."""
    judged_twice: int
    """Items, or answers, that more than one reviewer judged."""
    reviewers: int


def agreement_of(event_log: EventLog, tenant: str, workspace: str) -> list[Agreement]:
    """Agreement on preferences (nominal) and on each criterion (interval), newest label of a reviewer only."""
    given: dict[str, dict[Unit, dict[str, Hashable]]] = defaultdict(lambda: defaultdict(dict))
    newest = _newest(event_log, tenant, workspace)
    for (reviewer, item, answer), event in newest.items():
        for criterion, value in event.body.get("scores", {}).items():
            given[criterion][item, answer][reviewer] = value
    for (reviewer, item), preferred in _preferences(newest).items():
        given[PREFERENCE][(item,)][reviewer] = preferred
    return [_agreement(name, given[name]) for name in sorted(given, key=lambda n: (n != PREFERENCE, n))]


def _agreement(name: str, units: dict[Unit, dict[str, Hashable]]) -> Agreement:
    level: Level = "nominal" if name == PREFERENCE else "interval"
    values = [tuple(by_reviewer.values()) for by_reviewer in units.values()]
    people = {reviewer for by_reviewer in units.values() for reviewer in by_reviewer}
    return Agreement(name, krippendorff_alpha(values, level), sum(len(v) > 1 for v in values), len(people))


def _newest(event_log: EventLog, tenant: str, workspace: str) -> dict[Said, Event]:
    """The newest label of each reviewer about each answer of each item."""
    labels = [
        recorded.event
        for recorded in event_log.scan(kinds=(LABEL,), tenant=tenant)
        if not recorded.erased and recorded.event.workspace == workspace
    ]
    newest = {}
    for event in sorted(labels, key=lambda e: (e.occurred_at_us, e.event_id)):
        about = event.body.get("answer") or event.interaction_id or ""
        newest[event.body["reviewer"], event.body.get("item_id") or about, about] = event
    return newest


def _preferences(newest: Mapping[Said, Event]) -> dict[tuple[str, str], str]:
    """Whether each reviewer preferred the answer shown first or second, of items with two, or neither.

    By how they were shown, not by whose they are: where one version is always better, everybody saying so would
    else be what chance gives.
    """
    judged: dict[tuple[str, str], dict[str, Event]] = defaultdict(dict)
    for (reviewer, item, answer), event in newest.items():
        judged[reviewer, item][answer] = event
    return {
        (reviewer, item): _shown_place(item, sorted(said), next(iter(said.values())).body.get("preferred"))
        for (reviewer, item), said in judged.items()
        if len(said) == 2
    }


def _shown_place(item: str, names: list[str], preferred: str | None) -> str:
    if preferred not in names:
        return "tie"
    return "first" if (names.index(preferred) == 0) is not is_flipped(item) else "second"
