from pathlib import Path

import pytest
from sqlalchemy.engine import Engine

from cluster.settings import Settings
from data.verify.run import verify_log
from tests.data.kill_cycles import run_cycles


@pytest.mark.slow
def test_kill_9_loses_nothing_acknowledged_and_doubles_nothing(
    database: Engine, settings: Settings, tmp_path: Path
) -> None:
    """A small run; `python -m tests.bench durability` is the long one."""
    outcome = run_cycles(database, tmp_path, kills=10, min_events=1000, longest_s=0.25, seed=7)
    assert outcome.distinct >= 1000 and outcome.retried > 0
    assert (outcome.lost, outcome.doubled) == ([], [])
    assert verify_log(database, settings).fault_count == 0
