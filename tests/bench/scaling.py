"""What one more event, user or router replica costs: measured slopes, for the arithmetic of `docs/scaling.md`.

    python -m tests.bench.scaling events [--sizes 10000 20000 40000]
    python -m tests.bench.scaling users [--sizes 2000 4000 8000]
    python -m tests.bench.scaling replicas [--sizes 1 2] [--seconds 5]

`events`: bytes and microseconds an event in the log, on SQLite and on PostgreSQL (RAYLOOP_TEST_POSTGRES, else
127.0.0.1:5432). Half are interactions (a question and an answer of 60 words each), half feedback on them.
`users`: bytes and microseconds a user of an experiment's sums, three requests and as many thumbs each, and how long a
decision's evidence takes to read. `replicas`: requests a second through 1, 2, … router replicas with capture on;
upstream, load and replicas share the machine, so more replicas than spare cores only share them out. Slopes are
least squares over the sizes.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from cluster.database import connect
from cluster.settings import Settings, load_settings
from data.events import Event, parse_body
from data.log import EventLog
from serve.experiments.exposures import RAMP
from serve.experiments.projection import Projection
from serve.experiments.readings import read_evidence
from tests.bench.curation import make_rows
from tests.bench.ingestion import postgres_database
from tests.bench.router import rayloop, upstream
from tests.serve.rollout_world import Population, fixed_split

BATCH = 1000
TURNS = 3
START_US = 1_790_000_000_000_000
EXPERIMENT = "exp"


def slope(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Cost of one more, by least squares."""
    return float(np.polyfit(sizes, costs, 1)[0])


def stored_bytes(engine: Engine) -> int:
    """What a database takes on disk, its write-ahead log folded in."""
    with engine.connect() as connection:
        if engine.dialect.name == "sqlite":
            connection.execute(sa.text("PRAGMA wal_checkpoint(TRUNCATE)"))
            pages, size = (
                connection.execute(sa.text(f"PRAGMA {name}")).scalar() for name in ("page_count", "page_size")
            )
            return int(pages or 0) * int(size or 0)
        return int(connection.execute(sa.text("SELECT pg_database_size(current_database())")).scalar() or 0)


def pairs_of_events(count: int) -> Iterator[list[Event]]:
    """Interactions and feedback on them, in batches."""
    batch: list[Event] = []
    for row in make_rows(count // 2):
        number = row["number"]
        ids: dict[str, Any] = {"user_id": f"u{number % 5000}", "agent": "a", "interaction_id": f"i{number}"}
        said = {
            "messages": [{"role": "user", "content": row["question"]}],
            "response": {"role": "assistant", "content": row["answer"]},
            "finish_reason": "stop",
        }
        liked = {"type": "thumbs_up", "reward": 1.0}
        for kind, body in (("interaction", said), ("feedback", liked)):
            made = parse_body(kind, body)
            batch.append(Event(kind, "default", "default", made, occurred_at_us=START_US + number, **ids))
        if len(batch) >= BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def log_cost(settings: Settings, count: int) -> tuple[float, float]:
    """Bytes and seconds of so many events, beyond what an empty log takes."""
    engine = connect(settings)
    try:
        empty, log, seconds = stored_bytes(engine), EventLog(engine), 0.0
        for batch in pairs_of_events(count):
            begun = time.perf_counter()
            log.append(batch)
            seconds += time.perf_counter() - begun
        assert log.last_seq() == count, f"{count} events were appended, the log holds {log.last_seq()}"
        return stored_bytes(engine) - empty, seconds
    finally:
        engine.dispose()


def measure_events(sizes: Sequence[int], _: argparse.Namespace) -> None:
    """Slopes of the log."""
    for name in ("SQLite", "PostgreSQL"):
        costs = []
        for size in sizes:
            with tempfile.TemporaryDirectory() as folder:
                if name == "SQLite":
                    costs.append(log_cost(load_settings(home=folder)[0], size))
                    continue
                with postgres_database() as url:
                    costs.append(log_cost(load_settings(home=folder, database={"url": url})[0], size))
        for size, (used, seconds) in zip(sizes, costs, strict=True):
            print(f"{name:10} {size:>8,} events  {used / 1e6:8.1f} MB  {seconds:6.2f} s")
        taken, seconds_each = (slope(sizes, [cost[i] for cost in costs]) for i in (0, 1))
        print(f"{name:10} one more event: {taken:,.0f} bytes, {1e6 * seconds_each:.0f} µs in batches of {BATCH}")


def user_cost(folder: Path, users: int) -> tuple[float, float, float]:
    """Bytes and seconds of the sums of so many users, and seconds to read a decision's evidence."""
    settings = load_settings(home=folder)[0]
    engine = connect(settings)
    try:
        log, population = EventLog(engine), Population(users=users, reacts=1.0)
        for turn in range(TURNS):
            for start in range(0, users, BATCH):
                asking = range(start, min(start + BATCH, users))
                population.ask(log, fixed_split(0.5, "salt"), asking, START_US + turn * 1_000_000)
        before, begun = stored_bytes(engine), time.perf_counter()
        counted = Projection(engine, settings).catch_up()
        seconds = time.perf_counter() - begun
        assert counted == 2 * TURNS * users, f"{counted} of {2 * TURNS * users} events were counted"
        begun = time.perf_counter()
        read_evidence(engine, EXPERIMENT, settings.experiment, period=RAMP)
        return stored_bytes(engine) - before, seconds, time.perf_counter() - begun
    finally:
        engine.dispose()


def measure_users(sizes: Sequence[int], _: argparse.Namespace) -> None:
    """Slopes of an experiment's sums."""
    costs = []
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            costs.append(user_cost(Path(folder), size))
        used, seconds, read_s = costs[-1]
        print(f"{size:>8,} users  {used / 1e6:7.2f} MB  {seconds:6.2f} s to count  {1e3 * read_s:6.1f} ms to read")
    taken, seconds_each = (slope(sizes, [cost[i] for cost in costs]) for i in (0, 1))
    print(f"one more user: {taken:,.0f} bytes, {1e6 * seconds_each:.0f} µs for {2 * TURNS} events of his")


def measure_replicas(sizes: Sequence[int], options: argparse.Namespace) -> None:
    """Requests a second through so many router replicas, and through none."""
    with upstream() as url, tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            with rayloop(url, Path(folder) / str(size), "haproxy", replicas=size) as way:
                way.check()
                way.load("whole", 32, 1.0)
                found = way.load("whole", 32, options.seconds)
            print(f"{size} replicas  {found['rps']:8,.0f} requests/s  p50 {found['p50_ms']:.2f} ms", flush=True)


MEASURES: dict[str, tuple[Callable[[Sequence[int], argparse.Namespace], None], list[int]]] = {
    "events": (measure_events, [10_000, 20_000, 40_000]),
    "users": (measure_users, [2_000, 4_000, 8_000]),
    "replicas": (measure_replicas, [1, 2]),
}


def main() -> None:
    """The named one, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("name", nargs="?", choices=MEASURES)
    parser.add_argument("--sizes", type=int, nargs="+")
    parser.add_argument("--seconds", type=float, default=5.0)
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores")
    for name in [options.name] if options.name else MEASURES:
        measure, sizes = MEASURES[name]
        measure(options.sizes or sizes, options)


if __name__ == "__main__":
    main()
