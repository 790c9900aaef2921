"""Durability of the log: a hundred kill -9, a hundred thousand different events, a fifth of all sendings retries.

    python -m tests.bench.durability [--kills 100] [--events 100000] [--seed 1]

Eight clients append through the group commit of one process, which is killed at a random moment and started
again; each client then sends again what it had no answer for. At the end every acknowledged event must be in the
log once, and `rayloop verify` must find no fault. On SQLite and on PostgreSQL (RAYLOOP_TEST_POSTGRES, else
127.0.0.1:5432).

A kill leaves what the system has cached, so it says nothing about a loss of power. For SQLite that is played out:
`fsynced.c` (needs gcc) is preloaded into an appender and keeps beside each file a copy that takes up writes only when
they are fsynced. Those copies, opened as a database, must hold every event acknowledged before. PostgreSQL is
asked whether it fsyncs what it acknowledges.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from cluster.database import connect
from cluster.settings import Settings, load_settings
from data.verify.run import verify_log
from tests.bench._power_loss import lost_without_power
from tests.bench.ingestion import POSTGRES
from tests.data.kill_cycles import Outcome, run_cycles

LEAST_RETRIED = 0.2
PROMISES = ("fsync", "synchronous_commit", "full_page_writes")


@contextmanager
def fresh_database(kind: str, folder: Path) -> Iterator[tuple[Engine, Settings]]:
    """An empty log."""
    name = f"rayloop_durability_{uuid.uuid4().hex[:8]}"
    url = f"sqlite:///{folder / 'durable.db'}"
    if kind == "postgres":
        url = sa.make_url(POSTGRES).set(database=name).render_as_string(hide_password=False)
        with psycopg.connect(POSTGRES, autocommit=True) as admin:
            admin.execute(f"CREATE DATABASE {name}")
    settings = load_settings(home=folder / "home", database={"url": url})[0]
    engine = connect(settings)
    try:
        yield engine, settings
    finally:
        engine.dispose()
        if kind == "postgres":
            with psycopg.connect(POSTGRES, autocommit=True) as admin:
                admin.execute(f"DROP DATABASE {name} WITH (FORCE)")


def report(kind: str, outcome: Outcome, faults: int) -> bool:
    """Print one line; true when nothing was lost and as much was sent again as is claimed."""
    print(
        f"{kind:<9} {outcome.kills} kills, {outcome.distinct} events acknowledged {outcome.acknowledged} times "
        f"({outcome.share_retried:.1%} of it retries), {outcome.stored.total()} in the log: "
        f"{len(outcome.lost)} acknowledged lost, {len(outcome.doubled)} counted twice, {faults} faults",
        flush=True,
    )
    return not outcome.lost and not outcome.doubled and not faults and outcome.share_retried >= LEAST_RETRIED


def main() -> int:
    """Both databases; 1 if anything was lost, or could not be tried."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--events", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--database", choices=["sqlite", "postgres"], action="append")
    options = parser.parse_args()
    if "sqlite" in (options.database or ["sqlite"]) and not shutil.which("gcc"):
        sys.exit("error: gcc is needed to build the library that forgets what was not fsynced; install it")
    good = True
    for kind in options.database or ["sqlite", "postgres"]:
        with tempfile.TemporaryDirectory() as name, fresh_database(kind, Path(name)) as (engine, settings):
            outcome = run_cycles(
                engine, Path(name), kills=options.kills, min_events=options.events, longest_s=0.6, seed=options.seed
            )
            good &= report(kind, outcome, verify_log(engine, settings).fault_count)
            if kind == "postgres":
                with engine.connect() as connection:
                    said = {p: connection.execute(sa.text(f"SHOW {p}")).scalar() for p in PROMISES}
                print("postgres ", ", ".join(f"{name} {value}" for name, value in said.items()))
                good &= set(said.values()) == {"on"}
        if kind == "sqlite":
            acknowledged, lost = lost_without_power(seconds=8.0)
            print(f"sqlite    from fsynced bytes only: {lost} of {acknowledged} acknowledged events lost")
            good &= not lost and acknowledged > 0
            acknowledged, lost = lost_without_power(seconds=3.0, careless=True)
            print(f"sqlite    the same without fsync: {lost} of {acknowledged} lost (so a loss would be seen)")
            good &= lost > 0
    return 0 if good else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.CalledProcessError as error:
        sys.exit(f"error: {error}")
