"""Accuracy on alerts that nothing has seen: the only reading of the truth besides the analysts' own.

It is made after every decision has been taken and goes into the report, never back into the loop.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from cluster.demo import world
from cluster.demo.world import Alert

Z_95 = 1.959963984540054


@dataclass(frozen=True)
class Share:
    """A share of `total` with its 95 % interval."""

    value: float
    low: float
    high: float
    total: int


@dataclass(frozen=True)
class Accuracy:
    """How often a version was right."""

    verdict: Share
    both: Share
    """Verdict and owner."""
    valid: Share
    """Answers that are the JSON asked for."""


def wilson(right: int, total: int) -> Share:
    """Wilson's score interval (Wilson 1927), which holds near 0 and 1 too."""
    if total == 0:
        return Share(math.nan, 0.0, 1.0, 0)
    share = right / total
    spread = Z_95**2 / total
    centre = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread**2 / 4) / (1 + spread)
    return Share(share, max(0.0, centre - half), min(1.0, centre + half), total)


def write_prompts(path: Path, seed: int, count: int) -> list[Alert]:
    """Write the held-out prompts as JSON lines; returns their alerts, in the same order."""
    alerts = list(islice(world.alerts("held_out", seed), count))
    lines = (json.dumps({"messages": world.prompt(alert)}) for alert in alerts)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return alerts


def measure(alerts: Sequence[Alert], answers: Sequence[str]) -> Accuracy:
    """Compare answers with today's rules."""
    truths = [world.todays_rules(alert) for alert in alerts]
    triages = [world.parse_answer(answer) for answer in answers]
    pairs = list(zip(triages, truths, strict=True))
    return Accuracy(
        verdict=wilson(sum(t is not None and t.verdict == truth.verdict for t, truth in pairs), len(pairs)),
        both=wilson(sum(t == truth for t, truth in pairs), len(pairs)),
        valid=wilson(sum(t is not None for t in triages), len(pairs)),
    )
