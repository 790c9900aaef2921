"""A rollout's controller killed at every point, one point a run, on SQLite and PostgreSQL.

    python -m tests.bench.rollout_kills [--statements 200] [--postgres postgresql://postgres@127.0.0.1:5432/postgres]

Points are those before and after every effect, between decision and application among them, and, evenly chosen,
those around the controller's SQL statements and commits. After each kill another controller takes over. Whatever
the rollout leaves behind must equal what an undisturbed run leaves, and within five seconds. Exit code 1 otherwise.
"""

import argparse
import logging
import sys
import tempfile
import uuid
from pathlib import Path
from typing import get_args

import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from cluster.database import connect
from cluster.settings import load_settings
from tests.serve.rollout_story import WITHIN_S, Ending, tell


def kill_everywhere(engine: Engine, patch: pytest.MonkeyPatch, ending: Ending, statements: int) -> tuple[int, int, int]:
    """Kill points tried, those with another end, and by how many seconds the latest ended later."""
    undisturbed = tell(engine, patch, ending)
    every = max(1, undisturbed.statements // statements)
    runs = [{"effects": [point]} for point in range(1, undisturbed.effects + 1)]
    runs += [{"statements": [point]} for point in range(1, undisturbed.statements + 1, every)]
    wrong, longest_s = 0, 0
    for points in runs:
        disturbed = tell(engine, patch, ending, **points)
        if (disturbed.fingerprint, disturbed.kills) != (undisturbed.fingerprint, 1):
            wrong += 1
            print(f"  differs after {points}, {disturbed.kills} kills")
        longest_s = max(longest_s, disturbed.seconds - undisturbed.seconds)
    return len(runs), wrong, longest_s


def kill_under_traffic(engine: Engine, patch: pytest.MonkeyPatch, ending: Ending, every: int) -> tuple[int, int, int]:
    """The same with users who ask, and with the statistics of what they say; every so many effects."""
    undisturbed = tell(engine, patch, ending, real_evidence=True)
    wrong, longest_s, points = 0, 0, range(1, undisturbed.effects + 1, every)
    for point in points:
        disturbed = tell(engine, patch, ending, effects=[point], real_evidence=True)
        wrong += (disturbed.end, disturbed.kills) != (undisturbed.end, 1)
        longest_s = max(longest_s, disturbed.seconds - undisturbed.seconds)
    return len(points), wrong, longest_s


def main() -> int:
    """Both databases, both endings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--statements", type=int, default=200)
    parser.add_argument("--postgres", default="postgresql://postgres@127.0.0.1:5432/postgres")
    parser.add_argument("--traffic-every", type=int, default=4, help="effects between two kills under traffic")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)  # a controller that dies inside a statement says so at length
    failed = False
    with tempfile.TemporaryDirectory() as home, pytest.MonkeyPatch.context() as patch:
        name = f"rayloop_bench_{uuid.uuid4().hex[:12]}"
        with psycopg.connect(options.postgres, autocommit=True) as admin:
            admin.execute(f"CREATE DATABASE {name}")
            postgres = sa.make_url(options.postgres).set(database=name).render_as_string(hide_password=False)
            for url in (f"sqlite:///{home}/kills.db", postgres):
                engine = connect(load_settings(home=Path(home), database={"url": url})[0])
                for ending in get_args(Ending):
                    tried, wrong, longest_s = kill_everywhere(engine, patch, ending, options.statements)
                    print(f"{engine.dialect.name}, {ending}: {tried} kill points, {wrong} end elsewhere; "
                          f"the latest ends {longest_s} s after an undisturbed run", flush=True)  # fmt: skip
                    failed |= wrong > 0 or longest_s > WITHIN_S
                    tried, wrong, longest_s = kill_under_traffic(engine, patch, ending, options.traffic_every)
                    print(f"{engine.dialect.name}, {ending}, with traffic: {tried} kill points, {wrong} end elsewhere; "
                          f"the latest ends {longest_s} s after an undisturbed run", flush=True)  # fmt: skip
                    failed |= wrong > 0 or longest_s > WITHIN_S
                engine.dispose()
            admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
