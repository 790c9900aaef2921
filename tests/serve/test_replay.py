"""Decisions rebuilt from the log, byte for byte, and what tampering with one looks like."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from cluster.database import connect
from cluster.settings import load_settings
from cluster.tables import event_bodies, events
from data.encoding import decode_body, encode_body
from data.log import EventLog
from serve.rollout.commands import freeze, roll_back, unfreeze
from serve.rollout.replay import verify_decisions
from serve.rollout.steps import Steps
from serve.routes import update_route
from tests.serve.rollout_world import KillableSteps, Population, World, demo_settings


def decide(database: Engine) -> World:
    """A rollout to its promotion, with a freeze and a person's edit on the way."""
    better = Population(users=400, accuracy={"stable": 0.6, "candidate": 0.9}, seed=5)
    world = World(database, demo_settings(), better)
    rollout_id = world.start().rollout_id
    world.run(rollout_id, seconds=4)
    freeze(world.steps, rollout_id, "person:ann", "lunch")  # type: ignore[arg-type]
    world.run(rollout_id, seconds=2)
    unfreeze(world.steps, rollout_id, "person:ann")  # type: ignore[arg-type]
    update_route(database, world.key, {"share": 0.02}, writer="person:bob")
    world.run(rollout_id, seconds=2)
    assert "changed by person:bob" in world.decisions()[-1]["reason"] and world.route.share == 0.02
    unfreeze(world.steps, rollout_id, "person:bob")  # type: ignore[arg-type]
    assert world.run(rollout_id).state == "promoted"
    return world


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """One such rollout; tests get a copy of its database."""
    engine = connect(load_settings(home=tmp_path_factory.mktemp("replay") / "home")[0])
    yield decide(engine)
    engine.dispose()


@pytest.fixture
def decided(finished: World, tmp_path: Path) -> Iterator[World]:
    with finished.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.connection.driver_connection.execute("VACUUM INTO ?", (str(tmp_path / "rayloop.db"),))  # type: ignore[union-attr]
    engine = connect(load_settings(home=tmp_path)[0])
    world = copy.copy(finished)
    world.engine, world.log = engine, EventLog(engine)
    world.steps = KillableSteps(Steps(engine, world.registry, world.servables, world.routers, lambda: world.now_us))
    yield world
    engine.dispose()


def test_every_decision_is_rebuilt(database: Engine) -> None:
    decided = decide(database)
    report = verify_decisions(decided.engine)
    assert report.faults == []
    assert report.decisions == len(decided.decisions())
    by_evidence = [d for d in decided.decisions() if "state" in d["evidence"]]
    assert report.rebuilt == len(by_evidence) >= 5


def test_a_rollback_over_a_promotion_is_in_order(decided: World) -> None:
    rollout_id = decided.decisions()[0]["rollout_id"]
    roll_back(decided.steps, rollout_id, "person:ann", "worse after all")  # type: ignore[arg-type]
    assert verify_decisions(decided.engine).faults == []


def tamper(world: World, number: int, change: dict[tuple[str, ...], Any]) -> None:
    """Rewrite the body of one decision."""
    query = sa.select(events.c.seq, event_bodies.c.body, event_bodies.c.arrays).join(
        event_bodies, event_bodies.c.seq == events.c.seq
    )
    with world.engine.begin() as connection:
        rows = connection.execute(query.where(events.c.kind == "rollout.decision").order_by(events.c.seq)).all()
        row = rows[number - 1]
        body = orjson.loads(orjson.dumps(decode_body(row.body, row.arrays)))
        for path, value in change.items():
            place = body
            for name in path[:-1]:
                place = place[name]
            place[path[-1]] = value
        encoded, arrays = encode_body(body)
        connection.execute(
            event_bodies.update().where(event_bodies.c.seq == row.seq).values(body=encoded, arrays=arrays)
        )


def number_of(world: World, outcome: str) -> int:
    return next(d["number"] for d in world.decisions() if d["outcome"] == outcome and "state" in d["evidence"])


def test_other_evidence_gives_another_decision(decided: World) -> None:
    number = number_of(decided, "advance")
    tamper(decided, number, {("evidence", "evidence", "primary", "harm_low"): 0.2,
                             ("evidence", "evidence", "primary", "harm"): 0.3})  # fmt: skip
    (fault,) = verify_decisions(decided.engine).faults
    assert fault.number == number and "deciding again gives rollback (guardrail" in fault.what


def test_an_altered_word_beside_the_decision_is_found(decided: World) -> None:
    number = number_of(decided, "promote")
    tamper(decided, number, {("share_after",): 0.5, ("reason",): "because"})
    faults = verify_decisions(decided.engine).faults
    assert [f.number for f in faults] == [number, number]
    assert any("reason is 'because'" in f.what for f in faults)


def test_a_missing_decision_is_named(decided: World) -> None:
    number = number_of(decided, "advance")
    with decided.engine.begin() as connection:
        rows = connection.execute(sa.select(events.c.seq).where(events.c.kind == "rollout.decision")).scalars().all()
        connection.execute(events.delete().where(events.c.seq == sorted(rows)[number - 1]))
    faults = verify_decisions(decided.engine).faults
    assert any(f"decision {number} is missing" in fault.what for fault in faults)


def test_interactions_erased_since_are_counted(decided: World) -> None:
    with decided.engine.begin() as connection:
        erased = sa.select(events.c.seq).where(events.c.kind == "interaction").order_by(events.c.seq).limit(7)
        seqs = connection.execute(erased).scalars().all()
        connection.execute(event_bodies.delete().where(event_bodies.c.seq.in_(seqs)))
        connection.execute(events.update().where(events.c.seq.in_(seqs)).values(erased=True, user_id=None))
    report = verify_decisions(decided.engine)
    assert report.faults == [] and list(report.erased_behind.values()) == [7]
