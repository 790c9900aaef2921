"""Stage 2, attribute and weigh: nobody outvotes the rest.

All that one user says about one answer is one vote; users who keep voting together are one (`data.voters`). A
user has a number of full votes a day, beyond which the day's votes share that weight, and at most a share of
all votes of the dataset and of all answers judged, counted after the cut. A vote's weight counts when the votes
of an answer are averaged, and in the weight of the example it becomes, by which training draws its rows.
"""

import heapq
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Literal

import orjson
import pyarrow as pa

from cluster.clock import DAY_US, SECOND_US
from cluster.settings.curation import WeighSettings
from data.join import to_json
from data.stages import Dropped, with_column

USER_DAYS = pa.schema([("user", pa.string()), ("day", pa.int64()), ("votes", pa.int64()), ("parts", pa.int64())])
"""`parts`: of the answers judged, each shared by those who voted on it, in units of 1 / `WHOLE`."""
WHOLE = 1_000_000
MEASURES = ("votes", "answers")
"""What a user may have only a share of."""
NOTHING = "[]"
Day = Literal["recorded", "occurred"]
CLOCKS: Mapping[Day, str] = {"recorded": "logged_us", "occurred": "at_us"}
"""Which time of a signal is that of the vote (`curation.weigh.day`)."""
Vote = dict[str, Any]
"""`user`, `day`, `weight`, `explicit` and `implicit` rewards (mean, or None), and how many texts they `wrote`."""
Groups = Mapping[str, str]
"""User -> the name under which they vote; who is not in it votes as themselves."""
NO_GROUPS: Groups = MappingProxyType({})


def count_votes(table: pa.Table, settings: WeighSettings, groups: Groups = NO_GROUPS) -> pa.Table:
    """Votes of each user on each day, of one block: rows of `USER_DAYS`.

    Who wrote a correction has the whole of the example that it becomes, whoever else voted.
    """
    tally: Counter[tuple[str, int]] = Counter()
    parts: Counter[tuple[str, int]] = Counter()
    for text in table["signals"].to_pylist():
        if text == NOTHING:
            continue
        votes = votes_of(orjson.loads(text), settings.day, groups)
        for vote in votes:
            tally[vote["user"], vote["day"]] += 1
            parts[vote["user"], vote["day"]] += WHOLE if vote["wrote"] else WHOLE // len(votes)
    keys = sorted(tally)
    columns = [[u for u, _ in keys], [d for _, d in keys], [tally[key] for key in keys], [parts[key] for key in keys]]
    return pa.table(columns, schema=USER_DAYS)


def user_totals(table: pa.Table, votes_per_day: int) -> pa.Table:
    """Of all rows of some users: what each one's votes weigh under the daily cap, and the days over it.

    Returns rows (user, votes, answers, days) where `days` is JSON `{day: factor}` of capped days only.
    """
    votes: dict[str, Counter[int]] = defaultdict(Counter)
    parts: dict[str, Counter[int]] = defaultdict(Counter)
    for user, day, cast, shared in zip(*(table[name].to_pylist() for name in USER_DAYS.names), strict=True):
        votes[user][day] += cast
        parts[user][day] += shared
    users = sorted(votes)
    capped = [{d: votes_per_day / n for d, n in sorted(votes[user].items()) if n > votes_per_day} for user in users]
    totals = {
        "votes": [float(sum(min(n, votes_per_day) for n in votes[user].values())) for user in users],
        "answers": [
            math.fsum(n * factors.get(d, 1.0) for d, n in parts[user].items()) / WHOLE
            for user, factors in zip(users, capped, strict=True)
        ],
    }
    columns = {name: pa.array(values, pa.float64()) for name, values in totals.items()}
    days = [to_json({str(d): factor for d, factor in factors.items()}) for factors in capped]
    return pa.table({"user": pa.array(users, pa.string()), **columns, "days": pa.array(days, pa.string())})


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


