"""The requests of an experiment with their rewards and propensities, for estimates of other splits.

This reads the log, unlike the readings of an experiment: it is asked for rarely, and any weighing of the requests
can be asked for.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, get_args

import numpy as np
from sqlalchemy.engine import Engine

from data.log import EventLog
from data.offpolicy import Estimator
from serve.experiments.exposures import Design, Designs, Exposure, exposures_of
from serve.experiments.metrics import is_explicit
from serve.experiments.offpolicy import Logged, estimate
from serve.experiments.store import get_experiment


def read_logged(engine: Engine, experiment_id: str) -> Logged:
    """Every request that has an explicit reward; of several rewards their mean.

    Raises:
        NotFoundError: no such experiment.
    """
    experiment = get_experiment(engine, experiment_id)
    requests: dict[str, tuple[str, bool, float]] = {}
    rewards: dict[str, list[float]] = {}
    own = Design(
        experiment.tenant,
        experiment.agent,
        experiment.modality,
        experiment.candidate,
        experiment.created_at_us,
        experiment.config.get("mode") == "bandit",
    )
    designs = Designs({experiment_id: own})
    for recorded in EventLog(engine).scan(kinds=["interaction", "feedback"], tenant=experiment.tenant):
        event = recorded.event
        if event.interaction_id is None or recorded.erased:
            continue
        if event.kind == "feedback":
            if is_explicit(event.body):
                rewards.setdefault(event.interaction_id, []).append(float(event.body.get("reward", 0.0)))
            continue
        for exposure in exposures_of(recorded, designs):
            if exposure.experiment_id == experiment_id and exposure.arm != "other" and not exposure.by_hand:
                requests[event.interaction_id] = (exposure.user, exposure.arm == "candidate", _chance(exposure))
    rewarded = [(*request, float(np.mean(rewards[name]))) for name, request in requests.items() if name in rewards]
    numbers = {user: number for number, user in enumerate(dict.fromkeys(row[0] for row in rewarded))}
    return Logged(
        np.array([numbers[row[0]] for row in rewarded], np.int64),
        np.array([row[1] for row in rewarded], bool),
        np.array([row[2] for row in rewarded], float),
        np.array([row[3] for row in rewarded], float),
    )


def _chance(exposure: Exposure) -> float:
    """Probability of the arm among users of the candidate or of stable; those of other candidates are left out."""
    chance = float(exposure.body["propensity"])
    others = sum(own.share for own in exposure.slices) - exposure.share
    return chance / (1.0 - others)


def estimates(engine: Engine, experiment_id: str, shares: Sequence[float]) -> list[dict[str, Any]]:
    """Every estimator for each share of the candidate, as plain values."""
    logged = read_logged(engine, experiment_id)
    names: tuple[Estimator, ...] = get_args(Estimator)
    return [{"share": share} | asdict(estimate(logged, share, name)) for share in shares for name in names]
