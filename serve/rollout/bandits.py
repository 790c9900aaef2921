"""Experiments in bandit mode on live routes: begin, follow the evidence, end.

All that a bandit remembers is the route itself. Its share follows the evidence as long as the controller was the last
to write the route; once somebody else has, theirs stands and the bandit leaves the route alone until it is
ended. Every move is a `route.changed` event that says what it rests on.
"""

import logging
from typing import Any, Literal

from sqlalchemy.engine import Engine

from cluster.clock import SECOND_US
from cluster.database import write
from cluster.errors import ConflictError, InputError, RayloopError, UnavailableError
from cluster.settings import Settings
from serve.experiments.bandit import posterior, probability_better, thompson_share
from serve.experiments.comparisons import Moments, design_effect
from serve.experiments.exposures import BANDIT
from serve.experiments.metrics import find_metric
from serve.experiments.readings import read_evidence, read_moments
from serve.experiments.store import (
    Experiment,
    Outcome,
    create_experiment,
    end_experiment,
    get_experiment,
    note_in_config,
    running_bandits,
)
from serve.rollout.decide import harm_of
from serve.rollout.state import RolloutConfig
from serve.rollout.steps import WRITER, Steps
from serve.routes import Route, RouteKey, read_route, write_route

log = logging.getLogger(__name__)

FIRST_SHARE = 0.5
Kept = Literal["stable", "candidate"]


def start_bandit(steps: Steps, settings: Settings, key: RouteKey, candidate: str, *, actor: str) -> Experiment:
    """Put a version in line as a bandit's second arm; the controller gives it users once the engines hold it.

    Raises:
        ConflictError: it has not passed its gates, another experiment runs on the route, or the route is taken.
        InputError: the primary's values have no known bounds, or the version is stable already.
        NotFoundError: no such version or route.
    """
    version, route, primary = steps.versions.get(candidate), read_route(steps.engine, key), settings.experiment.primary
    if find_metric(primary).bounds is None:
        raise InputError("experiment.primary", primary, "has no known bounds, which a bandit needs", "name another")
    gates = version.tags.get("rayloop.gates", "not_run")
    if gates != "passed":
        raise ConflictError(f"{version.id} has gates {gates}; run `rayloop evaluate {version.id} --against champion`")
    if route.stable == version.id:
        raise InputError("version", version.id, "is already stable on this route", "name another version")
    if route.arms or route.pinned:
        raise ConflictError(f"route {key} is pinned or has a candidate; free it first")
    floor = settings.experiment.bandit_floor
    with write(steps.engine).begin() as connection:
        made = create_experiment(
            connection,
            key,
            stable=route.stable,
            candidate=version.id,
            shares={version.id: FIRST_SHARE, route.stable: 1 - FIRST_SHARE},
            find_version=steps.versions.get,
            config={"mode": BANDIT, "primary": primary, "floor": floor, "started_by": actor},
            workspace=settings.workspace,
            at_us=steps.clock(),
        )
    steps.want(version.id)
    return made


def tick_bandits(steps: Steps, settings: Settings) -> None:
    """One look at every bandit; one that fails stays as it is, and `rayloop experiment show` says why."""
    for experiment in running_bandits(steps.engine):
        failure = None
        try:
            tick_bandit(steps, settings, experiment)
        except RayloopError as error:
            failure = str(error)
            log.warning("bandit %s stays as it is: %s", experiment.experiment_id, error)
        except Exception as error:  # one bandit's failure keeps nobody from looking at the others
            failure = repr(error)
            log.exception("bandit %s stays as it is", experiment.experiment_id)
        if experiment.config.get("waits_for") != failure:
            with write(steps.engine).begin() as connection:
                note_in_config(connection, experiment, waits_for=failure)


def tick_bandit(steps: Steps, settings: Settings, experiment: Experiment) -> Route:
    """Begin it when its candidate is held, or let its share follow the evidence; the route afterwards.

    A candidate that fails its first requests, or breaches a guardrail, leaves at once as it does in a rollout.

    Raises:
        UnavailableError: the candidate is not held yet, or fails its smoke test.
        ConflictError: somebody has changed the route since the experiment was made.
    """
    route = read_route(steps.engine, experiment.key)
    if route.experiment_id != experiment.experiment_id:
        return _begin(steps, experiment, route)
    evidence = read_evidence(steps.engine, experiment.experiment_id, settings.experiment, period=BANDIT)
    harm = harm_of(evidence, RolloutConfig.of(settings))
    if harm is not None and settings.automation.rollback_on_regression:
        log.warning("bandit %s ends: %s", experiment.experiment_id, harm[1])
        _end(steps, experiment, "stable", "rejected_by_guardrail", f"bandit ended: {harm[1]}", WRITER)
        return read_route(steps.engine, experiment.key)
    age_s = (steps.clock() - route.updated_at_us) / SECOND_US
    if route.updated_by != WRITER or age_s < settings.experiment.bandit_update_s:
        return route
    share, reason = next_share(steps.engine, experiment, settings)
    share = min(share, route.max_share)
    if share == route.share:
        return route
    return _write(steps, experiment, route, {"share": share}, reason)


