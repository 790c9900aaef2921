"""Bandit mode: shares, floors, recorded propensities, and the estimates made from them."""

import math
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sqlalchemy.engine import Engine

from cluster.errors import ConflictError, InputError
from cluster.settings import load_settings
from data.offpolicy import weighted_mean
from serve.experiments.bandit import Posterior, posterior, probability_better, thompson_share
from serve.experiments.logged import estimates, read_logged
from serve.experiments.offpolicy import Logged, estimate
from serve.experiments.projection import Projection
from serve.experiments.readings import read_moments
from serve.experiments.store import get_experiment
from serve.rollout.bandits import end_bandit, start_bandit, tick_bandits
from serve.rollout.steps import Steps
from serve.routes import RouteKey, read_route, update_route, write_route
from tests.serve.rollout_world import AGENT, TENANT, FakeRegistry, FakeRouters, FakeServables, Population
from tests.serve.test_projection import interaction

KEY = RouteKey(TENANT, AGENT)


def test_probability_better_matches_drawing() -> None:
    random = np.random.default_rng(1)
    for a, b in (((8.0, 4.0), (60.0, 40.0)), ((1.0, 1.0), (1.0, 1.0)), ((301.0, 201.0), (201.0, 301.0))):
        drawn = np.mean(random.beta(*a, 200_000) > random.beta(*b, 200_000))
        assert abs(probability_better(Posterior(*a), Posterior(*b)) - drawn) < 0.004


def test_share_stays_between_the_floors_and_knows_little_at_first() -> None:
    nothing, good, bad = Posterior(1, 1), Posterior(900, 100), Posterior(100, 900)
    assert thompson_share(nothing, nothing, 0.1) == 0.5
    assert thompson_share(good, bad, 0.1) == 0.9 and thompson_share(bad, good, 0.1) == 0.1
    with pytest.raises(InputError, match=r"must be above 0 and at most 0\.5"):
        thompson_share(good, bad, 0.0)


def test_posterior_of_rewards_in_minus_one_to_one() -> None:
    found = posterior(10.0, 50.0, low=-1.0)  # 30 of 50 liked
    assert (found.a, found.b) == (31.0, 21.0)
    halved = posterior(10.0, 50.0, low=-1.0, design_effect=2.0)
    assert (halved.a, halved.b) == (16.0, 11.0)


@pytest.fixture
def bandit(database: Engine) -> Iterator[tuple[Steps, Any, Any]]:
    """A running bandit on a real database, its first share on the route."""
    settings = load_settings(tenant=TENANT, experiment={"bandit_update_s": 1e-6, "bandit_floor": 0.2})[0]
    registry = FakeRegistry({"triage/1": "passed", "triage/2": "passed", "triage/3": "failed"})
    steps = Steps(database, registry, FakeServables(), FakeRouters())
    write_route(database, KEY, {"stable": "triage/1"}, expected_revision=0, writer="person:ann")
    made = start_bandit(steps, settings, KEY, "triage/2", actor="person:ann")
    tick_bandits(steps, settings)
    yield steps, settings, made


def ask(steps: Steps, population: Population, users: range) -> None:
    from serve.assignment import Assignment, assign_request

    route = read_route(steps.engine, KEY)

    def assigner(user: str) -> tuple[Assignment, str | None]:
        # a salt of our own: the experiment's is random, and so would be which of many intervals misses
        made = assign_request(route.live, "salt", TENANT, user=user, session=None, request="r")
        return made, route.experiment_id

    from data.log import EventLog

    population.ask(EventLog(steps.engine), assigner, users, 1_000_000)


