"""100,000 users through a whole rollout and back: nobody moves back, shares are right, layers are independent."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from serve.assignment import alone, assign, bucket, in_control_slice
from serve.routes import Route, RouteKey
from serve.snapshot import Snapshot, Target
from serve.split import Arm

USERS = 100_000
SHARES = (0.10, 0.25, 0.50, 1.00)
PROJECT = Path(__file__).parents[2]

REPLICA = """
import sys
from serve.assignment import alone, assign_request
salt, names = sys.argv[1], [f"user-{n}" for n in range(int(sys.argv[2]))]
for share in map(float, sys.argv[3].split(",")):
    made = (assign_request(alone(share), salt, "acme", user=name, session=None, request="r") for name in names)
    print("".join("c" if m.arm == "candidate" else "s" for m in made))
"""


@pytest.fixture(scope="module")
def places() -> np.ndarray:
    return np.array([bucket("salt", "acme", f"user-{n}") for n in range(USERS)])


def within_binomial_error(count: int, share: float, of: int = USERS) -> bool:
    """Four standard errors: once in 16,000 by chance, and the hash is fixed."""
    return abs(count - of * share) <= 4 * math.sqrt(of * share * (1 - share))


def test_nobody_moves_back_while_the_share_grows_and_everybody_does_at_the_end(places: np.ndarray) -> None:
    exposed = np.zeros(USERS, bool)
    control_before = np.zeros(USERS, bool)
    for share in SHARES:
        candidate = places < share
        assert not np.any(exposed & ~candidate)
        assert within_binomial_error(int(candidate.sum()), share)
        if share <= 0.5:
            control = np.array([in_control_slice(alone(share), 0, place) for place in places])
            assert not np.any(control & candidate) and not np.any(control_before & ~control)
            assert within_binomial_error(int(control.sum()), share)
            control_before = control
        exposed |= candidate
    assert {assign(alone(0.0), place) for place in places[:1000]} == {None}


def test_two_replicas_restarted_three_times_move_nobody_but_forward_and_everybody_back(places: np.ndarray) -> None:
    """Each replica is a process of its own, with a hash seed of its own, and begins anew at every stage."""
    before = np.zeros(USERS, bool)
    for shares in ([0.10], [0.25], [0.50], [1.00, 0.0]):
        command = [sys.executable, "-c", REPLICA, "salt", str(USERS), ",".join(map(str, shares))]
        running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=PROJECT) for _ in range(2)]
        said = [process.communicate()[0].split() for process in running]
        assert said[0] == said[1]
        candidate = np.array([arm == "c" for arm in said[0][0]])
        assert np.array_equal(candidate, places < shares[0]) and not np.any(before & ~candidate)
        before = candidate
    assert said[0][1] == "s" * USERS


def test_a_new_experiment_reshuffles_and_layers_are_independent(places: np.ndarray) -> None:
    other = np.array([bucket("another", "acme", f"user-{n}") for n in range(USERS)])
    assert abs(np.corrcoef(places, other)[0, 1]) < 4 / math.sqrt(USERS)
    for share in (0.1, 0.5):
        both = int(np.sum((places < share) & (other < share)))
        assert within_binomial_error(both, share * share)


def test_routes_of_one_layer_share_buckets_and_the_plan_records_the_propensity() -> None:
    from serve.arms import plan

    routes = {
        RouteKey("acme", agent): Route("acme", agent, "text", f"{agent}/1", (Arm(0.0, 0.3, f"{agent}/2"),), salt=salt)
        for agent, salt in (("one", "layer"), ("two", "layer"), ("three", "else"))
    }
    targets = {f"{key.agent}/{n}": Target(f"{key.agent}/{n}", "local", "m") for key in routes for n in (1, 2)}
    snapshot = Snapshot(routes, targets)
    arms: dict[str, list[str]] = {"one": [], "two": [], "three": []}
    for number in range(2000):
        for agent, own in arms.items():
            made = plan(snapshot, "acme", agent, modality="text", user=f"u{number}", session=None, request="r")
            own.append(made.arm)
            assert made.propensity == pytest.approx(0.3 if made.arm == "candidate" else 0.7)
            assert made.bucket is not None and (made.bucket < 0.3) == (made.arm == "candidate")
    assert arms["one"] == arms["two"]
    together = sum(a == b == "candidate" for a, b in zip(arms["one"], arms["three"], strict=True))
    assert within_binomial_error(together, 0.09, 2000)
