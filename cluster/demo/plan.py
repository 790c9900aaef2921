"""What the demo does in numbers, and the `rayloop.yaml` it writes for itself.

Clock and population are simulated here and nowhere else: stages last seconds instead of a day, a few
hundred users stand for thousands. Every command reads these values as an operator's own configuration;
the code paths are the production ones.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from cluster.demo.world import AGENT
from cluster.settings.base import Section

SIMULATED = (
    "Simulated by configuration: rollout stages of seconds instead of a day, {users} users instead of thousands, "
    "and the analysts themselves. The servers, the pipeline, the trainings, the gates and the statistics are "
    "the production ones."
)
HEADER = "# Written by `rayloop demo`. Stages of seconds and small populations: fine for a demonstration only.\n"
BASE_VERSION = f"{AGENT}/1"
NOT_APPLICABLE = "the toy agent triages alerts and nothing else"
UNTAUGHT = ("tool_calls", "refusal", "over_refusal", "grounding", "sycophancy", "anchor")
"""Suites whose built-in cases are about what it was never taught."""


class DemoPlan(Section):
    """Sizes and lengths. The defaults are for two CPU cores and some minutes."""

    seed: int = Field(0, ge=0)
    """Of the base's weights, the alerts, the analysts and the trainings."""
    shuffle_feedback: bool = False
    """Every reaction belongs to another alert: nothing can be learned, and nothing may be promoted."""
    tickets: int = Field(8_000, ge=500)
    """Solved tickets that teach the base model."""
    todays_share: float = Field(0.3, ge=0, le=1)
    """Share of them solved by today's rules; the others follow the old runbook."""
    base_batch: int = Field(32, ge=1)
    """Tickets in one step of the base's training."""
    base_learning_rate: float = Field(1e-3, gt=0)
    """Peak learning rate of the base's training."""
    users: int = Field(400, ge=20)
    """Analysts."""
    alerts: int = Field(1_800, ge=50)
    """Alerts answered before anything is learned."""
    concurrency: int = Field(24, ge=1)
    """Analysts who ask at the same time."""
    trials: int = Field(3, ge=1)
    """Configurations that the sweep tries."""
    sweep_learning_rates: str = "2e-4:1e-3"
    """Range of the sweep."""
    sweep_betas: str = "0.05:0.3"
    """Range of the sweep."""
    sweep_kl_limit: float = Field(2.0, gt=0)
    """Nats a token that a trial may move away from the base; wide, since two of the runbook's rules changed."""
    evaluated_prompts: int = Field(300, ge=20)
    """Held-out prompts a version answers in its evaluation, at most."""
    held_out: int = Field(1_500, ge=50)
    """Alerts behind the table at the end."""
    live_rate_per_s: float = Field(100.0, gt=0)
    """Most alerts a second during a rollout."""
    live_alerts_per_session: int = Field(2, ge=1)
    """Short sessions bring many different users to a small share quickly."""
    rollout_limit_s: float = Field(300.0, gt=0)
    """A rollout undecided for this long counts as not promoted."""
    stage_s: float = Field(4.0, ge=0)
    """Length of a rollout stage; a day outside a demonstration."""
    stages: tuple[float, ...] = (0.10, 0.25, 0.50, 1.00)
    """Shares of the candidate."""
    users_per_arm: int = Field(15, ge=2)
    """Users each arm needs before a stage is left; a thousand outside a demonstration."""
    keep_up: bool = False
    """Leave the live side running at the end, with its pages to look at."""
    control: bool = True
    """Train one more adapter on shuffled feedback, for the table."""
    damage: float = -2.0
    """The damaged candidate is the promoted adapter with one factor scaled by this."""

    @property
    def trains_control(self) -> bool:
        """With all feedback shuffled there is nothing to compare with."""
        return self.control and not self.shuffle_feedback


QUICK = {
    "alerts": 1_100,
    "users": 300,
    "trials": 2,
    "held_out": 600,
    "evaluated_prompts": 200,
    "control": False,
}
"""Smaller numbers, for CI."""


def write_config(path: Path, plan: DemoPlan, home: Path, tuned: Mapping[str, float] | None = None) -> Path:
    """Write the demo's `rayloop.yaml`; `tuned` are fields of DPO that a sweep chose."""
    document = settings_document(plan, home)
    document["training"]["dpo"] |= tuned or {}
    return _write(path, document)