def next_share(engine: Engine, experiment: Experiment, settings: Settings) -> tuple[float, str]:
    """The share the evidence gives, and what it rests on."""
    primary, floor = experiment.config["primary"], experiment.config["floor"]
    low, high = find_metric(primary, settings.experiment).bounds or (0.0, 1.0)
    sums = read_moments(engine, experiment.experiment_id, period=BANDIT).get(primary, {})
    arms = [
        posterior(m.sum_y, m.sum_n, low=low, high=high, design_effect=_effect(m, low, high))
        for m in (sums.get(name, NO_MOMENTS) for name in ("candidate", "control"))
    ]
    share = thompson_share(arms[0], arms[1], floor)
    better = probability_better(arms[0], arms[1])
    counts = " against ".join(f"{sums.get(n, NO_MOMENTS).sum_n:.0f}" for n in ("candidate", "control"))
    return share, f"bandit: better with probability {better:.3f} by {primary} ({counts} values)"


NO_MOMENTS = Moments(0, 0, 0, 0, 0, 0, 0, 0)


def _effect(moments: Moments, low: float, high: float) -> float:
    """The design effect of values scaled to [0, 1]."""
    if moments.users < 2:
        return 1.0
    width = high - low
    liked = (moments.sum_y - low * moments.sum_n) / width
    crossed = (moments.sum_ny - low * moments.sum_nn) / width
    squared = (moments.sum_yy - 2 * low * moments.sum_ny + low**2 * moments.sum_nn) / width**2
    return design_effect(Moments(moments.users, moments.sum_n, liked, moments.sum_nn, crossed, squared, 0, 0))


def end_bandit(steps: Steps, experiment_id: str, keep: Kept, *, actor: str) -> Experiment:
    """Give everybody one of the arms and end the experiment.

    Raises:
        ConflictError: it is no running bandit.
        InputError: `keep` names no arm.
    """
    experiment = get_experiment(steps.engine, experiment_id)
    if keep not in ("stable", "candidate"):
        raise InputError("keep", keep, "must be `stable` or `candidate`", "name the arm that stays")
    if experiment.state != "running" or experiment.config.get("mode") != BANDIT:
        raise ConflictError(f"{experiment_id} is no running bandit; see `rayloop experiment list`")
    outcome: Outcome = "promote" if keep == "candidate" else "keep"
    _end(steps, experiment, keep, outcome, f"bandit ended by {actor}, {keep} stays", actor)
    return get_experiment(steps.engine, experiment_id)


def _end(steps: Steps, experiment: Experiment, keep: Kept, outcome: Outcome, reason: str, writer: str) -> None:
    route = read_route(steps.engine, experiment.key)
    if route.experiment_id == experiment.experiment_id:
        change: dict[str, Any] = {"candidate": None, "share": 0.0, "experiment_id": None}
        change |= {"stable": experiment.candidate} if keep == "candidate" else {}
        _write(steps, experiment, route, change, reason, writer=writer)
    with write(steps.engine).begin() as connection:
        end_experiment(connection, experiment.experiment_id, outcome, steps.clock())
    if keep == "stable":
        steps.unwant(experiment.candidate)


def _begin(steps: Steps, experiment: Experiment, route: Route) -> Route:
    """First users, unless somebody has touched the route since the experiment was made."""
    touched = route.updated_at_us >= experiment.created_at_us
    if touched or route.arms or route.pinned or route.stable != experiment.stable:
        raise ConflictError(f"the route was changed by {route.updated_by} before the start")
    status, said = steps.servables.status(experiment.candidate)
    if status != "ready":
        raise UnavailableError(f"{experiment.candidate} is not servable: {said or status}")
    broken = steps.routers.smoke(route, experiment.candidate)
    if broken is not None:
        raise UnavailableError(f"the smoke test of {experiment.candidate} failed: {broken}")
    change = {
        "candidate": experiment.candidate,
        "share": min(FIRST_SHARE, route.max_share),
        "experiment_id": experiment.experiment_id,
        "salt": experiment.salt,
    }
    return _write(steps, experiment, route, change, "bandit: begins")


def _write(
    steps: Steps, experiment: Experiment, route: Route, change: dict[str, Any], reason: str, writer: str = WRITER
) -> Route:
    return write_route(
        steps.engine,
        experiment.key,
        change,
        expected_revision=route.revision,
        writer=writer,
        reason=reason,
        workspace=experiment.workspace,
    )