def test_a_bandit_moves_towards_the_better_arm_and_its_log_judges_other_splits(bandit: Any) -> None:
    steps, settings, made = bandit
    assert read_route(steps.engine, KEY).share == 0.5
    population = Population(users=900, accuracy={"stable": 0.5, "candidate": 0.8}, spread=0.0, seed=2)
    for turn in range(3):
        ask(steps, population, range(turn * 300, turn * 300 + 300))
        Projection(steps.engine, settings).catch_up()
        tick_bandits(steps, settings)
    route = read_route(steps.engine, KEY)
    assert route.share == 0.8 and route.updated_by == "controller"
    sums = read_moments(steps.engine, made.experiment_id, period="bandit")["satisfaction"]
    assert sums["candidate"].users > sums["control"].users > 100
    logged = read_logged(steps.engine, made.experiment_id)
    assert set(np.round(logged.propensity_N, 6)) <= {0.5, 0.2, 0.8}
    wrong = population.wrong_thumb
    liked = {name: a * (1 - wrong) + (1 - a) * wrong for name, a in population.accuracy.items()}
    for row in estimates(steps.engine, made.experiment_id, [0.0, 1.0]):
        assert row["low"] <= 2 * liked["candidate" if row["share"] else "stable"] - 1 <= row["high"]


def test_a_bandit_whose_candidate_fails_ends_with_stable_for_everybody(bandit: Any) -> None:
    steps, settings, made = bandit
    ask(steps, Population(users=60, error_rate={"stable": 0.0, "candidate": 0.9}, seed=3), range(60))
    Projection(steps.engine, settings).catch_up()
    tick_bandits(steps, settings)
    ended, route = get_experiment(steps.engine, made.experiment_id), read_route(steps.engine, KEY)
    assert (ended.state, ended.outcome) == ("ended", "rejected_by_guardrail")
    assert (route.stable, route.candidate, route.experiment_id) == ("triage/1", None, None)


def test_a_bandit_says_why_it_waits(bandit: Any) -> None:
    steps, settings, made = bandit
    end_bandit(steps, made.experiment_id, "stable", actor="person:ann")
    second = start_bandit(steps, settings, KEY, "triage/2", actor="person:ann")

    def waits_for() -> str | None:
        found = get_experiment(steps.engine, second.experiment_id).config.get("waits_for")
        return found if found is None else str(found)

    steps.routers.broken = "HTTP 502"
    tick_bandits(steps, settings)
    assert "the smoke test of triage/2 failed: HTTP 502" in str(waits_for())
    steps.routers.broken = None
    tick_bandits(steps, settings)
    assert waits_for() is None and read_route(steps.engine, KEY).share == 0.5


def test_a_persons_edit_stops_a_bandit(bandit: Any) -> None:
    steps, settings, _ = bandit
    update_route(steps.engine, KEY, {"share": 0.33}, writer="person:bob")
    ask(steps, Population(users=400, accuracy={"stable": 0.5, "candidate": 0.9}), range(400))
    Projection(steps.engine, settings).catch_up()
    tick_bandits(steps, settings)
    assert read_route(steps.engine, KEY).share == 0.33
    update_route(steps.engine, KEY, {"candidate": None, "share": 0.0}, writer="person:bob")
    tick_bandits(steps, settings)
    assert read_route(steps.engine, KEY).candidate is None


def test_a_bandit_ends_with_one_arm_for_everybody(bandit: Any) -> None:
    steps, _, made = bandit
    with pytest.raises(InputError, match="must be `stable` or `candidate`"):
        end_bandit(steps, made.experiment_id, "both", actor="person:ann")  # type: ignore[arg-type]
    assert end_bandit(steps, made.experiment_id, "candidate", actor="person:ann").outcome == "promote"
    route = read_route(steps.engine, KEY)
    assert (route.stable, route.candidate, route.experiment_id) == ("triage/2", None, None)
    with pytest.raises(ConflictError, match="no running bandit"):
        end_bandit(steps, made.experiment_id, "stable", actor="person:ann")


