"""For whom an answer counts that was given outside its experiment's split, or whose user is gone."""

from pathlib import Path
from typing import Any

from sqlalchemy.engine import Engine

from cluster.database import write
from cluster.settings import load_settings
from data.erasure.erase import erase
from data.erasure.person import Person
from data.events import Event
from data.log import EventLog
from serve.assignment import Assignment
from serve.experiments.exposures import AFTER
from serve.experiments.projection import Projection
from serve.experiments.readings import read_moments
from serve.experiments.store import create_experiment
from serve.routes import RouteKey
from tests.serve.rollout_world import TENANT, feedback, interaction
from tests.serve.test_projection import CANDIDATE, settings_with, statistics, users


def begun(database: Engine, at_s: int, modality: str = "text") -> Any:
    """An experiment with triage/2 as its candidate, begun at that second."""
    with write(database).begin() as connection:
        return create_experiment(
            connection, RouteKey(TENANT, "triage", modality), stable="triage/1", candidate="triage/2",
            shares={"triage/1": 0.5, "triage/2": 0.5}, find_version=str, config={}, at_us=at_s * 1_000_000,
        )  # fmt: skip


STABLE = Assignment("stable", 0.9, 1.0, "user")


def answer(name: str, at_s: int, version: str = "triage/2", **body: Any) -> Event:
    """One of a version that is stable for everybody."""
    own: dict[str, Any] = {"at_us": at_s * 1_000_000, "assigned_version": version}
    return interaction(name, STABLE, user="ann", experiment_id=None, **own, **body)


def test_feedback_on_an_answer_that_was_folded_before_its_experiment_began_stops_nothing(database: Engine) -> None:
    """The version is tried anew; what it answered in an earlier life as stable belongs to nobody."""
    log, projection = EventLog(database), Projection(database, settings_with())
    log.append([answer("a", 10)])
    projection.catch_up()
    begun(database, 5)  # by the clock of a machine that is behind
    log.append([feedback("a", "thumbs_up", 1.0)])
    assert projection.catch_up() == 1
    assert statistics(database) == {} and users(database) == {}


def test_a_version_is_watched_from_its_experiment_on_and_in_its_modality(database: Engine) -> None:
    log, projection = EventLog(database), Projection(database, settings_with())
    made = begun(database, 20)
    log.append([answer("a", 10), answer("b", 30, modality="voice"), answer("c", 30, "triage/1"), answer("d", 30)])
    log.append([feedback(name, "thumbs_up", 1.0) for name in "abcd"])
    projection.catch_up()
    for _ in range(2):
        moments = read_moments(database, made.experiment_id, period=AFTER)
        assert (moments["error_rate"]["candidate"].sum_n, moments["thumbs_up_rate"]["candidate"].sum_n) == (1, 1)
        projection.rebuild()


def test_an_erasure_takes_a_user_off_the_sums_as_a_rebuild_does(database: Engine, tmp_path: Path) -> None:
    settings = load_settings(home=tmp_path, experiment={"breach_min_users_per_arm": 2})[0]
    log, projection = EventLog(database), Projection(database, settings)
    log.append([interaction("old", None, user="ann"), feedback("old", "thumbs_up", 1.0)])
    log.append([interaction(name, CANDIDATE, user=name[:3], user_tier="pro") for name in ("ann1", "ann2", "bob1")])
    log.append([feedback(name, "thumbs_up", 1.0) for name in ("ann1", "bob1")])
    projection.catch_up()
    assert read_moments(database, "exp", period="ramp")["satisfaction"]["candidate"].users == 2
    erase(database, settings, Person(TENANT, "ann"))
    for _ in range(2):
        for segment in ("", "tier=pro"):
            moments = read_moments(database, "exp", period="ramp", segment=segment)
            own = {metric: (sides["candidate"].users, sides["candidate"].sum_n) for metric, sides in moments.items()}
            assert own["satisfaction"] == own["error_rate"] == (1, 1)
        projection.rebuild()
