"""What reviewers get besides disagreements: the answers the model was least sure of, and some at random.

How sure a model was is the mean log-probability of its answer's tokens, as captured. Random answers keep the
labels representative: whatever the rest misses can still be found there.
"""

import random

from sqlalchemy.engine import Engine

from cluster.clock import DAY_US, now_us
from cluster.settings import Settings
from data.events import Event
from data.label_bodies import Reason
from data.labelling.queue import LabelQueue, first_seq_at, room_for
from data.labelling.requests import AnswerToLabel, LabelRequest, request_labels
from data.log import EventLog


def sample_for_labelling(engine: Engine, settings: Settings, queue: LabelQueue, now: int | None = None) -> int:
    """Ask for labels of the last day's answers, as far as today has room; returns how many were asked for.

    Asking again changes nothing until there is room: an answer is asked for once.
    """
    now = now_us() if now is None else now
    drawn = 0
    places: dict[tuple[str, str], list[Event]] = {}
    for event in _recent_answers(engine, settings, now):
        places.setdefault((event.tenant, event.workspace), []).append(event)
    for (tenant, workspace), answers in places.items():
        given = queue.today(tenant, workspace, now)
        known = queue.interactions(tenant)
        fresh = [event for event in answers if event.interaction_id not in known]
        room = {reason: most - given[reason] for reason, most in room_for(settings.labelling).items()}
        chosen = _chosen(fresh, room["uncertainty"], room["spot_check"])
        request_labels(EventLog(engine), [_request(event, reason) for event, reason in chosen])
        drawn += len(chosen)
    return drawn


def _recent_answers(engine: Engine, settings: Settings, now: int) -> list[Event]:
    """Answers of the last day that somebody saw: all of them, or a random sample where there are many."""
    log, most = EventLog(engine), settings.labelling.sampled_events
    first, last = first_seq_at(engine, now - DAY_US), log.last_seq()
    span = range(first, last + 1)
    seqs = sorted(random.sample(span, most)) if len(span) > most else list(span)
    found = (recorded.event for recorded in log.at(seqs, kinds=("interaction",)) if not recorded.erased)
    return [event for event in found if _is_answer(event)]


def _is_answer(event: Event) -> bool:
    body = event.body
    flags = body.get("flags") or {}
    seen = body.get("arm") != "shadow" and not flags.get("shadow") and not flags.get("error")
    return seen and bool(body.get("response")) and event.interaction_id is not None


def _chosen(answers: list[Event], uncertain: int, checks: int) -> list[tuple[Event, Reason]]:
    known = [(sum(p) / len(p), event) for event in answers if (p := event.body.get("completion_logprobs"))]
    known.sort(key=lambda pair: (pair[0], pair[1].event_id))
    least_sure = [event for _, event in known[: max(uncertain, 0)]]
    taken = {event.event_id for event in least_sure}
    rest = [event for event in answers if event.event_id not in taken]
    drawn = random.sample(rest, min(max(checks, 0), len(rest)))
    pairs: list[tuple[Event, Reason]] = [(event, "uncertainty") for event in least_sure]
    return pairs + [(event, "spot_check") for event in drawn]


def _request(event: Event, reason: Reason) -> LabelRequest:
    body = event.body
    version = body.get("served_version") or body.get("requested") or "unknown"
    return LabelRequest(
        f"sampled:{event.interaction_id}", event.tenant, event.workspace, reason,
        (AnswerToLabel(version, interaction_id=event.interaction_id),), agent=event.agent, user_id=event.user_id,
    )  # fmt: skip
