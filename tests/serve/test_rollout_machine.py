"""Random histories of a rollout against a model of what may never happen.

Evidence of every kind, people's commands, edits of the route, time, and deaths of the controller come in
any order. The model is small: shares only grow on good evidence, one stage at a time, while nobody forbids
it; harm ends a rollout at once; what is recorded is numbered without holes; what has ended stays ended.
"""

import contextlib
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from cluster.database import connect
from cluster.errors import ConflictError
from cluster.settings import load_settings
from cluster.tables import metadata
from serve.experiments.evidence import Evidence, SplitReading
from serve.rollout import commands, controller
from serve.rollout.state import ENDED, LIVE
from serve.rollout.store import Rollout, get_rollout
from serve.routes import update_route
from tests.serve.rollout_world import Killed, World, demo_settings
from tests.serve.test_decide import evidence, reading

NOT_GOOD: dict[str, dict[str, Any]] = {
    "few": {"primary": reading(users=3)},
    "nan": {"primary": reading(z=math.nan)},
    "stale": {"last_seen_us": {}},
    "split": {"split": SplitReading({}, {}, 1e-9)},
    "vague": {"guardrails": (reading("error_rate", 0.06, harm_low=-0.1, harm_high=0.3),)},
    "flat": {"primary": reading(harm=0.0, z=0.0)},
}
HARM: dict[str, dict[str, Any]] = {
    "worse": {"primary": reading(harm=0.5)},
    "errors": {"first_errors": 20},
}
KINDS = st.sampled_from([*["good"] * 16, "missing", *NOT_GOOD, *HARM])


class RolloutMachine(RuleBasedStateMachine):
    """One rollout from its start; `database` is one for all examples, emptied for each."""

    database: sa.Engine
    patch: Callable[[Callable[..., Evidence | None]], None]

    @initialize(auto=st.booleans())
    def begin(self, auto: bool) -> None:
        with self.database.begin() as connection:
            for table in metadata.sorted_tables:
                connection.execute(table.delete())
        given = demo_settings(stage_duration_s=2, hold_limit_s=50, stale_after_s=1)
        automation = given.automation.model_copy(update={"auto_rollout": auto})
        self.world = World(self.database, given.model_copy(update={"automation": automation}))
        self.kind, self.auto = "good", auto
        self.saw_good = self.edited = False
        self.broken_split = False
        self.ticks = 0
        self.patch(lambda engine, rollout: self.read())
        self.rollout_id = self.world.start().rollout_id
        self.acting = self.world.controller()

    def read(self) -> Evidence | None:
        """The evidence of the moment."""
        if self.kind == "missing":
            return None
        now = {"last_seen_us": {"candidate": self.world.now_us, "stable": self.world.now_us}}
        return evidence(**(now | NOT_GOOD.get(self.kind, {}) | HARM.get(self.kind, {})))

    @property
    def rollout(self) -> Rollout:
        return get_rollout(self.database, self.rollout_id)

    @rule(
        kind=KINDS,
        seconds=st.sampled_from([1, 3, 3, 3, 30]),
        kill_after=st.one_of(st.none(), st.none(), st.integers(1, 12)),
    )
    def tick(self, kind: str, seconds: int, kill_after: int | None) -> None:
        """Time passes, the controller looks; perhaps it dies on the way and another one takes over."""
        self.ticks += 1
        before, share = self.rollout, self.world.route.live_share
        self.world.now_us += seconds * 1_000_000
        self.kind = kind
        self.world.steps.kill_at = None if kill_after is None else self.world.steps.point + kill_after
        killed = False
        try:
            self.acting.tick()
        except Killed:
            killed = True
            with self.database.begin() as connection:
                connection.execute(sa.text("DELETE FROM leases"))
            self.acting = self.world.controller()
        self.world.steps.kill_at = None
        after = self.rollout
        settled = before.pending_decision is None
        assert after.stage - before.stage in (0, 1)
        if settled and before.state in LIVE:
            self.saw_good |= kind == "good"
            if kind != "good" and kind != "flat":
                assert self.world.route.live_share <= share, f"the share grew on {kind} evidence"
                assert after.state != "promoted"
            if kind in HARM and not killed:
                assert after.state == "rolled_back"
            if before.progress.get("frozen_by") or self.broken_split:
                assert after.stage == before.stage and after.state != "promoted"
            self.broken_split |= bool(after.progress.get("split_broken"))
        if not self.auto and after.stage > before.stage:
            assert (before.approved_stage or 0) >= after.stage

    @rule(name=st.sampled_from(["approve", "approve", "approve", "freeze", "unfreeze"]))
    def command(self, name: str) -> None:
        """A person acts; a command that the state forbids changes nothing."""
        before = self.rollout
        with contextlib.suppress(ConflictError):
            getattr(commands, name)(self.world.steps, self.rollout_id, "person:ann")
            if name == "unfreeze":
                self.edited = False
            assert before.state in LIVE

    @precondition(lambda self: self.ticks >= 8)
    @rule()
    def roll_back(self) -> None:
        """Rolling back always works until the rollout has ended badly."""
        before = self.rollout
        try:
            commands.roll_back(self.world.steps, self.rollout_id, "person:ann", "because")
        except ConflictError:
            assert before.state in ("rolled_back", "failed", "promoted")
        else:
            assert self.rollout.state == "rolled_back"
            assert self.world.registry.aliases["champion"] == "triage/1"

    @precondition(lambda self: self.ticks % 5 == 4 and self.rollout.state in LIVE)
    @precondition(lambda self: self.rollout.pending_decision is None)
    @rule(share=st.sampled_from([0.0, 0.01, 0.42]))
    def edit(self, share: float) -> None:
        """A person writes the route; the next tick leaves it alone."""
        update_route(self.database, self.world.key, {"share": share}, writer="person:bob")
        self.edited = True
        self.kind = "good"
        self.world.now_us += 1_000_000
        self.acting.tick()
        assert self.world.route.share == share

    @invariant()
    def decisions_are_numbered_without_holes(self) -> None:
        numbers = [d["number"] for d in self.world.decisions()]
        assert numbers == list(range(1, self.rollout.decisions + 1))

    @invariant()
    def the_route_agrees_with_the_state(self) -> None:
        rollout, route = self.rollout, self.world.route
        if rollout.pending_decision is not None:
            return
        if rollout.state == "promoted":
            assert self.saw_good and (route.stable, route.candidate) == ("triage/2", None)
            assert self.world.registry.aliases["champion"] == "triage/2"
        elif rollout.state in ENDED:
            assert (route.stable, route.candidate, route.share) == ("triage/1", None, 0.0)
            assert self.world.registry.aliases["champion"] == "triage/1"
        elif rollout.state in LIVE and not self.edited:
            assert route.share == rollout.settings.share(rollout.stage)


@pytest.mark.slow
def test_random_histories_never_break_the_rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = connect(load_settings(home=Path(tempfile.mkdtemp(dir=tmp_path)))[0])
    RolloutMachine.database = engine
    RolloutMachine.patch = staticmethod(lambda read: monkeypatch.setattr(controller, "_evidence", read))  # type: ignore[assignment]
    run_state_machine_as_test(
        RolloutMachine,
        settings=settings(
            max_examples=30, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
    engine.dispose()
