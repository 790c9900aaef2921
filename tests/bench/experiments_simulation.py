"""Two thousand simulated experiments, each read at every look exactly as a rollout reads it.

    python -m tests.bench experiments_simulation
    python -m tests.bench.experiments_simulation [--experiments 2000] [--looks 40] [--users 400]

A/A: two equal arms, ten correlated requests a user, looked at continually. The share of experiments in which
the always-valid bound ever says "worse for certain", beside what plain tests looked at as often would say; and in
which an anomaly that a router sees rolls back.
A/B: a planted harm beyond the margin must be found, and a planted improvement promoted about as often
as the planner says. Exit code 1 when false alarms exceed alpha or the power is missed.
"""

import argparse
import math
import sys
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import norm

from cluster.settings import load_settings
from cluster.settings.experiments import ExperimentSettings
from cluster.settings.serving import AnomalySettings
from serve.experiments.betting import betting_interval
from serve.experiments.comparisons import Moments, cautious_design_effect, user_mean, welch
from serve.experiments.evidence import Reading, read_metric
from serve.experiments.group_sequential import boundaries
from serve.experiments.metrics import Metric, find_metric
from serve.experiments.planner import users_needed
from serve.experiments.proportions import two_proportion_z
from serve.experiments.sequences import bernoulli_high, bernoulli_low
from tests.serve.simulation import (
    REQUESTS,
    ArmSums,
    Floats,
    incidents,
    latency_misses,
    share_of,
    sticks_out,
    tastes,
    thumbs,
    user_sums,
)

ALPHA = 0.05
LIKING = 0.7
BREACH_USERS = 30


@dataclass
class Alarms:
    """How many experiments raised an alarm at some look."""

    valid: int = 0
    by_user: int = 0
    by_request: int = 0
    breached: int = 0


def simulate(
    random: np.random.Generator, experiments: int, users: int, looks_L: npt.NDArray[np.int64], liking: float
) -> ArmSums:
    """One arm of every experiment; a third of the answers get a thumb."""
    return user_sums(*thumbs(random, tastes(random, (experiments, users), liking), reacts=1 / 3), looks_L)


def as_satisfaction(thumbs_up: Moments) -> Moments:
    """The same thumbs as rewards of 1 and -1."""
    m = thumbs_up
    return Moments(
        m.users, m.sum_n, 2 * m.sum_y - m.sum_n, m.sum_nn, 2 * m.sum_ny - m.sum_nn,
        4 * m.sum_yy - 4 * m.sum_ny + m.sum_nn, 2 * m.sum_m - m.users, 4 * m.sum_mm - 4 * m.sum_m + m.users,
    )  # fmt: skip


def look(metric: Metric, arms: tuple[Moments, Moments], settings: ExperimentSettings) -> Reading:
    """What a rollout would read."""
    one, other = (as_satisfaction(arm) if metric.name == "satisfaction" else arm for arm in arms)
    return read_metric(metric, one, other, settings, ALPHA)


def count_alarms(arms: tuple[ArmSums, ArmSums], metric: Metric, settings: ExperimentSettings) -> Alarms:
    """Every experiment, every look."""
    found = Alarms()
    experiments, looks = arms[0].users.shape
    for experiment in range(experiments):
        valid = by_user = by_request = breached = False
        for number in range(looks):
            one, other = (arm.at(experiment, number) for arm in arms)
            reading = look(metric, (one, other), settings)
            if reading.users < BREACH_USERS:
                continue
            valid |= reading.harm_low is not None and reading.harm_low > 0
            breached |= reading.is_breached
            z = welch(user_mean(one), user_mean(other))
            by_user |= z.effect < 0 and z.p_value < 2 * ALPHA
            plain = two_proportion_z((round(one.sum_y), round(one.sum_n)), (round(other.sum_y), round(other.sum_n)))
            by_request |= plain.effect < 0 and plain.p_value < 2 * ALPHA
        found.valid += valid
        found.by_user += by_user
        found.by_request += by_request
        found.breached += breached
    return found


def anomalies(
    arms: tuple[Floats, Floats], looks_L: npt.NDArray[np.int64], settings: ExperimentSettings
) -> tuple[float, float]:
    """In how many experiments a router's window of incidents sticks out, and in how many of all it rolls back."""
    metric = find_metric("safety_incident_rate", settings)
    odd_EL = sticks_out(*arms, looks_L, AnomalySettings())
    sums = [user_sums(np.full_like(arm, REQUESTS), arm, looks_L) for arm in arms]
    rolled_back = 0
    for experiment in range(len(odd_EL)):
        readings = (
            read_metric(metric, sums[0].at(experiment, number), sums[1].at(experiment, number), settings, ALPHA)
            for number in np.flatnonzero(odd_EL[experiment])
        )
        rolled_back += any(r.users >= BREACH_USERS and (r.harm_low or 0) > 0 for r in readings)
    return share_of(odd_EL), rolled_back / len(odd_EL)


