"""What to do with a rollout now: one pure function of state, evidence, configuration and time.

Three outcomes: advance (to the next stage, to a person's approval, or to promotion), hold, roll back.
Whatever is missing, stale, not a number or too little means hold, and holding too long rolls back, so
silence never ships a version. A guardrail rolls back when it is worse for certain and by more than its
margin; so does what routers found out of the ordinary where the statistics bear it out. The same arguments
give the same decision, so a recorded one can be replayed.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from cluster.clock import SECOND_US
from serve.assignment import DIGITS
from serve.experiments.caveats import caveats
from serve.experiments.evidence import Evidence, Reading
from serve.experiments.group_sequential import boundaries, next_look
from serve.experiments.planner import information_needed
from serve.rollout.state import Decision, Look, RolloutConfig, RolloutState

Problem = tuple[str, str]
"""Code and reason of a hold."""


def decide(state: RolloutState, evidence: Evidence | None, config: RolloutConfig, now_us: int) -> Decision:
    """The decision for a rollout that has users (`running`, `holding` or `awaiting_approval`), or was `promoted`.

    `evidence` is `None` when it could not be read.
    """
    if state.state == "promoted":
        return _watch(state, _breach(evidence, config) if evidence else None, config)
    harm = harm_of(evidence, config) if evidence else None
    if harm is not None and config.rollback_on_regression:
        return _roll_back(state, harm, "rejected_by_guardrail")
    if state.superseded_by is not None:
        return _roll_back(state, ("superseded", f"{state.superseded_by} was made stable meanwhile"), "keep")
    if state.frozen_by is not None:
        return _hold(state, config, ("frozen", f"frozen by {state.frozen_by}"))
    if state.edited_by is not None:
        reason = f"the route was changed by {state.edited_by}; `rayloop rollout unfreeze` takes it back"
        return _hold(state, config, ("edited", reason))
    if _held_s(state, now_us) > config.rollout.hold_limit_s:
        return _roll_back(state, ("held_too_long", f"held for {_held_s(state, now_us):.0f} s"), "inconclusive")
    if _is_above_ceiling(state, config):
        reason = f"max_share {state.max_share:g} forbids the share of its stage, {config.share(state.stage):g}"
        return _hold(state, config, ("ceiling", reason))
    if harm is not None:
        return _hold(state, config, (harm[0], f"{harm[1]}; automation.rollback_on_regression is off"))
    unreadable = _unreadable(state, evidence, config, now_us)
    if unreadable is not None or evidence is None:
        return _hold(state, config, unreadable or ("unavailable", "no evidence"))
    remaining_s = config.rollout.stage_duration_s - (now_us - state.stage_started_us) / SECOND_US
    if remaining_s > 0:
        return _run(state, config, "the stage has not lasted long enough")
    look = _look(state, evidence, config)
    failed = _failed_check(state, evidence, config, look)
    if failed is not None:
        return _hold(state, config, failed).with_look(look)
    return _with_caveats(_go_on(state, config), evidence, config).with_look(look)


def _is_above_ceiling(state: RolloutState, config: RolloutConfig) -> bool:
    """Whether the deployment config has since forbidden what the stage has already."""
    return round(config.share(state.stage) + state.others_share - state.max_share, DIGITS) > 0


def harm_of(evidence: Evidence, config: RolloutConfig) -> Problem | None:
    """A reason to roll back at once, or `None`."""
    limit = config.rollout.first_requests_max_errors
    if evidence.first_errors > limit:
        return (
            "first_requests",
            f"{evidence.first_errors} of its first {evidence.first_requests} requests failed",
        )
    certain = [anomaly.said for anomaly in evidence.anomalies if anomaly.is_certain]
    if certain:
        return "anomaly", f"routers saw it out of the ordinary, for certain: {'; '.join(certain)}"
    return _breach(evidence, config)


def _breach(evidence: Evidence, config: RolloutConfig) -> Problem | None:
    """A guardrail that is worse for certain and by more than its margin."""
    for reading in evidence.all_readings:
        if reading.is_breached and reading.users >= config.experiment.breach_min_users_per_arm:
            return "guardrail", f"{reading.metric} is worse: {_shown(reading)}"
    return None


def _unreadable(state: RolloutState, evidence: Evidence | None, config: RolloutConfig, now_us: int) -> Problem | None:
    """Why the evidence cannot be relied on, whatever it says."""
    if evidence is None:
        return "unavailable", "the evidence could not be read"
    if state.split_broken or not evidence.split.p_value >= config.experiment.srm_alpha:
        counts = evidence.split.users
        return (
            "split_broken",
            f"users are not split as configured: {counts}, p {evidence.split.p_value:.2g}",
        )
    for reading in evidence.all_readings:
        if reading.problem == "not a number" or not _is_finite(reading):
            return "not_a_number", f"{reading.metric} is not a number"
    seen = evidence.last_seen_us or {}
    oldest_us = min(seen.get("candidate", 0), seen.get("stable", 0))
    quiet_s = (now_us - max(oldest_us, state.stage_started_us)) / SECOND_US
    if quiet_s > config.rollout.stale_after_s:
        return "stale", f"no interaction on both arms for {quiet_s:.0f} s"
    return None


def _failed_check(state: RolloutState, evidence: Evidence, config: RolloutConfig, look: Look | None) -> Problem | None:
    """The first reason not to leave the stage."""
    last = state.stage == config.last_stage
    needed = config.rollout.final_min_users_per_arm if last else config.rollout.min_users_per_arm
    if evidence.primary.users < needed:
        return (
            "too_few_users",
            f"{evidence.primary.users} users with {evidence.primary.metric} an arm, {needed} needed",
        )
    for reading in (*evidence.further_primaries, *evidence.guardrails):
        if reading.problem is not None:
            return "missing", f"{reading.metric}: {reading.problem}"
    check: Callable[[], Problem | None] = {
        "no_regression": lambda: _regression(evidence, config),
        "positive_trend": lambda: _regression(evidence, config) or _trend(evidence),
        "significant_improvement": lambda: (
            _regression(evidence, config) or _inferiority(evidence, config) or _significance(state, evidence, look)
        ),
        "final_validation": lambda: (
            _regression(evidence, config)
            or _trend(evidence)
            or (None if state.is_significant else ("not_significant", "no look found an improvement"))
        ),
    }[config.check(state.stage)]
    return check()


def _judged(evidence: Evidence, config: RolloutConfig) -> list[Reading]:
    """Further primaries and guardrails that have numbers; the optional ones only with enough users."""
    enough = config.experiment.breach_min_users_per_arm
    optional = [r for r in evidence.optional_guardrails if r.problem is None and r.users >= enough]
    return [*evidence.further_primaries, *evidence.guardrails, *optional]


def _regression(evidence: Evidence, config: RolloutConfig) -> Problem | None:
    for reading in (evidence.primary, *_judged(evidence, config)):
        if not reading.is_within_margin:
            return "regression", f"{reading.metric} looks worse: {_shown(reading)}"
    return None


def _trend(evidence: Evidence) -> Problem | None:
    if evidence.primary.harm is None or not evidence.primary.harm < 0:
        return "no_trend", f"{evidence.primary.metric} does not look better: {_shown(evidence.primary)}"
    return None


def _inferiority(evidence: Evidence, config: RolloutConfig) -> Problem | None:
    for reading in _judged(evidence, config):
        if not reading.is_non_inferior:
            return "not_excluded", f"harm to {reading.metric} is not excluded yet: {_shown(reading)}"
    return None


def _significance(state: RolloutState, evidence: Evidence, look: Look | None) -> Problem | None:
    if state.is_significant or (look is not None and look.is_crossed):
        return None
    looks = (*state.looks, *([look] if look else []))
    done = {made.metric for made in looks if made.fraction >= 1.0}
    names = ", ".join(reading.metric for reading in evidence.primaries)
    if len(done) == len(evidence.primaries):
        return "inconclusive", f"all looks made, {names} not significantly better"
    return "not_significant", f"{names} not significantly better after {len(looks)} looks"


def _look(state: RolloutState, evidence: Evidence, config: RolloutConfig) -> Look | None:
    """The look that is due now: group-sequential, each planned fraction once for each primary.

    Several primaries share alpha equally (Bonferroni). One look a tick; the next primary's comes with the next.
    """
    rollout = config.rollout
    if config.check(state.stage) != "significant_improvement" or state.is_significant:
        return None
    alpha = config.experiment.alpha / len(evidence.primaries)
    planned = information_needed(rollout.detectable_improvement, alpha=alpha, power=config.experiment.power)
    for number, reading in enumerate(evidence.primaries):
        name = reading.metric if number else ""
        made = tuple(look.fraction for look in state.looks if look.metric == name)
        if reading.z is None or reading.information is None or reading.users < rollout.min_users_per_arm:
            continue
        fraction = next_look(reading.information / planned, rollout.looks, made)
        if fraction is not None:
            bounds = boundaries((*made, fraction), alpha, spending=rollout.spending)
            return Look(fraction, reading.z, bounds[-1], name)
    return None


def _go_on(state: RolloutState, config: RolloutConfig) -> Decision:
    """The stage is passed: the next one, promotion, or a person's turn."""
    following = state.stage + 1
    name = f"the {config.check(state.stage)} check of stage {state.stage + 1} is passed"
    promotes = state.stage == config.last_stage
    by_itself = config.auto_rollout and not (promotes and config.candidates > 1)  # which of several is for people
    approved = by_itself or (state.approved_stage or 0) >= following
    ceiling_needed = 1.0 if promotes else config.share(following) + state.others_share
    if ceiling_needed > state.max_share:
        return _hold(state, config, ("ceiling", f"{name}; max_share {state.max_share:g} forbids more"))
    if not approved:
        return Decision(
            "await_approval",
            "awaiting_approval",
            f"{name}; `rayloop rollout approve` goes on",
            "awaiting_approval",
            state.stage,
            config.share(state.stage),
        )
    if promotes:
        return Decision("promote", "passed", name, "promoting", state.stage, 0.0, ends_as="promote")
    return Decision("advance", "passed", name, "running", following, config.share(following))


