"""A controller in a process of its own: `python -m tests.serve.controller_process HOME [POINT]`.

It kills itself with SIGKILL at that point, which is before or after one of its effects. The evidence is good and the
clock runs ten times as fast as real time; the registry is a file, so that like a real one it outlives the process.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from cluster.clock import now_us
from cluster.database import connect
from cluster.settings import load_settings
from serve.rollout import controller
from serve.rollout.controller import Controller
from serve.rollout.state import ENDED
from serve.rollout.steps import Steps
from serve.rollout.store import list_rollouts
from tests.serve.rollout_world import TENANT, FakeRegistry, FakeRouters, FakeServables, KillableSteps, demo_settings
from tests.serve.test_decide import evidence

SPEED = 10


class FileRegistry(FakeRegistry):
    """Aliases and tags in a file."""

    def __init__(self, path: Path) -> None:
        super().__init__({"triage/1": "not_run", "triage/2": "passed"})
        self.path = path

    def set_alias(self, model: str, alias: str, version: str, *, actor: str, reason: str) -> None:
        """Written whole or not at all."""
        draft = self.path.with_suffix(".draft")
        draft.write_text(json.dumps({alias: version}))
        draft.replace(self.path)


class MortalSteps(KillableSteps):
    """Dies as a process does, not as an exception."""

    def _pass(self) -> None:
        self.point += 1
        if self.point == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


def main(home: Path, point: int | None) -> None:
    """Tick until the rollout has ended."""
    begun = now_us()
    engine = connect(load_settings(home=home)[0])

    def clock() -> int:
        return begun + SPEED * (now_us() - begun)

    def read(*_: object) -> object:
        return evidence(last_seen_us={"candidate": clock(), "stable": clock()})

    controller._evidence = read  # type: ignore[assignment]
    steps = MortalSteps(Steps(engine, FileRegistry(home / "aliases.json"), FakeServables(), FakeRouters(), clock=clock))
    steps.kill_at = point
    acting = Controller(steps, demo_settings(stage_duration_s=1))  # type: ignore[arg-type]
    while any(rollout.state not in ENDED for rollout in list_rollouts(engine, TENANT)):
        acting.tick()
        time.sleep(0.002)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None)
