"""Nobody outvotes the rest: one loud user, and one user in twenty acting together."""

import random
from collections import defaultdict
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from cluster.clock import DAY_US
from cluster.settings.curation import CurationSettings
from data.score import score
from data.weigh import count_votes, exceptions, user_totals, weigh
from tests.data.rows import rows, signal

SETTINGS = CurationSettings()
HONEST = 100
ROWS = 600


def honest_votes(rng: random.Random) -> dict[int, list[dict[str, Any]]]:
    """Three honest votes on each row: rows below half are good, and everybody says so."""
    return {
        row: [
            signal("thumbs_up" if row < ROWS // 2 else "thumbs_down", 1.0 if row < ROWS // 2 else -1.0, user, row)
            for user in rng.sample([f"honest{n}" for n in range(HONEST)], 3)
        ]
        for row in range(ROWS)
    }


def scored(votes: dict[int, list[dict[str, Any]]]) -> pa.Table:
    """Rows with weights and scores, as the pipeline makes them."""
    table = rows(*({"interaction_id": f"i{row:04}", "signals": said} for row, said in sorted(votes.items())))
    totals = user_totals(count_votes(table), SETTINGS.weigh.votes_per_day)
    capped = exceptions([totals], pc.sum(totals["total"]).as_py(), SETTINGS.weigh.dataset_share)
    table, _ = weigh(table, SETTINGS.weigh, capped)
    return score(table, SETTINGS.score)[0]


def against(row: int, user: str, day: int) -> dict[str, Any]:
    """The vote that contradicts the honest ones."""
    reward = -1.0 if row < ROWS // 2 else 1.0
    return signal("thumbs_down" if reward < 0 else "thumbs_up", reward, user, row + day * DAY_US)


def weight_of(table: pa.Table) -> dict[str, float]:
    total: dict[str, float] = defaultdict(float)
    for text in table["votes"].to_pylist():
        for vote in orjson.loads(text):
            total[vote["user"]] += vote["weight"]
    return total


def labels(table: pa.Table) -> list[bool]:
    return [reward > 0 for reward in table["explicit"].to_pylist()]


@pytest.mark.parametrize("days", [1, 30])
def test_one_user_with_half_of_all_feedback_moves_no_label(days: int) -> None:
    rng = random.Random(days)
    votes = honest_votes(rng)
    clean = scored(votes)
    for row in range(ROWS):
        votes[row] += [against(row, "attacker", rng.randrange(days))] * 3  # saying it three times changes nothing
    attacked = scored(votes)
    cast = weight_of(attacked)
    assert cast["attacker"] / sum(cast.values()) <= SETTINGS.weigh.dataset_share + 1e-9
    assert labels(attacked) == labels(clean)
    shift = pc.sum(pc.abs(pc.subtract(attacked["explicit"], clean["explicit"]))).as_py() / ROWS
    assert shift <= 2 * SETTINGS.weigh.dataset_share * 1.01  # at the cap against unanimous votes, some cut a little too


def test_rows_that_only_the_attacker_judged_weigh_no_more_than_the_cap() -> None:
    votes = honest_votes(random.Random(1))
    extra = {ROWS + n: [signal("thumbs_up", 1.0, "attacker", n * DAY_US)] for n in range(2000)}
    table = scored(votes | extra)
    own = table.filter(pc.greater_equal(table["interaction_id"], f"i{ROWS:04}"))
    share = pc.sum(own["weight"]).as_py() / pc.sum(table["weight"]).as_py()
    assert share <= SETTINGS.weigh.dataset_share + 1e-9


def test_one_in_twenty_acting_together_moves_no_more_than_their_share() -> None:
    rng = random.Random(3)
    votes = honest_votes(rng)
    clean = scored(votes)
    colluders = [f"colluder{n}" for n in range(HONEST // 20)]
    for row in rng.sample(range(ROWS), ROWS // 4):
        votes[row] += [against(row, user, rng.randrange(30)) for user in rng.sample(colluders, 2)]
    attacked = scored(votes)
    assert labels(attacked) == labels(clean)  # two of them against three honest votes
    cast = weight_of(attacked)
    theirs = sum(cast[user] for user in colluders) / sum(cast.values())
    assert theirs <= len(colluders) * SETTINGS.weigh.dataset_share
