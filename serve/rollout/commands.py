"""What people do to a rollout. Each command records a decision and applies it at once, without a controller."""

import math
import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from cluster.clock import SECOND_US
from cluster.database import write
from cluster.errors import ConflictError, InputError
from cluster.registry import NEEDS_RETRAINING_TAG, RETRAIN
from cluster.settings import Settings
from data.prompt_versions import current_prompt
from serve.assignment import DIGITS
from serve.experiments.store import Experiment, check_shares, create_experiment
from serve.prompt_parity import difference
from serve.rollout.apply import ATTEMPTS, apply_until_settled, record_and_apply
from serve.rollout.placement import standing
from serve.rollout.state import LIVE, Decision, RolloutConfig
from serve.rollout.steps import Steps
from serve.rollout.store import Rollout, get_rollout, insert_rollout
from serve.routes import Route, RouteKey, read_route


def start(
    steps: Steps,
    settings: Settings,
    key: RouteKey,
    candidate: str,
    *,
    actor: str,
    override_reason: str | None = None,
    layer: str | None = None,
) -> Rollout:
    """Put a version in line for its first users; a controller takes it from there.

    Raises:
        ConflictError: it needs retraining, it has not passed its gates (and no reason to override is given), or another
            experiment runs on the route, or the route is pinned.
        InputError: the version is stable already, or the layer has no proper name.
        NotFoundError: no such version or route.
    """
    return _start_all(steps, settings, key, {candidate: 1.0}, actor, override_reason, layer)[0]


def compare(
    steps: Steps,
    settings: Settings,
    key: RouteKey,
    shares: Mapping[str, float],
    *,
    actor: str,
    override_reason: str | None = None,
    layer: str | None = None,
) -> list[Rollout]:
    """Put several versions in line for one split (A/B/n): each grows, stage by stage, to its share of the users.

    Each is a rollout of its own, with buckets of its own in one layer, the control slice of its size and its part of
    alpha. `shares` may name stable, which has what is left of 1.

    Raises:
        InputError: fewer than two candidates, shares that do not sum to 1, or less for stable than for a candidate.
        ConflictError, NotFoundError: as `start`.
    """
    stable = read_route(steps.engine, key).stable
    candidates = {steps.versions.get(name).id: share for name, share in shares.items() if name != stable}
    rest = shares.get(stable, round(1.0 - math.fsum(candidates.values()), DIGITS))
    check_shares({**candidates, stable: rest})
    if len(candidates) < 2:
        raise InputError("shares", dict(shares), "must name two candidates or more", "see `rayloop rollout start`")
    for version, share in candidates.items():
        if not 0 < share <= rest:
            rule = f"must be above 0 and at most stable's, {rest:g}, whose users are its control"
            raise InputError(f"shares.{version}", share, rule, "give the candidates less")
    return _start_all(steps, settings, key, candidates, actor, override_reason, layer)


def _start_all(
    steps: Steps,
    settings: Settings,
    key: RouteKey,
    widths: Mapping[str, float],
    actor: str,
    override_reason: str | None,
    layer: str | None,
) -> list[Rollout]:
    """One rollout a candidate, side by side in the buckets of one layer, all or none."""
    route = read_route(steps.engine, key)
    configs = {}
    for name, width in widths.items():
        version = steps.versions.get(name)
        _check_start(version, route, override_reason)
        _check_prompt(steps, version, key, override_reason)
        configs[version.id] = RolloutConfig.of(settings, override_reason, candidates=len(widths), width=width)
    shares = {version: config.share(0) for version, config in configs.items()}
    shares |= {route.stable: 1.0 - math.fsum(shares.values())}
    made, low = [], 0.0
    with write(steps.engine).begin() as connection:
        for version, config in configs.items():
            experiment = create_experiment(
                connection,
                key,
                stable=route.stable,
                candidate=version,
                shares=shares,
                find_version=steps.versions.get,
                config={"mode": "rollout", "primary": settings.experiment.primary, "started_by": actor},
                buckets=(low, round(low + config.width, DIGITS)),
                layer=layer,
                workspace=settings.workspace,
                at_us=steps.clock(),
            )
            low = experiment.bucket_high
            made.append(_new(experiment, config, actor, steps.clock()))
            insert_rollout(connection, made[-1])
    return made


def _new(experiment: Experiment, config: RolloutConfig, actor: str, at_us: int) -> Rollout:
    return Rollout(
        rollout_id=f"ro-{uuid.uuid4().hex[:16]}",
        experiment=experiment,
        state="pending",
        stage=0,
        stage_started_us=at_us,
        holding_since_us=None,
        approved_stage=None,
        decisions=0,
        pending_decision=None,
        progress={"started_by": actor},
        config=config.model_dump(mode="json"),
        reason="waits until the candidate is servable",
        revision=1,
        created_at_us=at_us,
        updated_at_us=at_us,
    )


