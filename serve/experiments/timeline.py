"""A metric's effect over time, with the interval that may be looked at all along."""

from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from cluster.errors import NotFoundError
from cluster.settings import Settings
from cluster.tables import arm_history
from data.moments import TERMS
from serve.experiments.comparisons import Moments
from serve.experiments.evidence import read_metric
from serve.experiments.metrics import find_metric
from serve.experiments.readings import periods_of, read_moments

DOTS_PER_INCH = 120


@dataclass(frozen=True, slots=True)
class Point:
    """The metric at one time; the bounds are those of the effect, always valid."""

    period: str
    at_us: int | None
    """`None` for now."""
    users: int
    """Of the smaller arm."""
    effect: float
    low: float
    high: float


def read_timeline(engine: Engine, experiment_id: str, metric: str, settings: Settings) -> list[Point]:
    """The kept points, and where it stands now.

    Raises:
        NotFoundError: no numbers of that metric yet.
    """
    h = arm_history.c
    query = sa.select(h.period, h.at_us, h.arm, *(h[term] for term in TERMS)).where(
        h.experiment_id == experiment_id, h.metric == metric
    )
    arms: dict[tuple[str, int | None], dict[str, Moments]] = {}
    with engine.connect() as connection:
        for period, at_us, arm, *sums in connection.execute(query.order_by(h.at_us)):
            arms.setdefault((period, at_us), {})[arm] = Moments(*sums)
    for period in periods_of(engine, experiment_id):
        arms[period, None] = read_moments(engine, experiment_id, period=period).get(metric, {})
    points = [p for key, own in arms.items() if (p := _point(*key, metric, own, settings)) is not None]
    if not points:
        raise NotFoundError(f"experiment {experiment_id!r} has no numbers of {metric!r} yet")
    return points


def _point(period: str, at_us: int | None, metric: str, arms: dict[str, Moments], settings: Settings) -> Point | None:
    found = find_metric(metric, settings.experiment)
    one, other = arms.get("candidate"), arms.get("control")
    if one is None or other is None or min(one.users, other.users) < 2:
        return None
    reading = read_metric(found, one, other, settings.experiment, settings.experiment.alpha)
    if reading.effect is None or reading.harm_low is None or reading.harm_high is None:
        return None
    low, high = (reading.harm_low, reading.harm_high)
    if found.better == "higher":
        low, high = -high, -low
    return Point(period, at_us, round(reading.users), reading.effect, low, high)


def draw(points: list[Point], metric: str, out: Path) -> None:
    """Write the plot as PNG: one line a period, over the users of the smaller arm."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for period in dict.fromkeys(point.period for point in points):
        own = sorted((p for p in points if p.period == period), key=lambda p: p.users)
        users = [p.users for p in own]
        axes.fill_between(users, [p.low for p in own], [p.high for p in own], alpha=0.2)
        axes.plot(users, [p.effect for p in own], marker="o", label=period)
    axes.axhline(0.0, color="black", linewidth=0.8)
    axes.set_xlabel("users of the smaller arm")
    axes.set_ylabel(f"effect on {metric}")
    axes.legend(title="period")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=DOTS_PER_INCH)
