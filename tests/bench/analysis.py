"""Analysis of an experiment over 2·10^7 events, from running sums, against DuckDB's query per user.

    python -m tests.bench.analysis [--events 20000000] [--users 1000000] [--logged 60000] [--repeats 5]

DuckDB is installed into an environment of its own, under `RAYLOOP_BENCH_CACHE` (by default
`~/.cache/rayloop-bench`), holds the events in a table of its own and groups them by user, then by arm, on all cores.
Ours reads the sums that were kept while the events came in. Both must give the same moments to 1e-9.

The 2·10^7 events are folded into the sums in pages by the function the projection uses (`moments.contributions`);
writing so many bodies into the log first would only measure the log. `--logged` events do go through the log and the
projection itself, on SQLite: what that costs, and that its moments are DuckDB's too.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet

from cluster.database import connect, write
from cluster.settings import Settings, load_settings
from cluster.tables import arm_moments, experiment_arms
from data.log import EventLog
from data.moments import EVERYBODY, TERMS, contributions
from serve.experiments.comparisons import Moments
from serve.experiments.exposures import RAMP
from serve.experiments.projection import Projection
from serve.experiments.readings import read_evidence, read_moments
from tests.bench._peer import peer_python
from tests.serve.rollout_world import Population, fixed_split

TARGET = 1000.0
PEER = "duckdb==2.0.0"
PAGE = 100_000
EXPERIMENT, METRIC = "exp", "satisfaction"
ARMS = ("control", "candidate")
COMPARED = TERMS[:8]

PEER_CODE = """
import json, sys, time
import duckdb

file, repeats = sys.argv[1], int(sys.argv[2])
database = duckdb.connect()
database.execute("SET enable_progress_bar = false")  # it would be printed among the numbers on a busy machine
database.execute(f"CREATE TABLE events AS SELECT * FROM read_parquet('{file}')")
query = '''
SELECT arm, count(*), sum(n), sum(y), sum(n * n), sum(n * y), sum(y * y), sum(m), sum(m * m)
FROM (SELECT arm, user_id, count(*)::DOUBLE AS n, sum(value) AS y, sum(value) / count(*) AS m FROM events
      GROUP BY arm, user_id) GROUP BY arm ORDER BY arm
'''
seconds = []
for _ in range(repeats):
    begun = time.perf_counter()
    rows = database.execute(query).fetchall()
    seconds.append(time.perf_counter() - begun)
events = database.execute("SELECT count(*) FROM events").fetchone()[0]
print(json.dumps({"seconds": seconds, "rows": rows, "events": events}))
"""


def make_events(events: int, users: int, seed: int = 0) -> dict[str, npt.NDArray[Any]]:
    """Rewards of users who come back unequally often, each user in one arm."""
    random = np.random.default_rng(seed)
    user = (users * random.random(events) ** 2).astype(np.int32)
    taste = random.beta(2.8, 1.2, users)
    value = np.where(random.random(events) < taste[user], 1.0, -1.0) * random.choice([0.5, 0.7, 1.0], events)
    return {"user_id": user, "arm": (user % 2).astype(np.int8), "value": value}


def fold(events: dict[str, npt.NDArray[Any]], users: int) -> tuple[dict[str, Moments], float]:
    """The arms' sums, kept up page by page, and the seconds it took."""
    count_U, total_U = np.zeros(users), np.zeros(users)
    sums = {arm: np.zeros(len(TERMS)) for arm in ARMS}
    begun = time.perf_counter()
    for start in range(0, len(events["user_id"]), PAGE):
        touched_T, place_N = np.unique(events["user_id"][start : start + PAGE], return_inverse=True)
        before = contributions(count_U[touched_T], total_U[touched_T], np.full(touched_T.size, np.nan))
        count_U[touched_T] += np.bincount(place_N, minlength=touched_T.size)
        total_U[touched_T] += np.bincount(place_N, events["value"][start : start + PAGE], touched_T.size)
        change = contributions(count_U[touched_T], total_U[touched_T], np.full(touched_T.size, np.nan)) - before
        for number, arm in enumerate(ARMS):
            sums[arm] += change[touched_T % 2 == number].sum(axis=0)
    return {arm: Moments(*own) for arm, own in sums.items()}, time.perf_counter() - begun


def store(settings: Settings, arms: dict[str, Moments]) -> Any:
    """A database that holds the sums of this metric and, so that it reads as much as a rollout, of the others."""
    engine = connect(settings)
    own = settings.experiment
    rows = [
        {"experiment_id": EXPERIMENT, "segment": segment, "period": RAMP, "metric": metric, "arm": arm}
        | {term: float(getattr(moments, term)) for term in TERMS}
        for metric in (METRIC, *own.guardrails, *own.guardrails_when_present)
        for segment in (EVERYBODY, "tier=pro", "tier=free")
        for arm, moments in arms.items()
    ]
    users = [
        {"experiment_id": EXPERIMENT, "share": 0.5, "arm": arm, "users": arms[side].users, "last_seen_us": 1}
        for arm, side in (("stable", "control"), ("candidate", "candidate"))
    ]
    with write(engine).begin() as connection:
        connection.execute(arm_moments.insert(), rows)
        connection.execute(experiment_arms.insert(), users)
    return engine


