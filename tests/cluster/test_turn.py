from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from sqlalchemy.engine import Engine

from cluster import turn as turning
from cluster.jobs import Jobs
from cluster.loop import JobError
from cluster.settings import Settings, load_settings
from cluster.turn import Turn, choose, run_turn


def evaluation(version: str, passed: bool, win_rate: float) -> dict[str, Any]:
    return {"version": version, "passed": passed, "gates": [{"suite": "win_rate", "value": win_rate}]}


class Commands:
    """Answers of the other folders' commands, and a list of what was called."""

    def __init__(self, *, passed: bool = True) -> None:
        self.called: list[str] = []
        self.broken: str | None = None
        self.passed = passed
        self.missing: dict[str, str] = {}
        self.trained: list[str] = []

    def __call__(self, line: Sequence[str], **_: Any) -> dict[str, Any]:
        name = line[0]
        if name == self.broken:
            raise JobError(f"`rayloop {name}` exited with 1: disk full")
        self.called.append(name)
        if name == "curate":
            return {"dataset_id": "triage-abc"}
        if name == "data":
            lacking = self.missing.get(line[-1])
            return {"eligible": lacking is None, "rules": [{"passed": lacking is None, "says": lacking}]}
        if name == "train":
            self.trained = [value for option, value in pairwise(line) if option == "--method"]
            return {"runs": [{"version": "triage/2"}, {"version": "triage/3"}]}
        if name == "evaluate":
            return evaluation(line[1], self.passed, {"triage/2": 0.6, "triage/3": 0.7}[line[1]])
        return {"rollout_id": "ro-1"}


@pytest.fixture
def jobs(sqlite_database: Engine) -> Jobs:
    return Jobs(sqlite_database, "default", "default")


@pytest.fixture
def learning(settings: Settings) -> Settings:
    return load_settings(home=settings.home, learning={"enabled": True})[0]


TURN = Turn("triage", ("sft", "dpo"))


def quiet(_: str) -> None:
    """Nobody listens."""


def test_best_of_those_that_passed_is_chosen_by_win_rate() -> None:
    found = [evaluation("a/1", True, 0.6), evaluation("a/2", False, 0.9), evaluation("a/3", True, 0.7)]
    assert choose(found) == "a/3"
    assert choose(found[1:2]) is None


def test_turn_starts_a_rollout_of_the_best_version(
    jobs: Jobs, learning: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = Commands()
    monkeypatch.setattr(turning, "run_command", commands)
    result = run_turn(learning, jobs, TURN, say=quiet)
    assert result["version"] == "triage/3"
    assert commands.called == ["curate", "data", "data", "train", "evaluate", "evaluate", "rollout"]
    job = jobs.get(result["job_id"])
    assert (job.state, job.output_version) == ("completed", "triage/3")


def test_failed_turn_goes_on_after_its_last_finished_step(
    jobs: Jobs, learning: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = Commands()
    commands.broken = "evaluate"
    monkeypatch.setattr(turning, "run_command", commands)
    with pytest.raises(JobError, match="disk full"):
        run_turn(learning, jobs, TURN, say=quiet)
    failed = jobs.list()[0]
    assert failed.state == "failed" and "disk full" in str(failed.error)
    commands.broken = None
    result = run_turn(learning, jobs, TURN, resume=failed.job_id, say=quiet)
    assert result["job_id"] == failed.job_id
    assert commands.called.count("curate") == commands.called.count("train") == 1


def test_methods_without_enough_feedback_are_left_out_unless_forced(
    jobs: Jobs, learning: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = Commands()
    commands.missing = {"dpo": "pairs: 4 preference pairs, needs 500: 496 short"}
    monkeypatch.setattr(turning, "run_command", commands)
    result = run_turn(learning, jobs, TURN, say=quiet)
    assert commands.trained == ["sft"] and list(result["steps"]["eligible"]["missing"]) == ["dpo"]
    run_turn(learning, jobs, replace(TURN, force=True), say=quiet)
    assert commands.trained == ["sft", "dpo"]


def test_a_turn_without_enough_feedback_trains_nothing_and_says_what_is_missing(
    jobs: Jobs, learning: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = Commands()
    commands.missing = dict.fromkeys(TURN.methods, "rest: 3 days since the last training, needs 7: 4 short")
    monkeypatch.setattr(turning, "run_command", commands)
    result = run_turn(learning, jobs, TURN, say=quiet)
    assert commands.called == ["curate", "data", "data"]
    assert "needs 7: 4 short" in result["steps"]["rollout"]["reason"]
    assert jobs.get(result["job_id"]).state == "completed"


def test_nothing_passed_means_no_rollout(jobs: Jobs, learning: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = Commands(passed=False)
    monkeypatch.setattr(turning, "run_command", commands)
    result = run_turn(learning, jobs, TURN, say=quiet)
    assert (result["version"], result["passed"]) == (None, [])
    assert result["steps"]["rollout"] == {"started": False, "reason": "no version passed its gates"}


def test_with_learning_off_no_rollout_is_started(
    jobs: Jobs, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = Commands()
    monkeypatch.setattr(turning, "run_command", commands)
    result = run_turn(settings, jobs, TURN, say=quiet)
    assert "rollout" not in commands.called
    assert result["steps"]["rollout"]["started"] is False
