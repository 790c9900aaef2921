"""What a rollout makes of its route: which buckets its candidate has there, beside those of others.

Several rollouts may share a route, each with buckets of its own (`Experiment.bucket_low` and `bucket_high`). What one
writes leaves the others' candidates as they are, and what it looks at is its own part of the route.
"""

from typing import Any

from serve.rollout.store import Rollout
from serve.routes import Route
from serve.split import Arm


def holds(route: Route, change: dict[str, Any]) -> bool:
    """True when the route already says what the change says."""
    return all(getattr(route, name) == value for name, value in change.items())


def own_arm(route: Route, rollout: Rollout) -> Arm | None:
    """The rollout's candidate on the route."""
    mine = rollout.experiment.experiment_id
    return next((arm for arm in route.arms if arm.experiment_id == mine), None)


def strangers(route: Route, rollout: Rollout) -> list[str]:
    """Candidates on the route that are in no experiment of the rollout's layer."""
    same = route.salt == rollout.experiment.salt
    return [arm.version for arm in route.arms if arm.experiment_id is None or not same]


def others_share(route: Route, rollout: Rollout) -> float:
    """Share of users on the candidates beside the rollout's own."""
    mine = rollout.experiment.experiment_id
    return sum(arm.share for arm in route.arms if arm.experiment_id != mine)


def standing(route: Route, rollout: Rollout) -> dict[str, Any]:
    """What of the route concerns the rollout; a change of it between a decision and its effect is somebody's edit."""
    arm = own_arm(route, rollout)
    return {
        "stable": route.stable,
        "pinned": route.pinned,
        "own": None if arm is None else [arm.version, arm.start, arm.share],
        "strangers": strangers(route, rollout),
    }


def route_at(route: Route, rollout: Rollout, share: float) -> dict[str, Any]:
    """The route while the candidate has a share; other candidates of its layer stay, all others leave."""
    experiment = rollout.experiment
    own = Arm(experiment.bucket_low, share, experiment.candidate, experiment.experiment_id)
    out = {experiment.candidate, *strangers(route, rollout)}
    others = [arm for arm in route.arms if arm.version not in out]
    known = {arm.experiment_id for arm in others}
    return {
        "stable": experiment.stable,
        "arms": tuple(sorted((*others, own), key=lambda arm: arm.start)),
        "experiment_id": route.experiment_id if route.experiment_id in known else experiment.experiment_id,
        "salt": experiment.salt,
    }


def route_promoted(rollout: Rollout) -> dict[str, Any]:
    """The route once the candidate is stable, for everybody."""
    experiment = rollout.experiment
    return {"stable": experiment.candidate, "arms": (), "experiment_id": experiment.experiment_id}


def route_left(route: Route, rollout: Rollout) -> dict[str, Any] | None:
    """The route without the candidate, promoted or not; `None` where somebody has put something else there.

    The previous champion returns alone: whatever was compared with the promoted candidate has lost its control.
    """
    experiment = rollout.experiment
    if route.stable == experiment.candidate:
        return {"stable": experiment.stable, "arms": (), "experiment_id": None}
    others = tuple(arm for arm in route.arms if arm.version != experiment.candidate)
    if len(others) == len(route.arms):
        return None
    return {"arms": others, "experiment_id": others[0].experiment_id if others else None}
