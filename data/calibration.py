"""What implicit signals are worth, held against what the same people said.

Where an interaction has both, the explicit reward is regressed on how often each implicit signal occurred.
The estimate is drawn towards the configured weight by `calibration.prior_rows` imagined observations, so a
rare signal keeps its configured weight. Errors are clustered by user: ten answers to one person are not ten
people.
Source: ridge regression with a prior mean (Hoerl and Kennard 1970); cluster-robust covariance (Liang and
Zeger 1986).
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from sqlalchemy.engine import Engine

from cluster.errors import InputError
from cluster.settings import Settings
from data.log import EventLog
from data.signal_pairs import IMPLICIT, Pair, events_of, pairs_of
from data.source import plan_blocks, read_events

NORMAL_95 = 1.959964


@dataclass(frozen=True, slots=True)
class Weight:
    """One signal: what it is configured to be worth, and what people's own words make of it."""

    signal: str
    configured: float
    rows: int
    """Interactions with this signal and explicit feedback."""
    users: int
    mean_explicit: float | None
    """Mean explicit reward of those interactions."""
    fitted: float
    low: float
    high: float
    """95 % interval of `fitted`."""
    differs: bool
    """Enough rows, and the configured weight lies outside the interval."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """The report."""

    rows: int
    """Interactions with explicit feedback and at least one implicit signal."""
    users: int
    weights: list[Weight]
    agreement_configured: float | None
    """Share of those whose implicit reward has the sign of the explicit one, with the configured weights."""
    agreement_fitted: float | None

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)

    def as_settings(self) -> dict[str, float]:
        """The weights that differ, for `rewards` in rayloop.yaml; what curation uses (`calibration.apply`)."""
        return {w.signal: round(max(-1.0, min(1.0, w.fitted)), 2) for w in self.weights if w.differs}


def calibrate(engine: Engine, settings: Settings) -> Calibration:
    """Read the events of the configured tenant and workspace, sealed days and all, and fit.

    Raises:
        InputError: no interaction has both kinds of sign.
    """
    last_seq = EventLog(engine).last_seq()
    blocks = plan_blocks(engine, last_seq, settings.curation.events_per_block, None) if last_seq else []
    tables = (read_events(engine, settings, block) for block in blocks)
    pairs = pairs_of((event for table in tables for event in events_of(table, settings)), settings)
    if not pairs:
        rule = "interactions have both behaviour and explicit feedback"
        raise InputError("calibration", 0, rule, "send behaviour events beside thumbs, then calibrate again")
    return fit(pairs, settings)


def fit(pairs: list[Pair], settings: Settings) -> Calibration:
    """The weights that predict the explicit reward best, with their intervals. `pairs` must not be empty."""
    counts = np.array([[pair.signals[name] for name in IMPLICIT] for pair in pairs], float)
    explicit = np.array([pair.explicit for pair in pairs])
    prior = np.array([getattr(settings.rewards, name) for name in IMPLICIT], float)
    strength = settings.calibration.prior_rows
    precision = np.linalg.inv(counts.T @ counts + strength * np.eye(len(IMPLICIT)))
    fitted = precision @ (counts.T @ explicit + strength * prior)
    users, which = np.unique([pair.user for pair in pairs], return_inverse=True)
    scores = counts * (explicit - counts @ fitted)[:, None]
    by_user = np.zeros((len(users), len(IMPLICIT)))
    np.add.at(by_user, which, scores)
    errors = np.sqrt(np.diag(precision @ (by_user.T @ by_user) @ precision))
    weights = [
        _weight(name, pairs, float(prior[i]), float(fitted[i]), float(errors[i]), settings.calibration.min_rows)
        for i, name in enumerate(IMPLICIT)
    ]
    return Calibration(
        len(pairs), len(users), weights, _agreement(counts @ prior, explicit), _agreement(counts @ fitted, explicit)
    )


def _weight(name: str, pairs: list[Pair], configured: float, fitted: float, error: float, min_rows: int) -> Weight:
    having = [pair for pair in pairs if pair.signals[name]]
    low, high = fitted - NORMAL_95 * error, fitted + NORMAL_95 * error
    return Weight(
        signal=name,
        configured=configured,
        rows=len(having),
        users=len({pair.user for pair in having}),
        mean_explicit=sum(pair.explicit for pair in having) / len(having) if having else None,
        fitted=fitted,
        low=low,
        high=high,
        differs=len(having) >= min_rows and not low <= configured <= high,
    )


def _agreement(implicit: Any, explicit: Any) -> float | None:
    """Share of equal signs among those that have one on both sides."""
    clear = (implicit != 0) & (explicit != 0)
    return float(np.mean(np.sign(implicit[clear]) == np.sign(explicit[clear]))) if clear.any() else None


def to_text(found: Calibration) -> str:
    """The report for people."""
    lines = [
        f"{found.rows} interactions of {found.users} users have both implicit and explicit signs",
        f"{'signal':<16}{'rows':>6}{'said':>8}{'configured':>12}{'fitted':>8}  95 % interval",
    ]
    for weight in found.weights:
        said = "–" if weight.mean_explicit is None else f"{weight.mean_explicit:+.2f}"
        mark = "  differs" if weight.differs else ""
        lines.append(
            f"{weight.signal:<16}{weight.rows:>6}{said:>8}{weight.configured:>+12.2f}{weight.fitted:>+8.2f}"
            f"  {weight.low:+.2f} to {weight.high:+.2f}{mark}"
        )
    if found.agreement_configured is not None and found.agreement_fitted is not None:
        lines.append(
            f"signs agree in {found.agreement_configured:.1%} with the configured weights, "
            f"{found.agreement_fitted:.1%} with the fitted ones"
        )
    if proposed := found.as_settings():
        lines += ["for rayloop.yaml (curation uses them already where calibration.apply is on):", "rewards:"]
        lines += [f"  {name}: {value}" for name, value in proposed.items()]
    return "\n".join(lines)