def exceptions(totals: Iterable[pa.Table], dataset_share: float) -> dict[str, dict[str, float]]:
    """Factors of the users over a cap: `{user: {day or "*": factor}}`. Small: most users are under."""
    tables = list(totals)
    limits: dict[str, float] = {}
    for name in MEASURES:
        weights = [weight for table in tables for weight in table[name].to_pylist()]
        limits[name] = most_votes(weights, math.fsum(weights), dataset_share)
    found: dict[str, dict[str, float]] = {}
    for table in tables:
        for row in table.to_pylist():
            factors: dict[str, float] = orjson.loads(row["days"])
            over = [limits[name] / row[name] for name in MEASURES if row[name] > limits[name]]
            if over:
                factors["*"] = min(over)
            if factors:
                found[row["user"]] = factors
    return found


def weigh(
    table: pa.Table,
    settings: WeighSettings,
    factors: Mapping[str, Mapping[str, float]],
    groups: Groups = NO_GROUPS,
) -> tuple[pa.Table, Dropped]:
    """Adds `votes` (JSON list of `Vote`) and `weight`, and gives corrections in `signals` their own `weight`; counts
    or drops coordinated bursts."""
    all_votes, weights, kept, said = [], [], [], []
    dropped: Dropped = Counter()
    for text in table["signals"].to_pylist():
        signals = orjson.loads(text) if text != NOTHING else []
        burst = len(signals) >= settings.burst_users and is_burst(signals, settings)
        votes = votes_of(signals, settings.day, groups)
        for vote in votes:
            own = factors.get(vote["user"], {})
            vote["weight"] = own.get(str(vote["day"]), 1.0) * own.get("*", 1.0)
        dropped["coordinated burst"] += burst and settings.drop_bursts
        kept.append(not (burst and settings.drop_bursts))
        all_votes.append(to_json(votes))
        weights.append(sum(vote["weight"] for vote in votes))
        said.append(to_json(_weighed(signals, votes, groups)) if any(vote["wrote"] for vote in votes) else text)
    table = with_column(table, "votes", all_votes, pa.string())
    table = with_column(table, "weight", weights, pa.float64())
    table = with_column(table, "signals", said, pa.string())
    return table.filter(pa.array(kept, pa.bool_())), +dropped


def votes_of(signals: list[dict[str, Any]], day: Day = "recorded", groups: Groups = NO_GROUPS) -> list[Vote]:
    """One vote a user or group: the mean of what they said, and the clamped sum of what they did."""
    by_user: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for signal in signals:
        by_user[groups.get(signal["user"], signal["user"])].append(signal)
    return [_vote(user, by_user[user], CLOCKS[day]) for user in sorted(by_user)]


def _vote(user: str, signals: list[dict[str, Any]], clock: str) -> Vote:
    explicit = [s["reward"] for s in signals if s["source"] != "implicit" and s["type"] != "follow_up"]
    implicit = [s["reward"] for s in signals if s["source"] == "implicit"]
    return {
        "user": user,
        "day": min(s[clock] for s in signals) // DAY_US,
        "weight": 1.0,
        "explicit": sum(explicit) / len(explicit) if explicit else None,
        "implicit": max(-1.0, min(1.0, sum(implicit))) if implicit else None,
        "wrote": len({s["text"] for s in signals if is_correction(s)}),
    }


def is_correction(signal: Mapping[str, Any]) -> bool:
    """Whether it brings a better answer."""
    return signal["type"] == "correction" and bool(signal.get("text"))


def _weighed(signals: list[dict[str, Any]], votes: list[Vote], groups: Groups) -> list[dict[str, Any]]:
    """The signals with the weight of each correction: its writer's vote, shared by all the texts they wrote."""
    cast = {vote["user"]: vote for vote in votes}
    seen: set[tuple[str, str]] = set()
    weighed = []
    for signal in signals:
        if is_correction(signal):
            vote = cast[groups.get(signal["user"], signal["user"])]
            again = (vote["user"], signal["text"]) in seen
            seen.add((vote["user"], signal["text"]))
            signal = signal | {"weight": 0.0 if again else round(vote["weight"] / vote["wrote"], 9)}
        weighed.append(signal)
    return weighed


def is_burst(signals: list[dict[str, Any]], settings: WeighSettings) -> bool:
    """True when many users vote on one answer within a short time."""
    times = sorted({s["user"]: s["at_us"] for s in signals if s["source"] != "implicit"}.values())
    users, window_us = settings.burst_users, settings.burst_window_s * SECOND_US
    return any(last - first <= window_us for first, last in zip(times, times[users - 1 :], strict=False))
