"""The demo's own folder: made afresh each time, and only ever removed when an earlier demo made it."""

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import psutil

from cluster.demo import world
from cluster.demo.commands import Commands, Processes
from cluster.demo.plan import DemoPlan
from cluster.errors import ConflictError, InputError, RayloopError

MARKER = "rayloop-demo.json"
"""Holds the processes of the demo that made the folder; without it the folder is somebody else's."""
TEAM_CASES = 40
END_S = 20.0


@dataclass(frozen=True)
class DemoHome:
    """Where everything of one demo lies."""

    root: Path

    @property
    def config(self) -> Path:
        """The demo's `rayloop.yaml`."""
        return self.root / "rayloop.yaml"

    @property
    def control(self) -> Path:
        """Home of the shuffled control: another event log, the same registry."""
        return self.root / "control"

    @property
    def base(self) -> Path:
        """The base model."""
        return self.root / "base"

    @property
    def files(self) -> Path:
        """Prompts, answers and tallies."""
        return self.root / "files"


def fresh_home(root: Path) -> tuple[DemoHome, Processes]:
    """An empty home; what an earlier demo left there is ended and removed.

    Raises:
        ConflictError: another demo is running there.
        InputError: the folder holds something that no demo made.
    """
    home = DemoHome(root.expanduser().resolve())
    marker = home.root / MARKER
    if home.root.exists() and any(home.root.iterdir()):
        if not marker.exists():
            raise InputError("home", str(root), "is not empty and not from a demo", "name another folder with --home")
        _end_earlier(home, marker)
        shutil.rmtree(home.root)
    home.files.mkdir(parents=True)
    return home, Processes(marker)


def _end_earlier(home: DemoHome, marker: Path) -> None:
    left = Processes.left_over(marker)
    running = [process for process in left if "demo" in " ".join(process.cmdline())]
    if any("cluster.demo.analysts" not in " ".join(process.cmdline()) for process in running):
        raise ConflictError(
            f"a demo is running in {home.root} (process {running[0].pid}); end it or name another --home"
        )
    for process in left:
        process.terminate()
    psutil.wait_procs(left, END_S)
    if (home.root / "run" / "up.json").exists() and home.config.exists():
        try:
            Commands(home.config).run("down")
        except RayloopError as error:
            raise ConflictError(f"what an earlier demo started cannot be ended: {error}") from None


def write_lines(path: Path, rows: Iterable[Any]) -> Path:
    """JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def write_suite(folder: Path, seed: int) -> Path:
    """The team's own regression cases: an answer must be a triage, whatever it says.

    They name no right answer: nothing that decides may know one.
    """
    fields = {"verdict": {"enum": ["page", "ticket", "ignore"]}, "owner": {"type": "string"}}
    schema = {"type": "object", "required": list(fields), "properties": fields, "additionalProperties": False}
    cases = [
        {
            "id": f"triage-shape-{number}",
            "domain": "triage",
            "messages": world.prompt(alert),
            "expect": {"json_schema": schema},
        }
        for number, alert in enumerate(islice(world.alerts("base", seed + 1), TEAM_CASES), 1)
    ]
    return write_lines(folder / "regression.jsonl", cases)


def write_corpus(home: DemoHome, plan: DemoPlan) -> Path:
    """The solved tickets that teach the base."""
    return write_lines(home.files / "tickets.jsonl", world.base_corpus(plan.seed, plan.tickets, plan.todays_share))
