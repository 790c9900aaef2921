"""`rayloop verify` and `rayloop experiment` as a person runs them."""

import json
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import yaml

from cluster.database import connect
from cluster.settings import load_settings
from tests import processes
from tests.serve.rollout_world import DEMO, TENANT, Population, World


@pytest.fixture(scope="module")
def decided(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, World]:
    """A configuration file, and a finished rollout in its database."""
    folder = tmp_path_factory.mktemp("verify")
    document: dict[str, Any] = {"home": str(folder / "home"), "tenant": TENANT, **json.loads(json.dumps(DEMO))}
    file = folder / "rayloop.yaml"
    file.write_text(yaml.safe_dump(document))
    settings = load_settings(file)[0]
    better = Population(users=300, accuracy={"stable": 0.6, "candidate": 0.9}, seed=5)
    world = World(connect(settings), settings, better)
    assert world.run(world.start().rollout_id).state == "promoted"
    return file, world


def rayloop(file: Path, *arguments: str) -> "CompletedProcess[str]":
    return processes.rayloop(*arguments, "--config", str(file))


def test_verify_rebuilds_every_decision(decided: tuple[Path, World]) -> None:
    file, world = decided
    done = rayloop(file, "verify", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["fault_count"] == 0 and found["replay"]["faults"] == []
    assert found["replay"]["decisions"] == len(world.decisions()) and found["replay"]["rebuilt"] >= 4


def test_experiment_commands_show_what_was_decided_on(decided: tuple[Path, World], tmp_path: Path) -> None:
    file, world = decided
    name = world.decisions()[0]["experiment_id"]
    shown = rayloop(file, "experiment", "show", name)
    assert shown.returncode == 0 and "satisfaction" in shown.stdout and "latency p95" in shown.stdout, shown.stderr
    document = json.loads(rayloop(file, "experiment", "show", name, "--segment", "modality=text", "--json").stdout)
    assert document["experiment"]["layer"] == "triage:text" and set(document["periods"]) == {"ramp", "0.9"}
    wrong = rayloop(file, "experiment", "show", name, "--segment", "tier=gold")
    assert wrong.returncode == 2 and "segment='tier=gold' must be one of" in wrong.stderr
    judged = json.loads(rayloop(file, "experiment", "off-policy", name, "--share", "1", "--json").stdout)["estimates"]
    assert {row["estimator"] for row in judged} == {"ips", "snips", "doubly_robust"}
    assert all(row["low"] < row["value"] < row["high"] for row in judged)
    drawn = rayloop(file, "experiment", "plot", name, "--out", str(tmp_path / "effect.png"))
    assert drawn.returncode == 0 and (tmp_path / "effect.png").stat().st_size > 1000, drawn.stderr
    refused = rayloop(file, "experiment", "end", name, "--keep", "stable")
    assert refused.returncode == 1 and "no running bandit" in refused.stderr


def test_plan_refuses_what_makes_no_sense(decided: tuple[Path, World]) -> None:
    file, _ = decided
    for arguments, said in (
        (("--probability", "0.7", "--margin", "-1"), "margin=-1.0 must be above 0"),
        (("--probability", "0.7", "--margin", "0.1", "--users-per-day", "-5"), "users_per_day=-5.0 must be above 0"),
    ):
        done = rayloop(file, "experiment", "plan", *arguments)
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
