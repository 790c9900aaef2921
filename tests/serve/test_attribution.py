"""Feedback before its interaction, days late, twice, for another tenant's interaction: each counted right."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import pytest
import sqlalchemy as sa

from cluster.clock import DAY_US, SECOND_US, now_us
from cluster.database import connect
from cluster.settings import Settings, load_settings
from cluster.tables import arm_statistics
from data.group_commit import GroupCommit
from data.intake.batches import Intake
from data.intake.items import Identity
from data.join import join_events
from data.log import EventLog
from data.source import Block, read_block
from serve.assignment import Assignment
from serve.experiments.projection import Projection
from tests.serve.rollout_world import TENANT, interaction

ACME, RIVAL = Identity(TENANT, "main"), Identity("rival", "main")
CANDIDATE, CONTROL = Assignment("candidate", 0.1, 0.25, "user"), Assignment("stable", 0.9, 0.75, "user")
DAYS_AGO_US = now_us() - 9 * DAY_US


@dataclass
class Loop:
    """A log with what reads it: curation's join and the experiments' projection."""

    intake: Intake
    settings: Settings

    @property
    def log(self) -> EventLog:
        return self.intake.commit.log

    def say(self, identity: Identity, event_id: str, about: str, type: str, at_us: int | None = None) -> str:
        item: dict[str, Any] = {"event_id": event_id, "interaction_id": about, "type": type}
        if at_us is not None:
            item["occurred_at"] = at_us / SECOND_US
        return self.intake.take_in_and_wait([item], "feedback", identity)[0].status

    def serve(self, interaction_id: str, made: Assignment, version: str, user: str) -> None:
        self.log.append([interaction(interaction_id, made, user=user, at_us=DAYS_AGO_US, served_version=version)])

    def rows(self, tenant: str = TENANT) -> dict[str, tuple[str, list[str]]]:
        """Interaction -> the version that served it and the types of its signals, as curation sees them."""
        settings = self.settings.model_copy(update={"tenant": tenant, "workspace": "main"})
        table, _ = join_events(read_block(settings, Block((), 0, self.log.last_seq())))
        return {
            row["interaction_id"]: (row["version"], [s["type"] for s in orjson.loads(row["signals"])])
            for row in table.to_pylist()
        }

    def satisfaction(self) -> dict[tuple[str, str], tuple[float, float]]:
        """(arm, user) -> count and sum of explicit rewards, as the experiment sees them."""
        Projection(self.log.engine, self.settings).catch_up()
        with self.log.engine.connect() as connection:
            found = connection.execute(sa.select(arm_statistics)).mappings().all()
        sums = {(r["arm"], r["user_id"]): orjson.loads(r["sums"]).get("satisfaction") for r in found}
        return {key: (pair[0], pair[1]) for key, pair in sums.items() if pair is not None}


@pytest.fixture
def loop(database_url: str, tmp_path: Path) -> Iterator[Loop]:
    settings = load_settings(
        home=tmp_path / "home",
        database={"url": database_url},
        learning={"enabled": True},
        feedback={"explicit": True},
    )[0]
    engine = connect(settings)
    with GroupCommit(EventLog(engine), settings.log) as commit:
        yield Loop(Intake(commit, settings), settings)
    engine.dispose()


def test_feedback_before_its_interaction_waits_and_is_joined(loop: Loop) -> None:
    assert loop.say(ACME, "f1", "i1", "thumbs_up", DAYS_AGO_US) == "accepted"
    assert (loop.rows(), loop.satisfaction()) == ({}, {})
    loop.serve("i1", CANDIDATE, "triage/2", "ann")
    assert loop.rows() == {"i1": ("triage/2", ["thumbs_up"])}
    assert loop.satisfaction() == {("candidate", "ann"): (1, 1)}


def test_feedback_days_late_goes_to_the_version_that_served(loop: Loop) -> None:
    loop.serve("i1", CANDIDATE, "triage/2", "ann")
    loop.serve("i2", CONTROL, "triage/1", "bob")
    loop.satisfaction()
    assert loop.say(ACME, "f1", "i1", "thumbs_down") == "accepted"
    assert loop.rows() == {"i1": ("triage/2", ["thumbs_down"]), "i2": ("triage/1", [])}
    assert loop.satisfaction() == {("candidate", "ann"): (1, -1)}


def test_feedback_sent_twice_counts_once(loop: Loop) -> None:
    loop.serve("i1", CANDIDATE, "triage/2", "ann")
    assert loop.say(ACME, "f1", "i1", "thumbs_up") == "accepted"
    before = loop.satisfaction()
    assert loop.say(ACME, "f1", "i1", "thumbs_up") == "duplicate"
    assert loop.say(ACME, "f1", "i1", "thumbs_down") == "duplicate"  # the first word under an id stands
    assert loop.rows() == {"i1": ("triage/2", ["thumbs_up"])}
    assert loop.satisfaction() == before == {("candidate", "ann"): (1, 1)}


def test_feedback_for_another_tenants_interaction_touches_nothing_of_theirs(loop: Loop) -> None:
    loop.serve("i1", CANDIDATE, "triage/2", "ann")
    assert loop.say(ACME, "f1", "i1", "thumbs_up") == "accepted"
    assert loop.say(RIVAL, "f1", "i1", "thumbs_down") == "accepted"  # the same id is another event there
    assert loop.rows() == {"i1": ("triage/2", ["thumbs_up"])}
    assert loop.rows("rival") == {}
    assert loop.satisfaction() == {("candidate", "ann"): (1, 1)}
