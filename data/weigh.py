"""Stage 2, attribute and weigh: nobody outvotes the rest.

All that one user says about one answer is one vote. A user has a number of full votes a day, beyond which
the day's votes share that weight, and at most a share of all votes of the dataset, counted after the
cut. A vote's weight counts when the votes of an answer are averaged, and in the weight of the example it
becomes.
"""

import heapq
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import orjson
import pyarrow as pa

from cluster.clock import DAY_US, SECOND_US
from cluster.settings.curation import WeighSettings
from data.join import to_json
from data.stages import Dropped, with_column

USER_DAYS = pa.schema([("user", pa.string()), ("day", pa.int64()), ("votes", pa.int64())])
NOTHING = "[]"
Vote = dict[str, Any]
"""`user`, `day`, `weight`, `explicit` and `implicit` rewards (mean, or None)."""


def count_votes(table: pa.Table) -> pa.Table:
    """Votes of each user on each day, of one block: rows of `USER_DAYS`."""
    tally: Counter[tuple[str, int]] = Counter()
    for text in table["signals"].to_pylist():
        if text == NOTHING:
            continue
        tally.update((vote["user"], vote["day"]) for vote in votes_of(orjson.loads(text)))
    keys = sorted(tally)
    return pa.table([[u for u, _ in keys], [d for _, d in keys], [tally[key] for key in keys]], schema=USER_DAYS)


def user_totals(table: pa.Table, votes_per_day: int) -> pa.Table:
    """Of all rows of some users: weight of each one's votes, and the days over the cap.

    Returns rows (user, total, days) where `days` is JSON `{day: factor}` of capped days only.
    """
    days: dict[str, Counter[int]] = defaultdict(Counter)
    columns = (table["user"].to_pylist(), table["day"].to_pylist(), table["votes"].to_pylist())
    for user, day, votes in zip(*columns, strict=True):
        days[user][day] += votes
    users = sorted(days)
    totals = [float(sum(min(votes, votes_per_day) for votes in days[user].values())) for user in users]
    capped = [
        to_json({str(d): votes_per_day / n for d, n in sorted(days[user].items()) if n > votes_per_day})
        for user in users
    ]
    return pa.table({"user": pa.array(users, pa.string()), "total": pa.array(totals, pa.float64()), "days": capped})


def most_votes(totals: Iterable[float], all_votes: float, dataset_share: float) -> float:
    """The weight no user may exceed, so that nobody has more than a share of what is left when all obey.

    With k users over it, the limit L solves L = share * (the rest's votes + k * L). With fewer than
    1 / share users no limit can do that; each then keeps at most that share of all votes cast.
    """
    largest = heapq.nlargest(math.ceil(1 / dataset_share) + 1, totals)
    rest = all_votes
    for over, total in enumerate([*largest, 0.0]):
        if over * dataset_share >= 1 or rest <= 0:
            break
        limit = dataset_share * rest / (1 - dataset_share * over)
        if total <= limit:
            return limit
        rest -= total
    return dataset_share * all_votes


def exceptions(totals: Iterable[pa.Table], all_votes: float, dataset_share: float) -> dict[str, dict[str, float]]:
    """Factors of the users over a cap: `{user: {day or "*": factor}}`. Small: most users are under."""
    tables = list(totals)
    limit = most_votes((t for table in tables for t in table["total"].to_pylist()), all_votes, dataset_share)
    found: dict[str, dict[str, float]] = {}
    for table in tables:
        for row in table.to_pylist():
            factors: dict[str, float] = orjson.loads(row["days"])
            if row["total"] > limit:
                factors["*"] = limit / row["total"]
            if factors:
                found[row["user"]] = factors
    return found


def weigh(
    table: pa.Table, settings: WeighSettings, factors: Mapping[str, Mapping[str, float]]
) -> tuple[pa.Table, Dropped]:
    """Adds `votes` (JSON list of `Vote`) and `weight`; counts or drops coordinated bursts."""
    all_votes, weights, kept = [], [], []
    dropped: Dropped = Counter()
    for text in table["signals"].to_pylist():
        signals = orjson.loads(text) if text != NOTHING else []
        burst = len(signals) >= settings.burst_users and is_burst(signals, settings)
        votes = votes_of(signals)
        for vote in votes:
            own = factors.get(vote["user"], {})
            vote["weight"] = own.get(str(vote["day"]), 1.0) * own.get("*", 1.0)
        dropped["coordinated burst"] += burst and settings.drop_bursts
        kept.append(not (burst and settings.drop_bursts))
        all_votes.append(to_json(votes))
        weights.append(sum(vote["weight"] for vote in votes))
    table = with_column(table, "votes", all_votes, pa.string())
    table = with_column(table, "weight", weights, pa.float64())
    return table.filter(pa.array(kept, pa.bool_())), +dropped


def votes_of(signals: list[dict[str, Any]]) -> list[Vote]:
    """One vote a user: the mean of what they said, and the clamped sum of what they did."""
    if len(signals) < 2:
        return [_vote(signal["user"], signals) for signal in signals]
    by_user: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for signal in signals:
        by_user[signal["user"]].append(signal)
    return [_vote(user, by_user[user]) for user in sorted(by_user)]


def _vote(user: str, signals: list[dict[str, Any]]) -> Vote:
    explicit = [s["reward"] for s in signals if s["source"] != "implicit" and s["type"] != "follow_up"]
    implicit = [s["reward"] for s in signals if s["source"] == "implicit"]
    return {
        "user": user,
        "day": min(s["at_us"] for s in signals) // DAY_US,
        "weight": 1.0,
        "explicit": sum(explicit) / len(explicit) if explicit else None,
        "implicit": max(-1.0, min(1.0, sum(implicit))) if implicit else None,
    }


def is_burst(signals: list[dict[str, Any]], settings: WeighSettings) -> bool:
    """True when many users vote on one answer within a short time."""
    times = sorted({s["user"]: s["at_us"] for s in signals if s["source"] != "implicit"}.values())
    users, window_us = settings.burst_users, settings.burst_window_s * SECOND_US
    return any(last - first <= window_us for first, last in zip(times, times[users - 1 :], strict=False))
