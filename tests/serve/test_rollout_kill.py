"""kill -9 of real controller processes, at chosen points, until a rollout has ended."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

from cluster.database import connect
from cluster.settings import load_settings
from serve.rollout.store import get_rollout
from tests.serve.rollout_world import Population, World, demo_settings

PROJECT = Path(__file__).parents[2]


BETWEEN_DECISION_AND_ROUTE, BEFORE_IT_IS_SETTLED = 5, 11
"""Points of a process that begins with the rollout's start, and of one that first applies it again."""


def run_controller(home: Path, *point: int) -> int:
    command = [sys.executable, "-m", "tests.serve.controller_process", str(home), *map(str, point)]
    return subprocess.run(command, cwd=PROJECT).returncode


def test_controllers_killed_by_the_system_are_followed_by_one_that_promotes(tmp_path: Path) -> None:
    engine = connect(load_settings(home=tmp_path)[0])
    world = World(engine, demo_settings(stage_duration_s=1), Population(users=10))
    world.now_us = time.time_ns() // 1000
    rollout_id = world.start().rollout_id
    assert run_controller(tmp_path, BETWEEN_DECISION_AND_ROUTE) == -signal.SIGKILL
    rollout = get_rollout(engine, rollout_id)
    assert (rollout.state, rollout.decisions, world.route.share) == ("pending", 1, 0.0)
    assert run_controller(tmp_path, BEFORE_IT_IS_SETTLED) == -signal.SIGKILL
    rollout = get_rollout(engine, rollout_id)
    assert (rollout.stage, rollout.decisions, world.route.share) == (0, 2, 0.25)
    assert run_controller(tmp_path) == 0
    assert get_rollout(engine, rollout_id).state == "promoted"
    outcomes = [d["outcome"] for d in world.decisions() if d["outcome"] != "hold"]
    assert outcomes == ["start", "advance", "advance", "advance", "promote"]
    assert (world.route.stable, world.route.candidate) == ("triage/2", None)
    assert json.loads((tmp_path / "aliases.json").read_text()) == {"champion": "triage/2"}
    assert len(list(world.log.scan(kinds=["model.updated"]))) == 1
    engine.dispose()
