"""Processes that append to a log and are killed with -9, again and again; then the log is counted."""

import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy.engine import Engine

from data.log import EventLog
from tests.data import appender
from tests.data.appender import ITEMS, THREADS
from tests.processes import redirect, start

ROOT = Path(__file__).parents[2]
START_TIMEOUT_S = 60


@dataclass
class Outcome:
    """What clients were told, and what the log holds."""

    kills: int = 0
    acknowledged: int = 0
    """Acknowledgements of events, those of retries included."""
    retried: int = 0
    """Events acknowledged as duplicates."""
    accepted: Counter[tuple[int, int, int]] = field(default_factory=Counter)
    """How often each event (client, body, item) was reported as new."""
    told: set[tuple[int, int]] = field(default_factory=set)
    """Bodies that were acknowledged."""
    stored: Counter[str] = field(default_factory=Counter)

    @property
    def distinct(self) -> int:
        """Acknowledged events, each once."""
        return len(self.told) * ITEMS

    @property
    def share_retried(self) -> float:
        """Of the acknowledgements, those of events that the log had."""
        return self.retried / max(1, self.acknowledged)

    @property
    def lost(self) -> list[str]:
        """Acknowledged events that are not in the log."""
        return [n for c, b in sorted(self.told) for i in range(ITEMS) if (n := f"{c}-{b}-{i}") not in self.stored]

    @property
    def doubled(self) -> list[str]:
        """Events that are in the log twice, or were reported as new twice."""
        twice = [name for name, count in self.stored.items() if count > 1]
        return twice + ["-".join(map(str, key)) for key, count in self.accepted.items() if count > 1]


def run_cycles(engine: Engine, folder: Path, *, kills: int, min_events: int, longest_s: float, seed: int) -> Outcome:
    """Kill `kills` appenders after random times, and more until `min_events` different events were acknowledged."""
    outcome, chance = Outcome(), random.Random(seed)
    url = engine.url.render_as_string(hide_password=False)
    nexts = [0] * THREADS
    while outcome.kills < kills or outcome.distinct < min_events:
        out = folder / f"acknowledged-{outcome.kills}"
        _append_until_killed(url, nexts, out, chance.uniform(0, longest_s), f"{seed}-{outcome.kills}")
        outcome.kills += 1
        nexts = _take_in(outcome, out, nexts)
    outcome.stored.update(recorded.event.event_id for recorded in EventLog(engine).scan(page=5000))
    return outcome


def _append_until_killed(url: str, nexts: list[int], out: Path, seconds: float, seed: str) -> None:
    out.touch()
    child = start(_append, out, url, json.dumps(nexts), seed)
    deadline = time.monotonic() + START_TIMEOUT_S
    while not out.stat().st_size and time.monotonic() < deadline and child.is_alive():
        time.sleep(0.01)
    time.sleep(seconds)
    child.kill()
    child.join()
    child.close()


def _append(out: Path, *arguments: str) -> None:
    redirect(1, out)
    appender.main(*arguments)


def _take_in(outcome: Outcome, out: Path, nexts: list[int]) -> list[int]:
    """Count the acknowledgements; returns where each client goes on: at the body that may have been cut off."""
    nexts = list(nexts)
    for line in out.read_text().split("\n")[1:-1]:  # without "ready", and without what a torn write left
        client, body, verdicts = line.split()
        key = int(client), int(body)
        outcome.told.add(key)
        outcome.acknowledged += len(verdicts)
        outcome.retried += verdicts.count("d")
        outcome.accepted.update((*key, item) for item, verdict in enumerate(verdicts) if verdict == "a")
        nexts[key[0]] = max(nexts[key[0]], key[1] + 1)
    return nexts