def bernoulli_misses(random: np.random.Generator, runs: int, rate: float, users: int = 300) -> float:
    """In how many runs the interval of a rate misses it at some of ten looks; ten correlated requests a user."""
    looks_L = np.linspace(users // 10, users, 10).astype(np.int64)
    happened = incidents(random, (runs, users), rate)
    sums = user_sums(np.full_like(happened, REQUESTS), happened, looks_L)

    def misses(run: int, number: int) -> bool:
        own = sums.at(run, number)
        effect = cautious_design_effect(own)
        trials, yes = own.sum_n / effect, own.sum_y / effect
        return not bernoulli_low(yes, trials, ALPHA, 1000) <= rate <= bernoulli_high(yes, trials, ALPHA, 1000)

    return float(np.mean([any(misses(run, number) for number in range(len(looks_L))) for run in range(runs)]))


def betting_misses(random: np.random.Generator, runs: int, liking: float, users: int = 60) -> float:
    """In how many runs the interval of skewed first values misses their mean; the last look tells of all before it."""
    first_EU = np.where(random.random((runs, users)) < tastes(random, (runs, users), liking), 1.0, -1.0)
    intervals = [betting_interval(first_U, ALPHA, low=-1, high=1) for first_U in first_EU]
    return float(np.mean([not low <= 2 * liking - 1 <= high for low, high in intervals]))


def power(random: np.random.Generator, experiments: int) -> tuple[int, float, float]:
    """Users the planner asks for, and how often one look and four looks find the planned improvement.

    The planner is told the spread of users' means, as a person would read it off an earlier experiment.
    """
    improvement, fractions = 0.1, (0.25, 0.5, 0.75, 1.0)
    pilot = simulate(random, 1, 20_000, np.array([20_000]), LIKING).at(0, 0)
    spread = user_mean(as_satisfaction(pilot)).variance * pilot.users
    answered = pilot.users / 20_000
    plan = users_needed(spread, improvement)
    total = math.ceil(plan.candidate / answered)  # some users never react
    looks_L = np.array([round(total * f) for f in fractions])
    up = simulate(random, experiments, total, looks_L, LIKING + improvement / 2)
    flat = simulate(random, experiments, total, looks_L, LIKING)
    z_EL = 2 * (up.mean - flat.mean) / np.sqrt(4 * (up.mean_variance + flat.mean_variance))
    one = float(np.mean(z_EL[:, -1] > norm.isf(ALPHA)))
    four = float(np.mean(np.any(z_EL >= np.array(boundaries(fractions, ALPHA)), axis=1)))
    return plan.candidate, one, four


def main() -> int:
    """Print every rate; 1 when one of them is not what it should be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--experiments", type=int, default=2000)
    parser.add_argument("--looks", type=int, default=40)
    parser.add_argument("--users", type=int, default=400)
    options = parser.parse_args()
    random = np.random.default_rng(1)
    settings = load_settings(experiment={"tuning_users": options.users, "tuning_trials": options.users})[0].experiment
    looks_L = np.linspace(options.users // options.looks, options.users, options.looks).astype(np.int64)
    number = options.experiments
    failed = False
    for name in ("satisfaction", "thumbs_up_rate"):
        metric = find_metric(name, settings)
        equal = tuple(simulate(random, number, options.users, looks_L, LIKING) for _ in range(2))
        found = count_alarms((equal[0], equal[1]), metric, settings)
        print(
            f"A/A {name}: false alarms {found.valid / number:.4f} (alpha {ALPHA}); looked at as often, plain tests "
            f"by user {found.by_user / number:.3f}, by request {found.by_request / number:.3f}"
        )
        failed |= found.valid > ALPHA * number
        harmed = tuple(
            simulate(random, max(50, number // 10), options.users, looks_L, liking) for liking in (LIKING - 0.2, LIKING)
        )
        caught = count_alarms((harmed[0], harmed[1]), metric, settings).breached / len(harmed[0].users)
        print(f"A/B {name}: a harm of 20 points is rolled back in {caught:.3f}")
        failed |= caught < 0.95
    for rate in (0.02, 0.2):
        arms = tuple(incidents(random, (number, options.users), share) for share in (rate, 0.02))
        odd, taken = anomalies((arms[0], arms[1]), looks_L, settings)
        print(f"anomalies at {rate:.0%} incidents against 2 %: windows stick out in {odd:.3f}, rolled back {taken:.4f}")
        failed |= taken > ALPHA if rate == 0.02 else taken < 0.95
    runs = max(100, number // 2)
    missed = {
        "p95, users who differ": latency_misses(random, runs),
        **{f"Bernoulli at {rate:.0%}, clustered": bernoulli_misses(random, runs, rate) for rate in (0.02, 0.7)},
        **{f"betting at {liking:.0%}, skewed": betting_misses(random, runs, liking) for liking in (0.7, 0.95)},
    }
    for name, share in missed.items():
        print(f"coverage, {name}: missed at some look in {share:.4f} of {runs} runs (alpha {ALPHA})")
        failed |= share > ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / runs)
    users, one, four = power(random, number)
    print(f"A/B: {users} users an arm by the planner; power {one:.3f} at one look, {four:.3f} over four (planned 0.8)")
    failed |= not (abs(one - 0.8) < 0.04 and four > 0.75)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