def _with_caveats(decision: Decision, evidence: Evidence, config: RolloutConfig) -> Decision:
    """The decision, saying what makes its evidence doubtful."""
    said = caveats(evidence, config.experiment)
    if not said:
        return decision
    reason = "; but ".join([decision.reason, *said])
    return replace(decision, reason=reason, details=decision.details | {"caveats": list(said)})


def _watch(state: RolloutState, harm: Problem | None, config: RolloutConfig) -> Decision:
    """After a promotion: a breached guardrail brings the previous champion back, everything else leaves things as they
    are. What routers find out of the ordinary then is told to people only: they compare a stable version with its own
    minutes before, where any passing trouble of the engine shows.

    While another version is stable there is nothing to bring back, and nothing to watch.
    """
    if state.answered_by is not None:
        reason = f"promoted; {state.answered_by} is stable by now, and the watch rests until this version is again"
        return Decision("hold", "replaced", reason, "promoted", state.stage, 0.0)
    if harm is not None and config.rollback_on_regression:
        code, reason = harm
        decision = _roll_back(state, (code, f"after its promotion {reason}"), "rejected_by_guardrail")
        return replace(decision, details={"restores": True})
    return Decision("hold", "watching", "promoted; its guardrails are watched", "promoted", state.stage, 0.0)