def time_of(act: Any, repeats: int) -> float:
    """Median seconds."""
    seconds = []
    for _ in range(repeats):
        begun = time.perf_counter()
        act()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def largest_difference(arms: dict[str, Moments], rows: list[list[float]]) -> float:
    """Relative difference of the worst moment."""
    worst = 0.0
    for arm_number, *theirs in rows:
        ours = [float(getattr(arms[ARMS[int(arm_number)]], term)) for term in COMPARED]
        worst = max(worst, *(abs(a - b) / max(1e-300, abs(b)) for a, b in zip(ours, theirs, strict=True)))
    return worst


class TimedLog(EventLog):
    """A log that sums up the seconds its appends take."""

    seconds = 0.0

    def append(self, batch: Any) -> Any:
        """As the log does."""
        begun = time.perf_counter()
        verdicts = super().append(batch)
        self.seconds += time.perf_counter() - begun
        return verdicts


def ask_peer(python: Path, file: Path, repeats: int) -> Any:
    """What DuckDB finds in these events: `seconds`, `rows` and `events`."""
    command = [python, "-c", PEER_CODE, file, str(repeats)]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def raw_rewards(log: EventLog) -> pa.Table:
    """The rewards in the log with user and arm of their interaction, read without any of the product's counting."""
    asked: dict[str, tuple[str, int]] = {}
    rows = []
    for recorded in log.scan(kinds=["interaction", "feedback"]):
        event = recorded.event
        if event.kind == "interaction":
            asked[str(event.interaction_id)] = (str(event.user_id), int(event.body["arm"] == "candidate"))
        else:
            rows.append((*asked[str(event.interaction_id)], float(event.body["reward"])))
    return pa.table(dict(zip(("user_id", "arm", "value"), zip(*rows, strict=True), strict=True)))


def through_the_log(folder: Path, logged: int, python: Path) -> tuple[float, float, float]:
    """Microseconds an event to append to the log and to count it, on SQLite, and the largest difference of a moment of
    the projection from DuckDB's over the same events."""
    settings = load_settings(home=folder / "ingestion")[0]
    engine = connect(settings)
    log, population = TimedLog(engine), Population(users=2000, reacts=1.0)
    for turn in range(logged // 2 // 1000):
        population.ask(log, fixed_split(0.5, "salt"), range(turn % 2 * 1000, turn % 2 * 1000 + 1000), turn * 1_000_000)
    begun = time.perf_counter()
    counted = Projection(engine, settings).catch_up()
    seconds = time.perf_counter() - begun
    pa.parquet.write_table(raw_rewards(log), folder / "logged.parquet")
    rows = ask_peer(python, folder / "logged.parquet", 1)["rows"]
    worst = largest_difference(read_moments(engine, EXPERIMENT, period=RAMP)[METRIC], rows)
    return 1e6 * log.seconds / counted, 1e6 * seconds / counted, worst


def main() -> int:
    """Run both sides; 1 when the moments differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--events", type=int, default=20_000_000)
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--logged", type=int, default=60_000)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    python = peer_python(PEER)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        events = make_events(options.events, options.users)
        pa.parquet.write_table(pa.table(events), folder / "events.parquet")
        peer = ask_peer(python, folder / "events.parquet", options.repeats)
        arms, fold_s = fold(events, options.users)
        settings = load_settings(home=folder / "home")[0]
        engine = store(settings, arms)
        read_s = time_of(lambda: read_moments(engine, EXPERIMENT, period=RAMP), 20 * options.repeats)
        whole_s = time_of(lambda: read_evidence(engine, EXPERIMENT, settings.experiment, period=RAMP), 10)
        append_us, count_us, projected = through_the_log(folder, options.logged, python)
    theirs = statistics.median(peer["seconds"])
    worst = largest_difference(arms, peer["rows"])
    print(f"{peer['events']:,} events, {options.users:,} users")
    print(f"duckdb, grouped by user      {1e3 * theirs:10.1f} ms")
    print(
        f"ours, the sums of all metrics {1e3 * read_s:9.3f} ms  ratio {theirs / read_s:,.0f} x (target {TARGET:,.0f} x)"
    )
    print(f"ours, a decision's evidence  {1e3 * whole_s:10.3f} ms  ratio {theirs / whole_s:,.0f} x")
    print(f"largest relative difference of a moment {worst:.1e} (allowed 1e-9)")
    print(f"folding them in pages {1e6 * fold_s / options.events:.2f} µs an event, arithmetic only")
    print(
        f"{options.logged:,} events through the log and the projection itself: append {append_us:.0f} µs, count "
        f"{count_us:.0f} µs an event, largest relative difference of a moment from DuckDB's {projected:.1e}"
    )
    return int(not max(worst, projected) <= 1e-9)


if __name__ == "__main__":
    sys.exit(main())
