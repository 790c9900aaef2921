"""A/A: two equal arms, looked at again and again. False alarms must stay within alpha; real harm must be found."""

import numpy as np
import pytest

from cluster.settings import load_settings
from cluster.settings.serving import AnomalySettings
from serve.experiments.comparisons import Moments, proportion, user_mean, welch
from serve.experiments.evidence import Reading, UserValues, read_metric
from serve.experiments.metrics import find_metric
from tests.serve.simulation import REQUESTS, incidents, share_of, sticks_out, user_sums

ALPHA = 0.05
SETTINGS = load_settings(experiment={"tuning_users": 400, "tuning_trials": 1000, "alpha": ALPHA})[0].experiment


def moments(counts: np.ndarray, totals: np.ndarray) -> Moments:
    """Sums over the users that have a value."""
    counts, totals = counts[counts > 0], totals[counts > 0]
    means = totals / counts
    terms = (counts, totals, counts**2, counts * totals, totals**2, means, means**2)
    return Moments(len(counts), *(float(np.sum(term)) for term in terms))


class Arm:
    """Users who come one after another and give thumbs as time goes on, each with a taste of their own."""

    def __init__(self, random: np.random.Generator, users: int, liking: float) -> None:
        concentration = 4.0  # intra-class correlation 1 / (1 + 4) = .2
        self.random = random
        self.taste = random.beta(liking * concentration, (1 - liking) * concentration, users)
        self.counts = np.zeros(users)
        self.liked = np.zeros(users)

    def grow(self, present: int) -> None:
        """Everybody present gives a thumb with probability one half."""
        gave = self.random.random(present) < 0.5
        self.counts[:present] += gave
        self.liked[:present] += gave & (self.random.random(present) < self.taste[:present])

    @property
    def satisfaction(self) -> Moments:
        return moments(self.counts, 2 * self.liked - self.counts)

    @property
    def thumbs(self) -> Moments:
        return moments(self.counts, self.liked)


def run(random: np.random.Generator, name: str, candidate: float, looks: int = 40) -> list[Reading]:
    """The readings of one experiment: 200 users an arm arrive over the looks."""
    arms = [Arm(random, 200, liking) for liking in (candidate, 0.7)]
    metric, found = find_metric(name, SETTINGS), []
    for look in range(1, looks + 1):
        for arm in arms:
            arm.grow(max(20, 200 * look // looks))
        one, other = ((a.satisfaction if name == "satisfaction" else a.thumbs) for a in arms)
        found.append(read_metric(metric, one, other, SETTINGS, ALPHA))
    return found


@pytest.mark.parametrize("name", ["satisfaction", "thumbs_up_rate"])
def test_equal_arms_seldom_look_worse_for_certain_however_often_one_looks(name: str) -> None:
    random = np.random.default_rng(6)
    runs = [run(random, name, 0.7) for _ in range(200)]
    alarms = np.mean([any((r.harm_low or 0) > 0 for r in readings if r.users >= 20) for readings in runs])
    assert alarms <= ALPHA
    falsely_safe = np.mean([any((r.harm_high or 0) < 0 for r in readings if r.users >= 20) for readings in runs])
    assert falsely_safe <= ALPHA


def test_equal_arms_whose_windows_stick_out_are_seldom_rolled_back_for_it() -> None:
    """2 % incidents in both arms: among windows of 200 requests looked at forty times, one differs by chance."""
    random, looks_L, metric = (
        np.random.default_rng(11),
        np.arange(1, 41) * 10,
        find_metric("safety_incident_rate", SETTINGS),
    )
    arms = [incidents(random, (200, 400), 0.02) for _ in range(2)]
    odd_EL = sticks_out(arms[0], arms[1], looks_L, AnomalySettings())
    sums = [user_sums(np.full_like(arm, REQUESTS), arm, looks_L) for arm in arms]

    def is_certain(experiment: int, look: int) -> bool:
        one, other = (own.at(experiment, look) for own in sums)
        found = read_metric(metric, one, other, SETTINGS, ALPHA)
        return found.users >= SETTINGS.breach_min_users_per_arm and (found.harm_low or 0) > 0

    rolled_back = [any(is_certain(e, look) for look in np.flatnonzero(odd_EL[e])) for e in range(len(odd_EL))]
    assert share_of(odd_EL) > 0.9 and np.mean(rolled_back) <= ALPHA


def test_the_naive_test_would_alarm_far_more_often() -> None:
    random = np.random.default_rng(7)

    def alarms() -> bool:
        arms = [Arm(random, 200, 0.7) for _ in range(2)]
        for look in range(1, 41):
            for arm in arms:
                arm.grow(max(20, 5 * look))
            if welch(*(user_mean(arm.satisfaction) for arm in arms)).p_value < 2 * ALPHA:
                return True
        return False

    assert np.mean([alarms() for _ in range(100)]) > 3 * ALPHA


@pytest.mark.parametrize("name", ["satisfaction", "thumbs_up_rate"])
def test_a_planted_regression_is_found(name: str) -> None:
    random = np.random.default_rng(8)
    runs = [run(random, name, 0.45) for _ in range(40)]
    assert np.mean([any(r.is_breached for r in readings if r.users >= 20) for readings in runs]) > 0.9


def test_a_lone_agreement_of_few_users_is_not_certainty() -> None:
    metric = find_metric("satisfaction", SETTINGS)
    mixed = moments(np.ones(200), np.where(np.arange(200) < 164, 1.0, -1.0))
    unanimous = moments(np.ones(22), np.ones(22))
    found = read_metric(metric, mixed, unanimous, SETTINGS, ALPHA / 4)
    assert user_mean(unanimous).variance == 0
    assert found.harm is not None and found.harm > 0.3 and not found.is_breached


def test_errors_from_one_to_five_per_cent_are_found_and_equal_ones_are_not() -> None:
    random, metric = np.random.default_rng(9), find_metric("error_rate", SETTINGS)

    def breached(rate: float) -> bool:
        trials = np.full((2, 300), 5.0)
        errors = np.stack([random.binomial(5, r, 300) for r in (rate, 0.01)]).astype(float)
        one, other = (moments(t, e) for t, e in zip(trials, errors, strict=True))
        assert proportion(one).variance > 0
        return read_metric(metric, one, other, SETTINGS, 0.01).is_breached

    assert np.mean([breached(0.05) for _ in range(40)]) > 0.8
    assert np.mean([breached(0.01) for _ in range(100)]) <= 0.01


def test_betting_bounds_of_few_users_keep_alpha() -> None:
    """On users' first values; what has once been excluded stays so, and the last look tells of all."""
    random, metric = np.random.default_rng(10), find_metric("satisfaction", SETTINGS)

    def alarms(candidate: float) -> bool:
        arms = [Arm(random, 60, liking) for liking in (candidate, 0.7)]
        firsts = [tuple(np.where(random.random(60) < arm.taste, 1.0, -1.0)) for arm in arms]
        for arm in arms:
            arm.grow(60)
        values = UserValues(firsts[0], firsts[1])
        found = read_metric(metric, arms[0].satisfaction, arms[1].satisfaction, SETTINGS, ALPHA, values)
        return (found.harm_low or 0) > 0

    assert np.mean([alarms(0.7) for _ in range(200)]) <= ALPHA
    assert np.mean([alarms(0.1) for _ in range(10)]) > 0.9
