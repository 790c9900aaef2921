"""What a reviewer sees of an item: the prompt and its answers, scrubbed, without any word of whose they are."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from cluster.clock import to_iso
from cluster.settings import Settings
from data.events import Event, chosen_reports
from data.labelling.queue import Item
from data.log import EventLog
from data.scrub_text import Looks, Placeholders, scrub_value, suspicion

log = logging.getLogger(__name__)

LETTERS = "ab"
"""What reviewers call the answers, in the order in which they are shown."""
Json = dict[str, Any]


def shown_items(event_log: EventLog, items: Sequence[Item], settings: Settings) -> list[Json]:
    """The items as reviewers see them. Left out is what the log no longer has, and what still looks unsafe."""
    found = _interactions(event_log, items)
    documents = []
    for item in items:
        content = _content(item, found)
        document = None if content is None else _scrubbed(content, settings)
        if document is None:
            log.info("item %s of the labelling queue is not shown", item.item_id)
            continue
        documents.append(
            {"item_id": item.item_id, "agent": item.agent, "at": to_iso(item.at_us), "reason": item.reason} | document
        )
    return documents


def places(item: Item) -> Mapping[str, int]:
    """Which answer of the item each letter stands for."""
    shown = range(len(item.answers))
    return dict(zip(LETTERS, reversed(shown) if item.flipped else shown, strict=False))


def _interactions(event_log: EventLog, items: Sequence[Item]) -> dict[tuple[str, str], Event]:
    wanted: dict[str, set[str]] = {}
    for item in items:
        wanted.setdefault(item.tenant, set()).update(a["interaction_id"] for a in item.answers if "interaction_id" in a)
    return {
        (tenant, recorded.event.interaction_id or ""): recorded.event
        for tenant, ids in wanted.items()
        for recorded in chosen_reports(event_log.about(tenant, sorted(ids), kinds=("interaction",)))
        if not recorded.erased
    }


def _content(item: Item, found: Mapping[tuple[str, str], Event]) -> Json | None:
    """Prompt and answers in the order shown; `None` where one of them is gone."""
    messages: list[Json] = item.messages
    context: list[str] = []
    answers: list[Json] = []
    for letter, place in places(item).items():
        answer = item.answers[place]
        message = answer.get("message")
        if "interaction_id" in answer:
            event = found.get((item.tenant, answer["interaction_id"]))
            if event is None or event.workspace != item.workspace:
                return None
            message = event.body.get("response") or {"role": "assistant", "content": ""}
            messages, context = messages or event.body["messages"], context or event.body.get("context") or []
        answers.append({"answer": letter, "message": message})
    return {"messages": messages, "context": context, "answers": answers}


def _scrubbed(content: Json, settings: Settings) -> Json | None:
    """The same without personal data and secrets; one placeholder stands for one value throughout."""
    scrub = settings.curation.scrub
    clean: Json = scrub_value(content, Placeholders(), looks=Looks.of(scrub))
    return clean if suspicion(orjson.dumps(clean).decode(), scrub) is None else None