def write_control_config(home: Path, plan: DemoPlan, demo_home: Path, tuned: Mapping[str, float] | None = None) -> Path:
    """The same for the shuffled control: an event log of its own, the demo's base model and MLflow."""
    document = settings_document(plan, demo_home) | {"home": str(home)}
    document["training"]["dpo"] |= tuned or {}
    document["mlflow"] = {"tracking_uri": f"sqlite:///{demo_home / 'mlflow.db'}"}
    return _write(home / "rayloop.yaml", document)


def _write(path: Path, document: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(HEADER + yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    return path


def settings_document(plan: DemoPlan, home: Path) -> dict[str, Any]:
    """The configuration of the demo: all flags on, short stages, a small model's learning rates."""
    return {
        "home": str(home),
        "logging": {"level": "WARNING"},
        "learning": {"enabled": True},
        "capture": {"enabled": True},
        "feedback": {"explicit": True, "implicit": True},
        "trajectory_evaluation": {"enabled": True},
        "trajectory_feedback_loop": {"enabled": True},
        "automation": {"auto_rollout": True},
        "implicit": {"reformulation_similarity": 0.95},
        "curation": _curation(),
        "training": _training(plan, home),
        "sweep": {"trials": plan.trials, "kl_limit": plan.sweep_kl_limit, "seed": plan.seed},
        "evaluation": _evaluation(plan, home),
        "serve": _serve(plan),
        "engine": {"base_model": str(home / "base")},
        "experiment": _experiment(plan),
        "rollout": _rollout(plan),
    }


def _curation() -> dict[str, Any]:
    return {
        "filter": {"min_answer_tokens": 3},  # an answer is one short line of JSON
        "score": {"complete_min_words": 4},
        "split": {"train": 0.75, "validation": 0.1},  # more of the users than usual judge the versions
    }


def _training(plan: DemoPlan, home: Path) -> dict[str, Any]:
    """Learning rates for a model of a million parameters; a real model wants a tenth or less."""
    return {
        "base_model": str(home / "base"),
        "batch_size": 32,
        "gradient_accumulation": 1,
        "threads": 1,  # a second one does not speed up a model this small
        "sft": {"learning_rate": 2e-3, "epochs": 3, "packing": False},
        "dpo": {"learning_rate": 5e-4, "epochs": 3, "beta": 0.1},
        "kto": {"learning_rate": 1e-3, "epochs": 1, "beta": 0.3},
        "sft_baseline": False,  # SFT is one of the methods compared
        "seed": plan.seed,
        "max_length": 256,
        "toy": {
            "batch_size": plan.base_batch,
            "learning_rate": plan.base_learning_rate,
            "max_positions": 256,
            "seed": plan.seed,
        },
    }


def _evaluation(plan: DemoPlan, home: Path) -> dict[str, Any]:
    return {
        "suites": str(home / "suites"),
        "not_applicable": dict.fromkeys(UNTAUGHT, NOT_APPLICABLE) | {"human": "nobody labels in the demo"},
        "max_prompts": plan.evaluated_prompts,
        "max_new_tokens": 32,
    }


def _serve(plan: DemoPlan) -> dict[str, Any]:
    return {
        "port": 0,
        "applications": ["gateway", "engine", "grader", "control"],  # the toy agent calls no tools
        "dashboard": plan.keep_up,
        "routes": [{"agent": AGENT, "stable": BASE_VERSION}],
        "engines": {"local": {"models": {BASE_VERSION: "base"}}},
    }


def _experiment(plan: DemoPlan) -> dict[str, Any]:
    """Margins and bounds for a few dozen users an arm; the defaults want a thousand."""
    return {
        "breach_min_users_per_arm": plan.users_per_arm,
        "small_sample_users": plan.users_per_arm,
        "guardrails": ["error_rate", "latency_over_slo"],
        "guardrails_when_present": [],
        "margins": {"satisfaction": 0.1, "error_rate": 0.05, "latency_over_slo": 0.1},
        "tuning_users": 120,
        "tuning_trials": 150,
    }


def _rollout(plan: DemoPlan) -> dict[str, Any]:
    return {
        "stages": list(plan.stages),
        "stage_duration_s": plan.stage_s,
        "min_users_per_arm": plan.users_per_arm,
        "final_min_users_per_arm": max(2, plan.users_per_arm // 2),
        "final_control_share": 0.1,
        "detectable_improvement": 0.15,
        "tick_s": 0.5,
        "hold_limit_s": 0.5 * plan.rollout_limit_s,
        "stale_after_s": 20.0,
    }
