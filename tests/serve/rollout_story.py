"""A rollout from start to end in which the controller dies at chosen points, and everything it leaves behind.

Two kinds of points: before and after each effect (`KillableSteps`), and, finer, before and after every statement
and before every commit the controller sends to the database, which also die in the middle of a transaction.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from serve.experiments.evidence import Evidence
from serve.experiments.store import get_experiment
from serve.rollout import controller
from serve.rollout.controller import Controller
from serve.rollout.store import Rollout, get_rollout
from tests.serve.rollout_world import Killed, Population, World, demo_settings
from tests.serve.test_decide import evidence, reading

Ending = Literal["promoted", "rolled_back"]
WITHIN_S = 5
"""How much later than an undisturbed run one may end whose controller was killed."""


def scripted(monkeypatch: pytest.MonkeyPatch, read: Callable[[Rollout], Evidence | None]) -> None:
    """Replace what the statistics say; users then need not ask."""
    monkeypatch.setattr(controller, "_evidence", lambda engine, rollout: read(rollout))


def good(world: World) -> Evidence:
    return evidence(last_seen_us={"candidate": world.now_us, "stable": world.now_us})


def bad(world: World) -> Evidence:
    return evidence(primary=reading(harm=0.5), last_seen_us={"candidate": world.now_us, "stable": world.now_us})


def fingerprint(world: World, rollout_id: str) -> dict[str, Any]:
    """Everything a rollout leaves behind, but for times, revisions and random names."""
    rollout, route = get_rollout(world.engine, rollout_id), world.route
    experiment = get_experiment(world.engine, rollout.experiment.experiment_id)
    events = [r.event for r in world.log.scan(kinds=["rollout.decision", "model.updated"])]
    return {
        "rollout": (rollout.state, rollout.stage, rollout.decisions, rollout.reason, rollout.pending_decision),
        "progress": rollout.progress,
        "route": (route.stable, route.candidate, route.share, route.experiment_id is not None, route.pinned),
        "experiment": (experiment.state, experiment.outcome),
        "aliases": world.registry.aliases,
        "tags": {key: value.replace(rollout_id, "ID") for key, value in world.registry.tags.items()},
        "servables": world.servables.wanted,
        "events": [
            (e.kind, e.event_id.replace(rollout_id, "ID"), e.body.get("outcome"), e.body.get("share_after"))
            for e in events
        ],
        "route_changes": [
            sum(arm["share"] for arm in r.event.body["after"]["arms"]) for r in world.log.scan(kinds=["route.changed"])
        ],
    }


@dataclass
class Story:
    """What one run left behind."""

    fingerprint: dict[str, Any]
    effects: int
    """Points before and after effects."""
    statements: int
    """Points around statements and commits."""
    kills: int
    seconds: int
    """Of the world's clock until the rollout had ended."""

    @property
    def end(self) -> tuple[Any, ...]:
        """What must be equal where later looks at more traffic see other numbers: the end, and the way to it."""
        told = self.fingerprint
        steps = [(share, outcome) for kind, _, outcome, share in told["events"] if outcome != "hold"]
        return (*told["rollout"][:2], told["route"], told["experiment"], told["aliases"], told["servables"], steps)


class DiedInStatementError(Exception):
    """The process dies in the database's hands.

    An `Exception`, for SQLAlchemy closes the connection under others, and SQLite keeps the locks of a closed
    connection as long as a cursor of it is in memory.
    """


@dataclass
class StatementKiller:
    """Dies at the n-th point around the controller's SQL."""

    engine: Engine
    kill_at: int | None = None
    point: int = 0
    is_watching: bool = False
    is_dead: bool = False

    def __post_init__(self) -> None:
        for name in ("before_cursor_execute", "after_cursor_execute", "commit"):
            sa.event.listen(self.engine, name, self._pass)

    def _pass(self, *_: Any) -> None:
        self.point += self.is_watching
        self.is_dead |= self.is_watching and self.point == self.kill_at
        if self.is_watching and self.is_dead:
            raise DiedInStatementError

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Only what happens inside counts; the test's own reading does not. Whoever catches the death is dead too."""
        self.is_watching, self.is_dead = True, False
        try:
            yield
            if self.is_dead:
                raise DiedInStatementError
        finally:
            self.is_watching = False

    def close(self) -> None:
        for name in ("before_cursor_execute", "after_cursor_execute", "commit"):
            sa.event.remove(self.engine, name, self._pass)


def tell(
    engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
    ending: Ending,
    *,
    effects: Sequence[int] = (),
    statements: Sequence[int] = (),
    real_evidence: bool = False,
) -> Story:
    """A rollout to its end; the controller dies at each of these points, and another one starts at once.

    It has the default lease, so the successor must wait until the dead one's has run out before it decides anything;
    what was decided already it applies at once.
    """
    with engine.begin() as connection:
        for table in reversed(sa.inspect(engine).get_table_names()):
            if table != "alembic_version":
                connection.execute(sa.text(f"DELETE FROM {table}"))
    turns_bad = ending == "rolled_back"
    if real_evidence:
        accuracy = {"stable": 0.65, "candidate": 0.05 if turns_bad else 0.85}
        world = World(engine, demo_settings(), Population(accuracy=accuracy, seed=5))
    else:
        world = World(engine, demo_settings(stage_duration_s=1), Population(users=10))
        scripted(monkeypatch, lambda rollout: bad(world) if turns_bad and rollout.stage == 2 else good(world))
    rollout_id = world.start().rollout_id
    killer = StatementKiller(engine)
    try:
        return _tell(world, rollout_id, killer, sorted(effects), sorted(statements), real_evidence)
    finally:
        killer.close()


def _tell(
    world: World, rollout_id: str, killer: StatementKiller, effects: list[int], statements: list[int], traffic: bool
) -> Story:
    world.steps.point, kills = 0, 0
    acting = world.controller()
    seconds = 0
    while get_rollout(world.engine, rollout_id).state not in ("promoted", "rolled_back"):
        seconds += 1
        world.second(traffic=traffic)
        while True:
            world.steps.kill_at = effects[0] if effects else None
            killer.kill_at = statements[0] if statements else None
            try:
                _tick(acting, killer)
                break
            except (Killed, DiedInStatementError):
                kills += 1
                (effects if world.steps.point == world.steps.kill_at else statements).pop(0)
                acting = world.controller()
    return Story(fingerprint(world, rollout_id), world.steps.point, killer.point, kills, seconds)


def _tick(acting: Controller, killer: StatementKiller) -> None:
    with killer.watching():
        acting.tick()