def _check_start(version: Any, route: Route, override_reason: str | None) -> None:
    if NEEDS_RETRAINING_TAG in version.tags:
        raise ConflictError(f"{version.id} needs retraining: {RETRAIN}")
    gates = version.tags.get("rayloop.gates", "not_run")
    if gates != "passed" and not override_reason:
        raise ConflictError(
            f"{version.id} has gates {gates}; run `rayloop evaluate {version.id} --against champion`, "
            "or give --override-gates --reason"
        )
    if route.pinned:
        raise ConflictError(f"route {route.key} is pinned to stable; unpin it first")
    if route.stable == version.id:
        raise InputError("version", version.id, "is already stable on this route", "name another version")
    if route.arms:
        raise ConflictError(f"route {route.key} has the candidate {route.candidate}; take it off first")


def _check_prompt(steps: Steps, version: Any, key: RouteKey, override_reason: str | None) -> None:
    prompt = current_prompt(steps.engine, key.tenant, key.agent)
    other = difference(version.trained_behind, prompt)
    if other is not None and not override_reason:
        raise ConflictError(f"{version.id} may not answer for {key}: {other}, or give --override-gates --reason")


def approve(steps: Steps, rollout_id: str, actor: str) -> Rollout:
    """Let the rollout leave its stage as soon as (and only if) the checks hold."""

    def decide_now(rollout: Rollout) -> Decision:
        _require(rollout, LIVE, "approve")
        return _as_it_is(rollout, "approve", "approved", f"approved by {actor}", approved_stage=rollout.stage + 1)

    return _command(steps, rollout_id, decide_now, actor)


def freeze(steps: Steps, rollout_id: str, actor: str, reason: str | None = None) -> Rollout:
    """Stop the rollout where it is. Guardrails still roll back."""

    def decide_now(rollout: Rollout) -> Decision:
        _require(rollout, LIVE, "freeze")
        why = f"frozen by {actor}" + (f": {reason}" if reason else "")
        return replace(_as_it_is(rollout, "freeze", "frozen", why), to_state="holding", frozen_by=actor)

    return _command(steps, rollout_id, decide_now, actor)


def unfreeze(steps: Steps, rollout_id: str, actor: str) -> Rollout:
    """Go on after a freeze or after somebody changed the route: the stage's share is written again."""

    def decide_now(rollout: Rollout) -> Decision:
        _require(rollout, LIVE, "unfreeze")
        decision = _as_it_is(rollout, "unfreeze", "unfrozen", f"unfrozen by {actor}")
        return replace(decision, to_state="running", frozen_by=None)

    return _command(steps, rollout_id, decide_now, actor)


def roll_back(steps: Steps, rollout_id: str, actor: str, reason: str) -> Rollout:
    """Send everybody to stable, now. After a promotion, within its window, the old champion returns."""

    def decide_now(rollout: Rollout) -> Decision:
        restores = rollout.state in ("promoting", "promoted")
        _require(rollout, (*LIVE, "pending", "promoting", "promoted", "rolling_back"), "rollback")
        age_s = (steps.clock() - rollout.stage_started_us) / SECOND_US
        if rollout.state == "promoted" and age_s > rollout.settings.rollout.restore_window_s:
            raise ConflictError(
                f"{rollout.rollout_id} was promoted {age_s:.0f} s ago; start a rollout of the old version"
            )
        stable = read_route(steps.engine, rollout.key).stable
        if rollout.state == "promoted" and stable != rollout.experiment.candidate:
            raise ConflictError(f"{rollout.experiment.candidate} is not stable any more, {stable} is; roll that back")
        decision = _as_it_is(rollout, "rollback", "by_hand", f"rolled back by {actor}: {reason}")
        details = {"restores": restores}
        return replace(decision, to_state="rolling_back", share=0.0, ends_as="keep", details=details)

    return _command(steps, rollout_id, decide_now, actor)


def _as_it_is(rollout: Rollout, outcome: Any, code: str, reason: str, **values: Any) -> Decision:
    """A decision that leaves state, stage and share as they are."""
    share = rollout.settings.share(rollout.stage)
    return Decision(outcome, code, reason, rollout.state, rollout.stage, share, **values)


def _require(rollout: Rollout, states: tuple[str, ...], command: str) -> None:
    if rollout.state not in states:
        raise ConflictError(f"{rollout.rollout_id} is {rollout.state}; `rollout {command}` needs {' or '.join(states)}")


def _command(steps: Steps, rollout_id: str, decide_now: Callable[[Rollout], Decision], actor: str) -> Rollout:
    """Record and apply a person's decision, trying again when the controller was quicker.

    What was decided before is finished first, so that it is not forgotten half done; only a rollback goes ahead
    of it, for it undoes whatever stands.
    """
    for attempt in range(ATTEMPTS):
        rollout = get_rollout(steps.engine, rollout_id)
        decision = decide_now(rollout)
        if rollout.pending_decision is not None and decision.outcome != "rollback":
            rollout = apply_until_settled(steps, rollout)
            if rollout.pending_decision is not None:
                raise ConflictError(f"{rollout_id} is still applying its last decision; try again")
            decision = decide_now(rollout)
        route = read_route(steps.engine, rollout.key)
        record = {
            "command": decision.outcome,
            "route_revision": route.revision,
            "route": standing(route, rollout),
        }
        try:
            return record_and_apply(steps, rollout, decision, record, actor)
        except ConflictError:
            if attempt == ATTEMPTS - 1:
                raise
    raise AssertionError("unreachable")
