"""Synthetic traffic for tests of curation: alerts from small vocabularies, and what people said."""

import random
from collections.abc import Sequence
from typing import Any

from data.events import Event, parse_body

FIELDS = {
    "service": ["checkout", "search", "billing", "login", "mail", "ledger"],
    "severity": ["low", "medium", "high", "critical"],
    "region": ["eu-west", "us-east", "ap-south", "sa-east"],
    "signal": ["latency", "errors", "saturation", "traffic"],
    "threshold": ["p50", "p95", "p99", "max"],
    "duration": ["1m", "5m", "15m", "1h"],
    "recent deploy": ["yes", "no"],
    "open ticket": ["yes", "no"],
    "history": ["never", "weekly", "daily", "flapping"],
    "hour": ["night", "morning", "day", "evening"],
}
OWNERS = ["payments", "platform", "network", "data"]
START_US = 1_790_000_000_000_000


def alert(rng: random.Random) -> str:
    """Ten `field: value` lines."""
    return "\n".join(f"{name}: {rng.choice(values)}" for name, values in FIELDS.items())


def answer(verdict: str, owner: str) -> str:
    """The agent's short JSON."""
    return f'{{"verdict": "{verdict}", "owner": "{owner}"}}'


def interaction(
    number: int, question: str, reply: str | None, *, user: str, agent: str = "triage", **body: Any
) -> Event:
    """An interaction event; its id is `i<number>`."""
    messages = [{"role": "system", "content": "You triage alerts."}, {"role": "user", "content": question}]
    response = None if reply is None else {"role": "assistant", "content": reply}
    content = {"messages": messages, "response": response, "finish_reason": "stop", **body}
    return Event(
        "interaction",
        "default",
        "default",
        parse_body("interaction", {k: v for k, v in content.items() if v is not None}),
        event_id=f"e-i{number}",
        occurred_at_us=START_US + number * 60_000_000,
        user_id=user,
        session_id=f"s-{user}",
        agent=agent,
        interaction_id=f"i{number}",
    )


def feedback(number: int, kind: str, reward: float, *, user: str, tag: str = "", **body: Any) -> Event:
    """A feedback event about `i<number>`."""
    return Event(
        "feedback",
        "default",
        "default",
        parse_body("feedback", {"type": kind, "reward": reward, **body}),
        event_id=f"e-f{number}{kind}{tag}{user}",
        occurred_at_us=START_US + number * 60_000_000 + 5_000_000,
        user_id=user,
        interaction_id=f"i{number}",
    )


def traffic(interactions: int, users: int = 60, seed: int = 0) -> list[Event]:
    """A shuffled log: thumbs on most answers, corrections on some bad ones."""
    rng = random.Random(seed)
    events: list[Event] = []
    for number in range(interactions):
        user = f"user{rng.randrange(users)}"
        good = rng.random() < 0.65
        reply = answer("page" if good else "ignore", rng.choice(OWNERS))
        events.append(interaction(number, alert(rng), reply, user=user))
        if rng.random() < 0.8:
            kind, reward = ("thumbs_up", 1.0) if good else ("thumbs_down", -1.0)
            events.append(feedback(number, kind, reward, user=user))
        if not good and rng.random() < 0.4:
            text = answer("page", rng.choice(OWNERS))
            events.append(feedback(number, "correction", -0.5, user=user, text=text))
    rng.shuffle(events)
    return events


def texts(count: int, seed: int = 0) -> Sequence[str]:
    """Distinct alerts."""
    rng = random.Random(seed)
    return [alert(rng) for _ in range(count)]
