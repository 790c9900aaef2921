import pytest

from cluster.settings.serving import BreakerSettings, FallbackSettings
from serve.breaker import Breaker, StableLatency


def test_five_failures_in_a_row_open_it() -> None:
    breaker = Breaker(BreakerSettings())
    for _ in range(4):
        breaker.record(False, 0)
    breaker.record(True, 0)
    for _ in range(4):
        breaker.record(False, 0)
    assert breaker.allow(0)
    breaker.record(False, 0)
    assert not breaker.allow(0)


def test_half_of_the_last_twenty_open_it() -> None:
    breaker = Breaker(BreakerSettings())
    for _ in range(9):
        breaker.record(False, 0)
        breaker.record(True, 0)
    breaker.record(False, 0)
    assert breaker.allow(0)  # 10 of 19: the window is not full
    breaker.record(True, 0)
    assert not breaker.allow(0)


def test_half_open_lets_one_through_and_its_end_decides() -> None:
    breaker = Breaker(BreakerSettings(consecutive=1, half_open_s=30))
    breaker.record(False, 0)
    assert [breaker.allow(29), breaker.allow(30), breaker.allow(31)] == [False, True, False]
    breaker.record(False, 32)
    assert [breaker.allow(61), breaker.allow(62)] == [False, True]
    breaker.record(True, 63)
    assert breaker.allow(63)
    assert not breaker.is_open


def test_probe_that_tells_nothing_gives_its_place_back() -> None:
    breaker = Breaker(BreakerSettings(consecutive=1, half_open_s=30))
    breaker.record(False, 0)
    assert breaker.allow(30)
    breaker.forget()
    assert breaker.allow(31)


@pytest.mark.parametrize(("answer_s", "budget_s"), [(0.01, 1.0), (2.0, 4.0), (8.0, 10.0)])
def test_budget_is_twice_the_p95_within_its_bounds(answer_s: float, budget_s: float) -> None:
    latency = StableLatency(FallbackSettings())
    assert latency.budget_s() == 10.0
    for _ in range(20):
        latency.record(answer_s)
    assert latency.budget_s() == budget_s


def test_budget_ignores_the_slowest_twentieth() -> None:
    latency = StableLatency(FallbackSettings())
    for number in range(100):
        latency.record(60.0 if number % 25 == 0 else 2.0)
    assert latency.budget_s() == 4.0