def test_a_bandit_is_refused_before_anything_is_written(bandit: Any) -> None:
    steps, settings, _ = bandit
    with pytest.raises(ConflictError, match="has gates failed"):
        start_bandit(steps, settings, KEY, "triage/3", actor="person:ann")
    with pytest.raises(ConflictError, match="has a candidate"):
        start_bandit(steps, settings, KEY, "triage/2", actor="person:ann")
    odd = load_settings(tenant=TENANT, experiment={"primary": "outcome:minutes"})[0]
    with pytest.raises(InputError, match="no known bounds"):
        start_bandit(steps, odd, KEY, "triage/2", actor="person:ann")


def test_off_policy_refuses_what_it_cannot_weigh() -> None:
    one = np.array([0]), np.array([True]), np.array([0.0]), np.array([1.0])
    with pytest.raises(InputError, match=r"propensity=0\.0 must be above 0"):
        estimate(Logged(*one), 0.5, "ips")
    with pytest.raises(InputError, match="share=nan"):
        estimate(Logged(*one), math.nan, "ips")
    empty = Logged(*(array[:0] for array in one))
    with pytest.raises(InputError, match="no request with a reward"):
        estimate(empty, 0.5, "ips")


def test_off_policy_by_hand() -> None:
    logged = Logged(
        np.arange(4), np.array([True, False, True, False]), np.array([0.5, 0.5, 0.25, 0.75]), np.array([1.0, 0, 0, 1])
    )
    assert math.isclose(estimate(logged, 1.0, "ips").value, 1 / 0.5 / 4)
    assert math.isclose(estimate(logged, 1.0, "snips").value, 2 / 6)
    assert math.isclose(estimate(logged, 1.0, "ips").effective_requests, 6**2 / (4 + 16))


def test_off_policy_on_digits_matches_open_bandit_pipeline() -> None:
    """Open Bandit Pipeline's README: digits as a bandit; true value .963434, relative error of IPW .018273.

    Logged by a logistic regression (.8 of the time its choice, else any), judged for a random forest.
    """
    X, y = load_digits(return_X_y=True)
    X_train, X_eval, y_train, y_eval = train_test_split(X, y, test_size=0.7, random_state=12345)
    rows, actions = np.arange(len(y_eval)), 10
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the regression stops early there too
        logging_N = LogisticRegression(random_state=12345).fit(X_train, y_train).predict(X_eval)
    judged_N = RandomForestClassifier(random_state=12345).fit(X_train, y_train).predict(X_eval)
    logging_NA = np.full((rows.size, actions), 0.2 / actions)
    logging_NA[rows, logging_N] += 0.8
    chance_N1 = np.random.RandomState(12345).uniform(size=(rows.size, 1))
    action_N = (logging_NA.cumsum(axis=1) > chance_N1).argmax(axis=1)
    weight_N = (action_N == judged_N) / logging_NA[rows, action_N]
    truth = float(np.mean(judged_N == y_eval))
    found = weighted_mean(rows, weight_N, (action_N == y_eval).astype(float))
    print(f"truth {truth:.6f}, relative error {abs(found.value - truth) / truth:.6f}")
    assert abs(truth - 0.963434) < 5e-7
    assert abs(abs(found.value - truth) / truth - 0.018273) < 5e-7
    assert found.low <= truth <= found.high


def test_the_example_interaction_is_one_of_a_bandit() -> None:
    """A bandit's user may go back and forth and still counts for both arms."""
    from data.events import RecordedEvent
    from serve.assignment import Assignment
    from serve.experiments.exposures import Design, Designs, exposures_of

    event = interaction("a", Assignment("stable", 0.3, 0.8, "user"), user="ann")
    recorded = RecordedEvent(1, event, 1, b"")
    bandit = Designs({"exp": Design("acme", "triage", "text", "triage/2", 0, is_bandit=True)})
    [middle], [counted] = exposures_of(recorded, Designs({})), exposures_of(recorded, bandit)
    assert middle.sides == () and middle.period == "ramp"
    assert counted.sides == ("control",) and counted.period == "bandit"
