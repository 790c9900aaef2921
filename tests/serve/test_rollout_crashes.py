"""Killed at any point and replaced, a rollout ends where an undisturbed one ends.

`tests/bench/rollout_kills.py` goes through all points on both databases; here are some of them.
"""

import random
from collections.abc import Iterator

import pytest
from sqlalchemy.engine import Engine

from tests.serve.rollout_story import WITHIN_S, Ending, tell


@pytest.fixture
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.mark.parametrize("ending", ["promoted", "rolled_back"])
def test_killed_between_effects_it_ends_where_an_undisturbed_run_ends(
    database: Engine, patch: pytest.MonkeyPatch, ending: Ending
) -> None:
    undisturbed = tell(database, patch, ending)
    assert undisturbed.fingerprint["rollout"][0] == ending and undisturbed.effects >= 40
    choose = random.Random(8)
    for _ in range(6):
        points = choose.sample(range(1, undisturbed.effects + 1), choose.choice([1, 2, 3]))
        disturbed = tell(database, patch, ending, effects=points)
        assert disturbed.fingerprint == undisturbed.fingerprint, points
        assert disturbed.kills == len(points)
        assert disturbed.seconds <= undisturbed.seconds + WITHIN_S * len(points)


def test_killed_with_users_asking_it_ends_as_an_undisturbed_run_does(
    sqlite_database: Engine, patch: pytest.MonkeyPatch
) -> None:
    """Real traffic and statistics: killed between decision and effect, and before a decision."""
    undisturbed = tell(sqlite_database, patch, "rolled_back", real_evidence=True)
    points = random.Random(10).sample(range(1, undisturbed.effects + 1), 3)
    disturbed = tell(sqlite_database, patch, "rolled_back", effects=points, real_evidence=True)
    assert (disturbed.end, disturbed.kills) == (undisturbed.end, 3)
    assert disturbed.seconds <= undisturbed.seconds + 3 * WITHIN_S


@pytest.mark.parametrize("ending", ["promoted", "rolled_back"])
def test_killed_in_the_middle_of_a_transaction_it_ends_where_an_undisturbed_run_ends(
    sqlite_database: Engine, patch: pytest.MonkeyPatch, ending: Ending
) -> None:
    undisturbed = tell(sqlite_database, patch, ending)
    assert undisturbed.statements >= 200
    for point in random.Random(9).sample(range(1, undisturbed.statements + 1), 12):
        disturbed = tell(sqlite_database, patch, ending, statements=[point])
        assert (disturbed.fingerprint, disturbed.kills) == (undisturbed.fingerprint, 1), point
        assert disturbed.seconds <= undisturbed.seconds + WITHIN_S
