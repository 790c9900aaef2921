"""Any number of candidates on one route: whose buckets are whose, now, after growth and under a ceiling."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.engine import Engine

from cluster.errors import ConflictError, InputError
from serve.arms import plan
from serve.assignment import Slice, assign, bucket, in_control_slice, propensity
from serve.routes import Route, RouteKey, read_route, write_route
from serve.snapshot import Snapshot, Target
from serve.split import Arm, live_arms

KEY = RouteKey("acme", "triage")
USERS = 100_000
WIDTHS = (0.2, 0.25, 0.25)
"""Of three candidates; stable keeps 0.3."""
GROWTH = (0.1, 0.25, 0.5, 1.0)


@pytest.fixture(scope="module")
def places() -> list[float]:
    return [bucket("layer", "acme", f"user-{n}") for n in range(USERS)]


def slices_at(stages: tuple[float, ...]) -> list[Slice]:
    starts = np.cumsum([0.0, *WIDTHS])[:-1]
    return [Slice(float(s), w * stage) for s, w, stage in zip(starts, WIDTHS, stages, strict=True)]


def arms(*shares: float, starts: tuple[float, ...] = (0.0, 0.2, 0.5)) -> tuple[Arm, ...]:
    numbered = enumerate(zip(starts, shares, strict=False), 2)
    return tuple(Arm(start, share, f"triage/{n}", f"exp-{n}") for n, (start, share) in numbered)


def test_each_candidate_keeps_its_users_while_all_of_them_grow(places: list[float]) -> None:
    """They grow at different times, as rollouts of their own do; nobody is sent back, or to another candidate."""
    known = [None] * USERS
    for step in range(4):
        stages = (GROWTH[step], GROWTH[max(0, step - 1)], GROWTH[min(3, step + 1)])
        slices = slices_at(stages)
        served = [assign(slices, place) for place in places]
        assert all(was is None or was == now for was, now in zip(known, served, strict=True))
        for number, own in enumerate(slices):
            count = served.count(number)
            assert abs(count - USERS * own.share) <= 4 * math.sqrt(USERS * own.share * (1 - own.share))
        known = served
    assert [assign(slices_at((0.0, 0.0, 0.0)), place) for place in places[:1000]] == [None] * 1000


def test_every_candidate_has_a_control_slice_of_its_size_that_only_grows(places: list[float]) -> None:
    before: list[set[int]] = [set(), set(), set()]
    for stage in GROWTH:
        slices = slices_at((stage, stage, stage))
        for number, own in enumerate(slices):
            control = {user for user, place in enumerate(places) if in_control_slice(slices, number, place)}
            assert all(assign(slices, places[user]) is None for user in control)
            assert abs(len(control) - USERS * own.share) <= 4 * math.sqrt(USERS * own.share)
            assert before[number] <= control
            before[number] = control


@given(st.lists(st.floats(0, 0.3), min_size=1, max_size=3), st.floats(0, 1, exclude_max=True))
def test_the_propensities_are_the_shares_and_sum_to_one(shares: list[float], place: float) -> None:
    slices = [Slice(number / 3, share) for number, share in enumerate(shares)]
    chances = [propensity(slices, number) for number in (None, *range(len(slices)))]
    assert math.isclose(sum(chances), 1.0)
    chosen = assign(slices, place)
    assert chosen is None or slices[chosen].start <= place < slices[chosen].start + slices[chosen].share


@given(st.lists(st.floats(0, 0.3), min_size=1, max_size=3), st.floats(0, 1), st.floats(0, 1))
def test_a_lower_ceiling_only_sends_users_to_stable(shares: list[float], one: float, other: float) -> None:
    known = tuple(Arm(number / 3, share, f"triage/{number + 2}") for number, share in enumerate(shares))
    low, high = sorted((one, other))
    for place in np.linspace(0, 0.999, 200):
        under = {a.version for a in live_arms(known, low) if a.start <= place < a.start + a.share}
        above = {a.version for a in live_arms(known, high) if a.start <= place < a.start + a.share}
        assert under <= above
    assert sum(arm.share for arm in live_arms(known, low)) <= low + 1e-8


def test_a_ceiling_holds_to_the_digit_for_one_candidate() -> None:
    assert [arm.share for arm in live_arms(arms(0.5), 0.2)] == [0.2]
    assert [arm.share for arm in live_arms(arms(0.2, 0.2), 0.1)] == [0.05, 0.05]


@pytest.mark.parametrize(
    ("split", "said"),
    [
        (arms(0.2, 0.2, 0.6), "must end at 1 at the latest"),
        (arms(0.3, 0.2), "must not overlap, as the buckets of triage/2 and triage/3 do"),
        (arms(-0.1), r"share=-0\.1 must be between 0 and 1"),
        (arms(float("nan")), "share=nan must be between 0 and 1"),
        (arms(0.1, starts=(-0.2,)), r"must be in \[0, 1\]"),
        ((Arm(0.0, 0.1, "triage/1"),), "must differ from stable"),
        ((Arm(0.0, 0.1, "triage/2"), Arm(0.2, 0.1, "triage/2")), "must be different versions"),
    ],
)
def test_a_split_that_cannot_be_is_refused(database: Engine, split: tuple[Arm, ...], said: str) -> None:
    write_route(database, KEY, {"stable": "triage/1"}, expected_revision=0, writer="person:ann")
    with pytest.raises(InputError, match=said):
        write_route(database, KEY, {"arms": split}, expected_revision=1, writer="person:ann")
    assert read_route(database, KEY).arms == ()


def test_a_row_keeps_every_candidate_and_one_share_is_none_of_several(database: Engine) -> None:
    def write(revision: int, **change: Any) -> Route:
        return write_route(database, KEY, change, expected_revision=revision, writer="person:ann")

    write(0, stable="triage/1")
    made = write(1, arms=arms(0.1, 0.2), salt="layer")
    assert read_route(database, KEY) == made and made.live_share == made.share == 0.3
    assert made.split == [("exp-2", 0.0, 0.1), ("exp-3", 0.2, 0.2)]
    with pytest.raises(InputError, match="is no share of several candidates"):
        write(2, share=0.4)
    with pytest.raises(InputError, match="cannot be given beside `arms`"):
        write(2, share=0.4, arms=arms(0.1))
    stopped = write(2, share=0.0)
    assert (stopped.live, [arm.version for arm in stopped.arms]) == ((), ["triage/2", "triage/3"])
    fewer = write(3, arms=arms(0.1))
    assert fewer.salt == stopped.salt == "layer" and fewer.split is None
    alone = write(4, candidate="triage/4", share=0.5)
    assert [arm.version for arm in alone.arms] == ["triage/4"] and alone.salt != "layer"


def test_a_ceiling_is_of_all_candidates_together(database: Engine) -> None:
    write_route(database, KEY, {"stable": "triage/1", "max_share": 0.3}, expected_revision=0, writer="config")
    with pytest.raises(ConflictError, match=r"share=0\.4 .* would pass the ceiling 0\.3"):
        write_route(database, KEY, {"arms": arms(0.2, 0.2)}, expected_revision=1, writer="controller")


def test_a_plan_names_the_candidate_its_experiment_and_its_chance() -> None:
    split = arms(0.1, 0.2)
    route = Route("acme", "triage", "text", "triage/1", split, salt="layer", experiment_id="exp-2")
    targets = {f"triage/{n}": Target(f"triage/{n}", "local", "m") for n in (1, 2, 3)}
    seen: dict[str, set[tuple[str | None, float | None]]] = {}
    for number in range(300):
        made = plan(Snapshot({KEY: route}, targets), "acme", "triage", modality="text",
                    user=f"u{number}", session=None, request="r")  # fmt: skip
        seen.setdefault(made.version, set()).add((made.experiment_id, made.propensity))
        assert (made.fallback is None) == (made.version == "triage/1")
    assert seen["triage/2"] == {("exp-2", 0.1)} and seen["triage/3"] == {("exp-3", 0.2)}
    [(experiment_id, chance)] = seen["triage/1"]
    assert experiment_id == "exp-2" and chance == pytest.approx(0.7)


def test_a_pin_gives_stable_to_everybody_and_says_whom_it_kept_from_which_candidate() -> None:
    route = Route(
        "acme", "triage", "text", "triage/1", arms(0.1, 0.2), salt="layer", experiment_id="exp-2", pinned=True
    )
    targets = {f"triage/{n}": Target(f"triage/{n}", "local", "m") for n in (1, 2, 3)}
    kept = set()
    for number in range(300):
        made = plan(Snapshot({KEY: route}, targets), "acme", "triage", modality="text",
                    user=f"u{number}", session=None, request="r")  # fmt: skip
        assert (made.version, made.arm, made.propensity) == ("triage/1", "none", None)
        assert (made.bucket is None) == (made.experiment_id is None)
        kept.add(made.experiment_id)
    assert kept == {None, "exp-2", "exp-3"}
