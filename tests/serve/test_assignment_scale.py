"""100,000 users through a whole rollout and back: nobody moves back, shares are right, layers are independent."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from sqlalchemy.engine import Engine

from cluster.database import write
from cluster.settings import load_settings
from serve.arms import plan
from serve.assignment import bucket
from serve.experiments.store import Experiment, create_experiment, end_experiment
from serve.rollout.commands import roll_back
from serve.rollout.store import get_rollout
from serve.routes import RouteKey
from serve.snapshot import Watcher
from tests.serve.rollout_story import good, scripted
from tests.serve.rollout_world import AGENT, TENANT, Population, World, demo_settings

USERS = 100_000
SHARES = (0.10, 0.25, 0.50, 0.95)


def within_binomial_error(count: int, share: float, of: int = USERS) -> bool:
    """Five standard errors: an experiment's salt is random, and this may fail once in two million runs."""
    return abs(count - of * share) <= 5 * math.sqrt(of * share * (1 - share))


@contextmanager
def replica(database: Engine) -> Iterator[Watcher]:
    """What a router reads, from its start to its end."""
    watcher = Watcher(load_settings(database={"url": str(database.url)})[0])
    watcher.refresh()
    yield watcher
    watcher.close()


def versions(database: Engine, users: range) -> np.ndarray:
    """Who is given triage/2, each user by one of two replicas that have just been started."""
    with replica(database) as one, replica(database) as other:
        found = np.zeros(len(users), bool)
        for place, number in enumerate(users):
            made = plan(
                (one, other)[number % 2].current, TENANT, AGENT,
                modality="text", user=f"user-{number}", session=None, request="r",
            )  # fmt: skip
            found[place] = made.version == "triage/2"
        return found


def test_nobody_moves_back_while_a_rollout_grows_and_everybody_does_at_the_end(
    sqlite_database: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both replicas are new at every stage: three restarts while the candidate grows."""
    world = World(sqlite_database, demo_settings(final_control_share=0.05), Population(users=1))
    scripted(monkeypatch, lambda rollout: good(world))
    rollout_id = world.start().rollout_id
    exposed = np.zeros(USERS, bool)
    for share in SHARES:
        while world.route.live_share < share:
            world.run_on(1, traffic=False)
        assert world.route.live_share == share
        candidate = versions(sqlite_database, range(USERS))
        assert not np.any(exposed & ~candidate)
        assert within_binomial_error(int(candidate.sum()), share)
        exposed = candidate
    assert np.array_equal(versions(sqlite_database, range(1, 5000)), exposed[1:5000])
    world.run_on(10, traffic=False)
    assert get_rollout(sqlite_database, rollout_id).state == "promoted"
    assert versions(sqlite_database, range(5000)).all()
    roll_back(world.steps, rollout_id, "person:ann", "enough")  # type: ignore[arg-type]
    assert not versions(sqlite_database, range(5000)).any()


def begin(database: Engine, agent: str, layer: str | None = None) -> Experiment:
    with write(database).begin() as connection:
        return create_experiment(
            connection, RouteKey(TENANT, agent), stable=f"{agent}/1", candidate=f"{agent}/2", layer=layer,
            shares={f"{agent}/1": 0.5, f"{agent}/2": 0.5}, find_version=str, config={},
        )  # fmt: skip


def places(experiment: Experiment, users: int = USERS) -> np.ndarray:
    return np.array([bucket(experiment.salt, TENANT, f"user-{n}") for n in range(users)])


def test_layers_are_independent_and_experiments_in_one_share_its_buckets(sqlite_database: Engine) -> None:
    """In two layers people meet as often as by chance, and a new experiment reshuffles."""
    one, other = begin(sqlite_database, "one"), begin(sqlite_database, "two")
    assert abs(np.corrcoef(places(one), places(other))[0, 1]) < 5 / math.sqrt(USERS)
    both = int(np.sum((places(one) < 0.5) & (places(other) < 0.5)))
    assert within_binomial_error(both, 0.25)
    with write(sqlite_database).begin() as connection:
        end_experiment(connection, one.experiment_id, "keep", 1)
    again = begin(sqlite_database, "one")
    assert abs(np.corrcoef(places(one), places(again))[0, 1]) < 5 / math.sqrt(USERS)
    left, right = begin(sqlite_database, "a", "shared"), begin(sqlite_database, "b", "shared")
    assert np.array_equal(places(left, 1000), places(right, 1000))
