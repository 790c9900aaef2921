import hashlib
import math

import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from serve.assignment import (
    alone,
    assign,
    assign_request,
    bucket,
    choose_unit,
    in_control_slice,
    propensity,
    share_in_force,
)

shares = st.floats(0, 1)
places = st.floats(0, 1, exclude_max=True)
names = st.text(max_size=30)


def test_bucket_is_the_stated_hash() -> None:
    digest = hashlib.sha256(b"\0\0\0\x01s\0\0\0\x04acme\0\0\0\x03\xc3\xa91").digest()
    expected = int.from_bytes(digest[:8], "big") / 2**64
    assert math.isclose(bucket("s", "acme", "é1"), expected, rel_tol=1e-15)


@given(names, names, names)
def test_bucket_is_stable_and_in_range(salt: str, tenant: str, user: str) -> None:
    place = bucket(salt, tenant, user)
    assert 0 <= place < 1
    assert place == bucket(salt, tenant, user)


@given(st.lists(names, min_size=3, max_size=3), st.lists(names, min_size=3, max_size=3))
def test_different_fields_never_share_an_encoding(one: list[str], other: list[str]) -> None:
    assert (one == other) == (bucket(*one) == bucket(*other))


@given(shares, shares, places)
def test_growing_the_share_never_moves_an_exposed_user_back(one: float, other: float, place: float) -> None:
    small, large = sorted((one, other))
    if assign(alone(small), place) == 0:
        assert assign(alone(large), place) == 0


@given(shares, places)
def test_control_slice_is_on_stable(share: float, place: float) -> None:
    if in_control_slice(alone(share), 0, place):
        assert assign(alone(share), place) is None


@given(shares, shares, places)
def test_control_slice_only_grows_up_to_one_half(one: float, other: float, place: float) -> None:
    small, large = sorted((one / 2, other / 2))
    if in_control_slice(alone(small), 0, place):
        assert in_control_slice(alone(large), 0, place)


def test_control_slice_is_as_large_as_the_candidates() -> None:
    places = [bucket("salt", "acme", f"user-{n}") for n in range(20_000)]
    for share, expected in ((0.1, 0.1), (0.25, 0.25), (0.5, 0.5), (0.95, 0.05)):
        size = sum(in_control_slice(alone(share), 0, place) for place in places) / len(places)
        assert abs(size - expected) < 0.01


def test_buckets_are_uniform_and_a_new_salt_reshuffles() -> None:
    users = [f"user-{n}" for n in range(10_000)]
    first = [bucket("one", "acme", user) for user in users]
    second = [bucket("two", "acme", user) for user in users]
    assert scipy.stats.kstest(first, "uniform").pvalue > 0.001
    assert abs(scipy.stats.pearsonr(first, second).statistic) < 0.04
    moved = sum(assign(alone(0.5), a) != assign(alone(0.5), b) for a, b in zip(first, second, strict=True))
    assert 4_700 < moved < 5_300


def test_unit_falls_back_from_user_to_session_to_request() -> None:
    assert choose_unit("u", "s", "r") == ("user", "u")
    assert choose_unit(None, "s", "r") == ("session", "s")
    assert choose_unit("", None, "r") == ("request", "r")


@given(st.sampled_from([0.0, 0.05, 0.1, 0.25, 0.3, 0.5, 0.95, 1.0]), names, names)
def test_a_record_implies_the_share_it_was_made_under(share: float, salt: str, user: str) -> None:
    made = assign_request(alone(share), salt, "acme", user=user, session=None, request="r")
    assert made.candidate == assign(alone(share), made.bucket)
    assert made.propensity == propensity(alone(share), made.candidate)
    assert share_in_force(made.arm, made.propensity) == share