def _roll_back(state: RolloutState, problem: Problem, ends_as: Any) -> Decision:
    code, reason = problem
    return Decision("rollback", code, reason, "rolling_back", state.stage, 0.0, ends_as=ends_as)


def _hold(state: RolloutState, config: RolloutConfig, problem: Problem) -> Decision:
    code, reason = problem
    return Decision(
        "hold",
        code,
        reason,
        "holding",
        state.stage,
        config.share(state.stage),
        split_broken=state.split_broken or code == "split_broken",
    )


def _run(state: RolloutState, config: RolloutConfig, reason: str) -> Decision:
    """Hold in the ordinary sense: nothing is wrong, it is only too early."""
    return Decision("hold", "waiting", reason, "running", state.stage, config.share(state.stage))


def _held_s(state: RolloutState, now_us: int) -> float:
    known = [since_us for since_us in (state.holding_since_us, state.unseen_since_us) if since_us is not None]
    return (now_us - min(known)) / SECOND_US if known else 0.0


def _is_finite(reading: Reading) -> bool:
    numbers = (
        reading.margin,
        reading.harm,
        reading.harm_low,
        reading.harm_high,
        reading.z,
        reading.information,
    )
    return all(math.isfinite(number) for number in numbers if number is not None)


def _shown(reading: Reading) -> str:
    """Both arms and the bounds, for people."""
    means = " against ".join(
        "nothing" if arm.mean is None else f"{arm.mean:.4g}" for arm in (reading.candidate, reading.control)
    )
    if reading.harm_low is None or reading.harm_high is None or reading.margin is None:
        return means
    return f"{means} (harm in [{reading.harm_low:.4g}, {reading.harm_high:.4g}], margin {reading.margin:.4g})"
