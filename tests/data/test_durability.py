import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sqlalchemy.engine import Engine

from cluster.settings import Settings
from data.log import EventLog
from data.verify import verify_log

APPENDER = Path(__file__).parent / "appender.py"
CYCLES = 10


def append_until_killed(url: str, run: str, seconds: float, out: Path) -> list[str]:
    """Ids the child acknowledged before kill -9."""
    with out.open("wb") as stdout:
        child = subprocess.Popen(
            [sys.executable, "-m", "tests.data.appender", url, run], stdout=stdout, cwd=APPENDER.parents[2]
        )
        deadline = time.monotonic() + 60
        while not out.stat().st_size and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(seconds)
        child.kill()
        child.wait()
    lines = out.read_text().split("\n")
    return lines[1:-1]  # without "ready", and without what a torn write left


@pytest.mark.slow
def test_kill_9_loses_nothing_acknowledged_and_doubles_nothing(
    database: Engine, settings: Settings, tmp_path: Path
) -> None:
    url = database.url.render_as_string(hide_password=False)
    pauses = random.Random(7)
    acknowledged: list[str] = []
    for cycle in range(CYCLES):
        seconds = pauses.uniform(0.0, 0.25)
        acknowledged += append_until_killed(url, f"run{cycle}", seconds, tmp_path / f"out{cycle}")
    kept = [recorded.event.event_id for recorded in EventLog(database).scan()]
    print(f"{len(acknowledged)} acknowledged, {len(kept)} in the log after {CYCLES} kills")
    assert len(acknowledged) > CYCLES
    assert set(acknowledged) <= set(kept)
    assert len(kept) == len(set(kept))
    assert verify_log(database, settings).fault_count == 0
