"""Experiments are refused before anything is written, and share buckets only within a layer."""

from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from cluster.database import write
from cluster.errors import ConfigError, ConflictError, InputError, NotFoundError
from cluster.settings import load_settings
from cluster.tables import experiments
from serve.experiments.store import Experiment, create_experiment, end_experiment, get_experiment
from serve.routes import RouteKey

KNOWN = {f"{agent}/{n}" for agent in ("triage", "search") for n in (1, 2, 3)}


def find_version(name: str) -> str:
    if name not in KNOWN:
        raise NotFoundError(f"no version {name!r}")
    return name


def create(database: Engine, agent: str = "triage", **changes: Any) -> Experiment:
    values: dict[str, Any] = {
        "stable": f"{agent}/1",
        "candidate": f"{agent}/2",
        "shares": {f"{agent}/1": 0.9, f"{agent}/2": 0.1},
        "find_version": find_version,
        "config": {},
    }
    with write(database).begin() as connection:
        return create_experiment(connection, RouteKey("acme", agent), **(values | changes))


def count(database: Engine) -> int:
    with database.connect() as connection:
        return connection.execute(sa.select(sa.func.count()).select_from(experiments)).scalar() or 0


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"shares": {"triage/1": 0.9, "triage/2": 0.2}}, InputError, r"must sum to 1, not 1\.1"),
        ({"shares": {"triage/1": 1.1, "triage/2": -0.1}}, InputError, r"shares\.triage/1=1\.1 must be between 0 and 1"),
        ({"shares": {"triage/1": float("nan"), "triage/2": 0.5}}, InputError, "must be between 0 and 1"),
        ({"candidate": "triage/9"}, NotFoundError, "no version 'triage/9'"),
        ({"candidate": "triage/1"}, InputError, "two different versions"),
        ({"layer": ""}, InputError, "layer='' must match"),
        ({"layer": "a b"}, InputError, "layer='a b' must match"),
    ],
)
def test_what_cannot_be_an_experiment_is_refused(
    database: Engine, changes: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        create(database, **changes)
    assert count(database) == 0


def test_two_experiments_on_one_route_are_refused(database: Engine) -> None:
    first = create(database)
    for layer in (None, "another"):
        with pytest.raises(ConflictError, match=f"experiment {first.experiment_id} runs on route triage"):
            create(database, candidate="triage/3", layer=layer)
    assert count(database) == 1


def test_experiments_of_a_layer_share_a_salt_while_they_run(database: Engine) -> None:
    first = create(database, layer="answers")
    assert create(database, "search", layer="answers").salt == first.salt
    with write(database).begin() as connection:
        connection.execute(experiments.update().values(state="ended"))
    assert create(database, layer="answers").salt != first.salt


def test_a_route_alone_is_a_layer_and_every_experiment_reshuffles_it(database: Engine) -> None:
    first, other = create(database), create(database, "search")
    assert (first.layer, other.layer) == ("triage:text", "search:text")
    assert first.salt != other.salt
    with write(database).begin() as connection:
        end_experiment(connection, first.experiment_id, "keep", 1)
    assert create(database).salt != first.salt


def test_only_a_promotion_may_be_taken_back(sqlite_database: Engine) -> None:
    outcomes = []
    for name, ends in (("triage", ["promote", "rejected_by_guardrail", "promote"]), ("search", ["keep", "promote"])):
        made = create(sqlite_database, name)
        for at_us, outcome in enumerate(ends, 1):
            with write(sqlite_database).begin() as connection:
                end_experiment(connection, made.experiment_id, outcome, at_us)  # type: ignore[arg-type]
        ended = get_experiment(sqlite_database, made.experiment_id)
        outcomes.append((ended.outcome, ended.ended_at_us))
    assert outcomes == [("rejected_by_guardrail", 2), ("keep", 1)]


@pytest.mark.parametrize(
    ("rollout", "said"),
    [
        ({"stages": [0.5, 0.25, 1.0], "checks": ["no_regression"] * 2 + ["significant_improvement"]}, "must grow"),
        ({"stages": [0.1, 0.1, 0.5, 1.0]}, "must grow"),
        ({"stages": []}, "must be shares"),
        ({"stages": [0.1, 0.2, 0.5, 1.5]}, "must be shares"),
        ({"stage_duration_s": -1}, "greater than or equal to 0"),
        ({"stage_duration_s": float("nan")}, "stage_duration_s"),
        ({"hold_limit_s": -5}, "greater than 0"),
        ({"looks": [0.5, 0.25, 1]}, "looks must grow"),
        ({"checks": ["no_regression"] * 4}, "inconclusive never ships"),
    ],
)
def test_a_rollout_that_makes_no_sense_is_refused_with_the_configuration(rollout: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_settings(rollout=rollout)


@pytest.mark.parametrize(
    "experiment",
    [
        {"primary": "smiles"},
        {"guardrails": ["error_rate", "smiles"]},
        {"margins": {"smiles": 0.1}},
        {"margins": {"error_rate": -0.1}},
        {"margins": {"error_rate": float("nan")}},
        {"covariates": ["error_rate"]},
        {"guardrails": ["satisfaction"]},
    ],
)
def test_metrics_nobody_knows_are_refused_with_the_configuration(experiment: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        load_settings(experiment=experiment)
