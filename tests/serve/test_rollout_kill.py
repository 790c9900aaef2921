"""kill -9 of a real controller process, again and again, until a rollout has ended."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.database import connect
from cluster.settings import load_settings
from serve.rollout.store import get_rollout
from tests.serve.rollout_world import Population, World, demo_settings

PROJECT = Path(__file__).parents[2]


def spawn(home: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "tests.serve.controller_process", str(home)]
    return subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.slow
def test_a_controller_killed_again_and_again_still_promotes(tmp_path: Path) -> None:
    engine = connect(load_settings(home=tmp_path)[0])
    world = World(engine, demo_settings(stage_duration_s=1), Population(users=10))
    world.now_us = time.time_ns() // 1000
    rollout_id = world.start().rollout_id
    choose, kills, controller = random.Random(4), 0, spawn(tmp_path)
    deadline = time.monotonic() + 240
    try:
        while (before := get_rollout(engine, rollout_id)).state != "promoted":
            assert time.monotonic() < deadline, before
            if controller.poll() is not None:
                assert controller.returncode == -9, controller.stderr.read() if controller.stderr else b""
                controller.communicate()
                controller = spawn(tmp_path)
            if kills < 4 and before.decisions > kills:
                time.sleep(choose.uniform(0, 0.05))
                controller.kill()
                kills += 1
            time.sleep(0.005)
        controller.wait(timeout=30)
    finally:
        controller.kill()
        controller.communicate()
    assert kills == 4
    outcomes = [d["outcome"] for d in world.decisions() if d["outcome"] != "hold"]
    assert outcomes == ["start", "advance", "advance", "advance", "promote"]
    assert (world.route.stable, world.route.candidate) == ("triage/2", None)
    assert json.loads((tmp_path / "aliases.json").read_text()) == {"champion": "triage/2"}
    assert len(list(world.log.scan(kinds=["model.updated"]))) == 1
    engine.dispose()
