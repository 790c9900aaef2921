import pytest

from cluster.errors import ConfigError
from cluster.settings import load_settings
from cluster.settings.serving import BreakerSettings, FallbackSettings
from serve.breaker import Breaker, StableLatency


def end(breaker: Breaker, ok: bool, now: float) -> None:
    """A request that begins and ends."""
    permit = breaker.allow(now)
    assert permit is not None
    breaker.record(permit, ok, now)


def test_five_failures_in_a_row_open_it() -> None:
    breaker = Breaker(BreakerSettings())
    for ok in (False, False, False, False, True, False, False, False, False):
        end(breaker, ok, 0)
    assert breaker.allow(0)
    end(breaker, False, 0)
    assert not breaker.allow(0)


def test_half_of_the_last_twenty_open_it() -> None:
    breaker = Breaker(BreakerSettings())
    for _ in range(9):
        end(breaker, False, 0)
        end(breaker, True, 0)
    end(breaker, False, 0)
    assert breaker.allow(0)  # 10 of 19: the window is not full
    end(breaker, True, 0)
    assert not breaker.allow(0)


def opened(half_open_s: float = 30) -> Breaker:
    breaker = Breaker(BreakerSettings(consecutive=1, half_open_s=half_open_s))
    end(breaker, False, 0)
    return breaker


def test_half_open_lets_one_through_and_its_end_decides() -> None:
    breaker = opened()
    assert breaker.allow(29) is None
    probe = breaker.allow(30)
    assert probe is not None
    assert breaker.allow(31) is None
    breaker.record(probe, False, 32)
    assert breaker.allow(61) is None
    end(breaker, True, 62)
    assert breaker.allow(63)
    assert not breaker.is_open


def test_probe_that_tells_nothing_gives_its_place_back() -> None:
    breaker = opened()
    probe = breaker.allow(30)
    assert probe is not None
    breaker.forget(probe)
    assert breaker.allow(31)


@pytest.mark.parametrize("probing", [False, True])
@pytest.mark.parametrize("ok", [False, True])
def test_answers_that_began_before_it_opened_change_nothing(ok: bool, probing: bool) -> None:
    breaker = Breaker(BreakerSettings(consecutive=1, half_open_s=30))
    early = [breaker.allow(0) for _ in range(3)]
    end(breaker, False, 0)
    probe = breaker.allow(30) if probing else None
    for permit in early:
        assert permit is not None
        breaker.record(permit, ok, 40)
        breaker.forget(permit)
    assert breaker.is_open
    assert breaker.allow(45) is None if probing else breaker.allow(45)
    if probe is not None:
        breaker.record(probe, True, 50)
        assert not breaker.is_open


def test_probe_that_was_given_up_counts_no_more() -> None:
    breaker = opened()
    slow, second = breaker.allow(30), breaker.allow(60)
    assert slow is not None
    assert second is not None
    breaker.record(slow, True, 61)
    assert breaker.is_open
    breaker.record(second, True, 62)
    assert not breaker.is_open


@pytest.mark.parametrize(("answer_s", "budget_s"), [(0.01, 1.0), (2.0, 4.0), (8.0, 10.0)])
def test_budget_is_twice_the_p95_within_its_bounds(answer_s: float, budget_s: float) -> None:
    latency = StableLatency(FallbackSettings())
    assert latency.budget_s() == 10.0
    for _ in range(20):
        latency.record(answer_s)
    assert latency.budget_s() == budget_s


@pytest.mark.parametrize(("least_s", "budget_s"), [(0.0, 0.02), (0.5, 0.5)])
def test_least_budget_is_what_the_setting_says(least_s: float, budget_s: float) -> None:
    latency = StableLatency(FallbackSettings(min_budget_s=least_s))
    for _ in range(20):
        latency.record(0.01)
    assert latency.budget_s() == budget_s


def test_least_budget_above_the_most_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"serve\.fallback\.min_budget_s must not exceed"):
        load_settings(serve={"fallback": {"budget_s": 0.5}})


def test_budget_ignores_the_slowest_twentieth() -> None:
    latency = StableLatency(FallbackSettings())
    for number in range(100):
        latency.record(60.0 if number % 25 == 0 else 2.0)
    assert latency.budget_s() == 4.0
