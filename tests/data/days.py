"""A log of several days, and the moment after them: for tests of sealing, verifying and erasing."""

from sqlalchemy.engine import Engine

from cluster.clock import DAY_US
from data.events import Event, parse_body
from data.log import EventLog

DAY0_US = 20_000 * DAY_US
DAY0 = "2024-10-04"
AFTER_US = DAY0_US + 3 * DAY_US + 1
"""Days 0 to 2 are over."""


def at(day: int, second: int = 0) -> int:
    """A moment of one of the days."""
    return DAY0_US + day * DAY_US + second * 1_000_000


def said(event_id: str, day: int = 0, *, user: str | None = "u-ann", about: str = "i1", text: str = "") -> Event:
    """Feedback, a correction where `text` is given."""
    body = {"type": "correction", "text": text} if text else {"type": "thumbs_up"}
    return Event(
        "feedback", "default", "default", parse_body("feedback", body),
        event_id=event_id, occurred_at_us=at(day), user_id=user, interaction_id=about,
    )  # fmt: skip


def asked(
    interaction_id: str, day: int = 0, *, user: str | None = "u-ann", text: str = "why?", **envelope: str
) -> Event:
    """An interaction with token ids."""
    body = {
        "messages": [{"role": "user", "content": text}],
        "response": {"role": "assistant", "content": f"because of {text}"},
        "prompt_token_ids": [1, 2, 70_000],
        "completion_token_ids": [3],
        "completion_logprobs": [-0.25],
    }
    return Event(
        "interaction", "default", "default", parse_body("interaction", body), event_id=f"e-{interaction_id}",
        occurred_at_us=at(day), user_id=user, interaction_id=interaction_id, agent="triage", **envelope,
    )  # fmt: skip


def three_days(engine: Engine, events_a_day: int = 20) -> list[str]:
    """Fills the log with days 0 to 2; returns the event ids in order."""
    batch = []
    for day in range(3):
        for number in range(events_a_day // 2):
            name = f"{day}-{number}"
            batch += [
                asked(name, day, user=f"u{number % 5}"),
                said(f"e-said-{name}", day, about=name, user=f"u{number % 5}"),
            ]
    EventLog(engine).append(batch)
    return [event.event_id for event in batch]
