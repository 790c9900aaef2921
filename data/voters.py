"""Users who vote together: accounts that keep judging the same answers count as one voter.

Whoever wants to move a row's label needs several accounts on it. Honest users seldom meet on an answer, for each
judges their own; two who share most of what they judge are treated as one, whatever they said. Accounts that meet
on fewer than `curation.weigh.together_answers` answers are not told apart from chance.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Set
from itertools import combinations

import orjson
import pyarrow as pa

from cluster.settings.curation import WeighSettings

PAIRS = pa.schema([("first", pa.string()), ("second", pa.string()), ("answers", pa.int64())])
"""Two users, the first before the second in the alphabet, and on how many answers both voted."""
USER = '"user":'


def pairs_of_voters(table: pa.Table, most: int) -> pa.Table:
    """Rows of `PAIRS` of one block; of an answer with more than `most` voters, so many are drawn by a hash."""
    tally: Counter[tuple[str, str]] = Counter()
    for text in table["signals"].to_pylist():
        if text.count(USER) < 2:
            continue
        voters = sorted({signal["user"] for signal in orjson.loads(text)}, key=_hashed)[:most]
        tally.update(combinations(sorted(voters), 2))
    return _as_table(tally)


def frequent(table: pa.Table, settings: WeighSettings) -> pa.Table:
    """The pairs that met often enough. Needs all rows of a `first`."""
    tally: Counter[tuple[str, str]] = Counter()
    for first, second, answers in zip(*(table[name].to_pylist() for name in PAIRS.names), strict=True):
        tally[first, second] += answers
    return _as_table(Counter({pair: n for pair, n in tally.items() if n >= settings.together_answers}))


def answers_voted_on(table: pa.Table, users: Set[str]) -> Counter[str]:
    """On how many answers of one block each of these users voted."""
    found: Counter[str] = Counter()
    for text in table["signals"].to_pylist():
        if USER in text:
            found.update(users & {signal["user"] for signal in orjson.loads(text)})
    return found


def groups_of(pairs: Iterable[pa.Table], voted: Mapping[str, int], settings: WeighSettings) -> dict[str, str]:
    """User -> name of their group, its first member; users who vote alone are left out."""
    leader: dict[str, str] = {}

    def lead(user: str) -> str:
        while (above := leader.get(user, user)) != user:
            user = above
        return user

    for table in pairs:
        for first, second, both in zip(*(table[name].to_pylist() for name in PAIRS.names), strict=True):
            if both >= settings.together_overlap * (voted[first] + voted[second] - both):
                low, high = sorted((lead(first), lead(second)))
                leader[high] = low
                leader.setdefault(low, low)
    return {user: lead(user) for user in leader}


def users_in(pairs: Iterable[pa.Table]) -> frozenset[str]:
    """Everybody who is in a pair."""
    return frozenset(user for table in pairs for name in ("first", "second") for user in table[name].to_pylist())


def _as_table(tally: Counter[tuple[str, str]]) -> pa.Table:
    pairs = sorted(tally)
    columns = [[a for a, _ in pairs], [b for _, b in pairs], [tally[pair] for pair in pairs]]
    return pa.table(columns, schema=PAIRS)


def _hashed(user: str) -> bytes:
    return hashlib.sha256(user.encode()).digest()
