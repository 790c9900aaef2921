"""The demo's frame: what it does when something fails or is interrupted, and how its table is put together.

The whole programme is `make demo`.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.demo.commands import Commands
from cluster.demo.held_out import Accuracy, wilson
from cluster.demo.home import fresh_home
from cluster.demo.plan import DemoPlan
from cluster.demo.run import Demo, run_demo
from cluster.demo.story import Stage, Story
from cluster.loop import JobError


def family(home: Path) -> list[psutil.Process]:
    """Processes whose command line names the home."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any(str(home) in part for part in process.info["cmdline"] or []):
            found.append(process)
    return found


def test_failing_command_ends_the_demo_with_its_own_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYLOOP_NONSENSE", "1")
    with pytest.raises(JobError, match="RAYLOOP_NONSENSE='1' names no setting"):
        run_demo(DemoPlan(tickets=500), tmp_path / "demo", Story())
    assert family(tmp_path / "demo") == []
    assert "names no setting" in next((tmp_path / "demo" / "logs").glob("*train-toy.log")).read_text()


def listen_to_interrupts() -> None:
    """Where the tests run in the background of a script, their children ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_demo_leaves_nothing_running(tmp_path: Path, number: signal.Signals, code: int) -> None:
    home = tmp_path / "demo"
    line = [sys.executable, "-m", "cluster", "demo", "--home", str(home), "--json"]
    with subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=listen_to_interrupts
    ) as process:
        deadline = time.monotonic() + 240
        while len(family(home)) < 2 and time.monotonic() < deadline:  # the demo and its first command
            time.sleep(0.1)
        assert len(family(home)) >= 2
        os.kill(process.pid, number)
        out, err = process.communicate(timeout=240)
    assert process.returncode == code and out == "" and "Traceback" not in err
    assert family(home) == []


def test_commands_side_by_side_give_their_results_in_order(tmp_path: Path) -> None:
    config = tmp_path / "rayloop.yaml"
    config.write_text(f"home: {tmp_path}\n")
    found = Commands(config).run_all([["config"], ["rollout", "list"]], Stage("", ""))
    assert "home" in found[0] and found[1] == {"rollouts": []}


def test_one_failing_command_ends_the_others(tmp_path: Path) -> None:
    config = tmp_path / "rayloop.yaml"
    config.write_text(f"home: {tmp_path}\n")
    commands = Commands(config)
    started = time.monotonic()
    with pytest.raises(JobError), commands.beside("config"):
        commands.run("rollout", "status", "nowhere")
    assert time.monotonic() - started < 30


@pytest.fixture
def demo(tmp_path: Path) -> Demo:
    home, processes = fresh_home(tmp_path / "demo")
    return Demo(DemoPlan(), home, processes, Story())


def test_table_has_base_methods_control_and_the_promoted_version(demo: Demo) -> None:
    demo.adapters = {name: Path(name) for name in ("sft", "dpo", "kto", "shuffled", "damaged")}
    demo.versions = {"sft": "triage/2", "dpo": "triage/3", "kto": "triage/4", "damaged": "triage/5"}
    demo.findings.promoted = "triage/3"
    right = {None: 65, "sft": 90, "dpo": 86, "kto": 84, "shuffled": 35, "damaged": 20}

    def measure(folder: str | None) -> Accuracy:
        return Accuracy(*[wilson(right[folder], 100)] * 3)

    rows = demo._rows(measure)
    assert [row.name for row in rows] == ["base", "sft", "dpo", "kto", "shuffled", "damaged", "promoted"]
    assert [row.version for row in rows] == [
        "triage/1",
        "triage/2",
        "triage/3",
        "triage/4",
        None,
        "triage/5",
        "triage/3",
    ]
    assert rows[-1].accuracy == rows[2].accuracy and rows[-1].note == "it is dpo, chosen by its gates"


def test_nothing_is_rolled_out_when_no_version_passed(demo: Demo) -> None:
    gates: list[dict[str, Any]] = [{"suite": "win_rate", "value": 0.4}]
    demo.findings.gates = [{"version": "triage/2", "passed": False, "gates": gates}]
    demo.roll_out()
    assert demo.findings.promoted is None and demo.findings.why_not == "no version passed its gates"


def test_no_stage_before_the_table_reads_the_truth() -> None:
    """Only the analysts and the table may call `todays_rules`; everything else sees feedback at most."""
    folders = ("cluster", "data", "train", "tune", "serve")
    root = Path(__file__).parents[3]
    callers = {
        str(file.relative_to(root))
        for folder in folders
        for file in (root / folder).rglob("*.py")
        if "todays_rules" in file.read_text(encoding="utf-8")
    }
    assert callers == {"cluster/demo/world.py", "cluster/demo/analysts.py", "cluster/demo/held_out.py"}
    users = {
        str(file.relative_to(root))
        for folder in folders
        for file in (root / folder).rglob("*.py")
        if "cluster.demo" in file.read_text(encoding="utf-8") and "demo" not in file.relative_to(root).parts
    }
    assert users == {"cluster/cli.py"}, "nothing but the command line knows of the demo"


def test_state_of_a_demo_is_plain_json(demo: Demo) -> None:
    assert json.loads(json.dumps(demo.findings.summary()))["promoted_version"] is None
