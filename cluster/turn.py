"""One turn of the loop: curate, see what may train on it, train and register, evaluate, hand the best to a rollout.

Each step is a command of its own (`cluster.loop.run_command`). What a step answered is kept in the job
table before the next one starts, so a turn that was cut off goes on after its last finished step.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.jobs import Job, Jobs
from cluster.loop import run_command
from cluster.settings import Settings
from cluster.signs_of_life import signs_of_life

KIND = "loop"
Answers = dict[str, Any]
"""What each finished step answered, by its name."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Turn:
    """What one turn is to do."""

    agent: str
    methods: tuple[str, ...]
    """Training methods, compared by the gates."""
    config: Path | None = None
    """The rayloop.yaml of every step."""
    force: bool = False
    """Train whatever the rules of eligibility say."""


def run_turn(settings: Settings, jobs: Jobs, turn: Turn, *, resume: str | None = None, say: Say) -> dict[str, Any]:
    """Do the steps that are not done yet; returns the job id, the best version and each step's answer.

    Methods for which the dataset is not enough are left out. `passed` names the versions that passed their gates;
    none means that the agent stays as it is, which is an ordinary end of a turn. A rollout is started only where
    `learning.enabled` and `automation.auto_experiment` are on.

    Raises:
        RayloopError: a step failed; the job says which, and `resume` with its id goes on from there.
    """
    job, answers = _open(jobs, turn, resume)
    try:
        with signs_of_life(jobs, [job.job_id], settings.training.job_silent_s):
            for name, step in STEPS.items():
                if name in answers:
                    continue
                say(f"{name} …")
                answers[name] = step(turn, answers, settings, say)
                jobs.progress(job.job_id, {"steps": answers})
        best = choose(answers["evaluate"])
        jobs.finish(job.job_id, output_version=best)
    except BaseException as error:
        jobs.fail(job.job_id, f"{type(error).__name__}: {error}")
        raise
    return {"job_id": job.job_id, "version": best, "passed": _passed(answers["evaluate"]), "steps": answers}


def _open(jobs: Jobs, turn: Turn, resume: str | None) -> tuple[Job, Answers]:
    """The job of this turn, running, and the steps it has behind it."""
    if resume is None:
        job = jobs.create(KIND, agent=turn.agent, config={"methods": list(turn.methods)})
        return jobs.start(job.job_id), {}
    behind = dict((jobs.get(resume).progress or {}).get("steps", {}))
    jobs.retry(resume)
    job = jobs.start(resume)
    jobs.progress(resume, {"steps": behind})
    return job, behind


def choose(evaluations: Sequence[Mapping[str, Any]]) -> str | None:
    """The version to try on users: of those that passed, the one with the highest win rate.

    Decided by recorded feedback alone. `None` when none passed.
    """
    passed = [e for e in evaluations if e["passed"]]
    best = max(passed, key=_win_rate, default=None)
    return best["version"] if best else None


def _win_rate(evaluation: Mapping[str, Any]) -> float:
    values = [gate["value"] for gate in evaluation["gates"] if gate["suite"] == "win_rate"]
    return values[0] if values and values[0] is not None else 0.0


def _passed(evaluations: Sequence[Mapping[str, Any]]) -> list[str]:
    return [e["version"] for e in evaluations if e["passed"]]


def _curate(turn: Turn, answers: Answers, settings: Settings, say: Say) -> Any:
    return run_command(["curate", "--agent", turn.agent], config=turn.config, on_line=say)


def _eligible(turn: Turn, answers: Answers, settings: Settings, say: Say) -> Any:
    """The methods that may train on the dataset, and what is `missing` for the others."""
    if turn.force:
        return {"methods": list(turn.methods), "missing": {}}
    missing = {}
    for method in turn.methods:
        line = ["data", "eligible", answers["curate"]["dataset_id"], "--method", method]
        answer = run_command(line, config=turn.config, on_line=say, accepted=(0, 1))
        if not answer["eligible"]:
            missing[method] = [rule["says"] for rule in answer["rules"] if not rule["passed"]]
            say(f"no {method}: {'; '.join(missing[method])}")
    return {"methods": [method for method in turn.methods if method not in missing], "missing": missing}


def _train(turn: Turn, answers: Answers, settings: Settings, say: Say) -> Any:
    methods = answers["eligible"]["methods"]
    if not methods:
        return {"runs": []}
    line = [
        "train",
        "run",
        "--agent",
        turn.agent,
        "--dataset",
        answers["curate"]["dataset_id"],
        "--no-baseline",
    ]
    line += ["--base", f"{turn.agent}@champion", "--register", turn.agent]
    for method in methods:
        line += ["--method", method]
    return run_command(line, config=turn.config, on_line=say)


def _evaluate(turn: Turn, answers: Answers, settings: Settings, say: Say) -> Any:
    dataset = answers["curate"]["dataset_id"]
    lines = [["evaluate", made["version"], "--dataset", dataset] for made in answers["train"]["runs"]]
    return [run_command(line, config=turn.config, on_line=say, accepted=(0, 1)) for line in lines]


def _rollout(turn: Turn, answers: Answers, settings: Settings, say: Say) -> Any:
    version = choose(answers["evaluate"])
    if not answers["eligible"]["methods"]:
        reasons = dict.fromkeys(rule for rules in answers["eligible"]["missing"].values() for rule in rules)
        return {"started": False, "reason": f"not enough to train on ({'; '.join(reasons)}); --force trains anyway"}
    if version is None:
        return {"started": False, "reason": "no version passed its gates"}
    if not (settings.learning.enabled and settings.automation.auto_experiment):
        return {"started": False, "reason": "learning.enabled or automation.auto_experiment is off"}
    answer = run_command(["rollout", "start", version, "--agent", turn.agent], config=turn.config, on_line=say)
    return {"started": True} | answer


STEPS: dict[str, Callable[[Turn, Answers, Settings, Say], Any]] = {
    "curate": _curate,
    "eligible": _eligible,
    "train": _train,
    "evaluate": _evaluate,
    "rollout": _rollout,
}
