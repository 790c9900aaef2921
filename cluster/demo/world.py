"""The demo's world: alerts, the old runbook, and the rules that hold today.

An alert has ten fields; its triage is a verdict and an owner. The base model has read tickets that mostly
follow the old runbook. Today's rules add two things the runbook never knew: alert history (`repeats`) and
open change tickets (`change`).

`todays_rules` is the truth. Only two readers may call it: the simulated analysts, who react to answers
as people who know their job would, and the final report on held-out alerts. Nothing that trains, evaluates
or decides sees it.

Base, live and held-out alerts never overlap, whatever the seeds: the hash of an alert's own fields says
which of the three it may belong to.
"""

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from typing import Any, Literal

Message = dict[str, Any]
Pool = Literal["base", "live", "held_out"]

AGENT = "triage"
INSTRUCTIONS = "Triage the alert. Answer in JSON."
SERVICES = {
    "checkout": "payments",
    "billing": "payments",
    "search": "discovery",
    "catalog": "discovery",
    "login": "identity",
    "profile": "identity",
    "shipping": "logistics",
    "tracking": "logistics",
}
"""Each service and the team that owns it."""
SPECIALISTS = {"certificate": "security"}
"""Kinds of error that go to a specialist team instead."""
SEVERITIES = ("low", "medium", "high", "critical")
SOURCES = ("metrics", "logs", "probe", "customer")
REGIONS = ("dublin", "frankfurt", "virginia", "oregon", "mumbai", "sydney")
TIERS = ("internal", "standard", "premium")
ERRORS = ("timeout", "crash", "latency", "saturation", "certificate")
FREQUENT_REPEATS = 4
"""From this many repeats in a day on, today's rules wake somebody."""
CHANGE_TEAM = "release"
HELD_OUT_BUCKETS, LIVE_BUCKETS, BUCKETS = 2, 8, 20
"""Of 20 hash buckets, the first two are held out, the next six are live, the rest teach the base."""


@dataclass(frozen=True, slots=True)
class Alert:
    """One alert, as the agent sees it."""

    service: str
    severity: str
    source: str
    region: str
    hour: int
    tier: str
    error: str
    maintenance: bool
    repeats: int
    """How often the same alert fired in the last day."""
    change: str
    """The open change ticket on the service, or `none`."""


@dataclass(frozen=True, slots=True)
class Triage:
    """What to do about an alert, and who does it."""

    verdict: str
    owner: str


def old_runbook(alert: Alert) -> Triage:
    """The triage by the runbook most of the base's tickets follow."""
    return Triage(_runbook_verdict(alert), SPECIALISTS.get(alert.error, SERVICES[alert.service]))


def _runbook_verdict(alert: Alert) -> str:
    if alert.maintenance:
        return "ignore"
    if alert.severity == "critical" or (alert.severity == "high" and alert.tier == "premium"):
        return "page"
    if alert.severity == "low" or (alert.severity == "medium" and alert.tier == "internal"):
        return "ignore"
    return "ticket"


def todays_rules(alert: Alert) -> Triage:
    """The truth: the old runbook, then open change tickets, then alert history."""
    usual = old_runbook(alert)
    if alert.change != "none":
        return Triage("ticket", CHANGE_TEAM)
    if alert.repeats >= FREQUENT_REPEATS:
        return Triage("page", usual.owner)
    return usual


def pool_of(alert: Alert) -> Pool:
    """The only set this alert may be part of."""
    bucket = int.from_bytes(hashlib.sha256(repr(astuple(alert)).encode()).digest()[:8], "big") % BUCKETS
    if bucket < HELD_OUT_BUCKETS:
        return "held_out"
    return "live" if bucket < LIVE_BUCKETS else "base"


def alerts(pool: Pool, seed: int) -> Iterator[Alert]:
    """An endless stream of alerts of one pool; the same seed gives the same stream."""
    source = random.Random(f"{pool}/{seed}")
    while True:
        alert = _draw(source)
        if pool_of(alert) == pool:
            yield alert


def _draw(source: random.Random) -> Alert:
    frequent = source.random() < 0.33
    return Alert(
        service=source.choice(list(SERVICES)),
        severity=source.choices(SEVERITIES, weights=(3, 4, 3, 2))[0],
        source=source.choice(SOURCES),
        region=source.choice(REGIONS),
        hour=source.randrange(24),
        tier=source.choice(TIERS),
        error=source.choice(ERRORS),
        maintenance=source.random() < 0.12,
        repeats=source.randint(FREQUENT_REPEATS, 9) if frequent else source.randrange(FREQUENT_REPEATS),
        change=f"CHG-{source.randrange(100, 1000)}" if source.random() < 0.22 else "none",
    )


def prompt(alert: Alert) -> list[Message]:
    """The chat messages that ask for a triage."""
    fields = {name: getattr(alert, name) for name in Alert.__slots__}
    fields["maintenance"] = "yes" if alert.maintenance else "no"
    line = " ".join(f"{name}={value}" for name, value in fields.items())
    return [{"role": "system", "content": INSTRUCTIONS}, {"role": "user", "content": line}]


def answer(triage: Triage) -> str:
    """The triage as the agent writes it."""
    return json.dumps({"verdict": triage.verdict, "owner": triage.owner})


def parse_answer(text: str) -> Triage | None:
    """The triage in an answer; `None` where it is not the JSON that was asked for."""
    try:
        fields = json.loads(text)
    except ValueError:
        return None
    if not isinstance(fields, dict) or set(fields) != {"verdict", "owner"}:
        return None
    if not all(isinstance(value, str) for value in fields.values()):
        return None
    return Triage(fields["verdict"], fields["owner"])


def base_corpus(seed: int, count: int, todays_share: float) -> Iterator[dict[str, list[Message]]]:
    """Solved tickets that teach the base: `todays_share` of them by today's rules, the rest by the runbook."""
    source = random.Random(f"corpus/{seed}")
    for _, alert in zip(range(count), alerts("base", seed), strict=False):
        triage = todays_rules(alert) if source.random() < todays_share else old_runbook(alert)
        yield {"messages": [*prompt(alert), {"role": "assistant", "content": answer(triage)}]}
