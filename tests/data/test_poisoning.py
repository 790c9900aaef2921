"""Nobody outvotes the rest: one loud user, and one user in twenty acting together."""

import random
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from cluster.clock import DAY_US
from cluster.settings.curation import CurationSettings
from data.examples import make_examples
from data.score import score
from data.stages import with_column
from data.voters import answers_voted_on, frequent, groups_of, pairs_of_voters, users_in
from data.weigh import count_votes, exceptions, user_totals, weigh
from tests.data.rows import rows, signal
from train.draw import drawn

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
    groups = voters_of(table)
    totals = user_totals(count_votes(table, SETTINGS.weigh, groups), SETTINGS.weigh.votes_per_day)
    capped = exceptions([totals], SETTINGS.weigh.dataset_share)
    table, _ = weigh(table, SETTINGS.weigh, capped, groups)
    return score(table, SETTINGS.score)[0]


def voters_of(table: pa.Table) -> dict[str, str]:
    """Users who vote together."""
    pairs = [frequent(pairs_of_voters(table, SETTINGS.weigh.together_voters), SETTINGS.weigh)]
    return groups_of(pairs, answers_voted_on(table, users_in(pairs)), SETTINGS.weigh)


def examples(table: pa.Table) -> pa.Table:
    """Examples of rows with different questions, of a user in train."""
    number = pa.array(range(len(table)), pa.uint64())
    for name, values in (("node", number), ("cluster", number), ("split", ["train"] * len(table))):
        table = with_column(table, name, values)
    table = with_column(table, "seen_in_test", [False] * len(table))
    table = with_column(table, "interaction_ids", [[i] for i in table["interaction_id"].to_pylist()])
    return make_examples(table, SETTINGS)[0]


def of_kind(table: pa.Table, kind: str) -> pa.Table:
    return table.filter(pc.equal(table["kind"], kind))


def share_of(table: pa.Table, chosen: Callable[[dict[str, Any]], bool]) -> float:
    """How much of what a training reads is of some rows."""
    read = drawn(table, seed=1).to_pylist()
    return sum(map(chosen, read)) / len(read)


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


@pytest.mark.parametrize("kind", ["unpaired", "reward"])
def test_training_reads_no_more_than_the_cap_of_rows_that_only_the_attacker_judged(kind: str) -> None:
    votes = honest_votes(random.Random(1))
    extra = {ROWS + n: [signal("thumbs_up", 1.0, "attacker", n * DAY_US)] for n in range(2000)}
    made = of_kind(examples(scored(votes | extra)), kind)
    assert len(made) == ROWS + 2000
    theirs = [row["weight"] for row in made.to_pylist() if row["interaction_ids"][0] >= f"i{ROWS:04}"]
    assert sum(theirs) / pc.sum(made["weight"]).as_py() <= SETTINGS.weigh.dataset_share + 1e-9
    drawn_share = share_of(made, lambda row: row["interaction_ids"][0] >= f"i{ROWS:04}")
    assert drawn_share <= SETTINGS.weigh.dataset_share + 0.02  # as far as chance goes: about 32 of 632 rows


def test_training_reads_no_more_than_the_cap_of_corrections_by_the_attacker() -> None:
    votes = honest_votes(random.Random(2))
    for row in range(ROWS):
        votes[row].append(signal("correction", -0.5, "attacker", row, text=f"What the attacker wants, {row}."))
    made = of_kind(examples(scored(votes)), "unpaired")
    theirs = [row["weight"] for row in made.to_pylist() if row["origin"] == "correction"]
    assert len(theirs) == ROWS
    assert sum(theirs) / pc.sum(made["weight"]).as_py() <= SETTINGS.weigh.dataset_share + 1e-9
    assert share_of(made, lambda row: row["origin"] == "correction") <= SETTINGS.weigh.dataset_share + 0.02


def test_all_of_one_in_twenty_on_the_same_rows_move_no_label() -> None:
    rng = random.Random(4)
    votes = honest_votes(rng)
    clean = scored(votes)
    colluders = [f"colluder{n}" for n in range(HONEST // 20)]
    for row in rng.sample(range(ROWS), ROWS // 4):
        votes[row] += [against(row, user, rng.randrange(30)) for user in colluders]  # five against three
    attacked = scored(votes)
    assert labels(attacked) == labels(clean)
    cast = weight_of(attacked)
    assert not cast.keys() & set(colluders[1:])  # the first gives the group its name
    assert cast[colluders[0]] / sum(cast.values()) <= SETTINGS.weigh.dataset_share + 1e-9


def test_colluders_are_found_behind_other_votes_and_changing_casts() -> None:
    rng = random.Random(5)
    votes = honest_votes(rng)
    colluders = [f"colluder{n}" for n in range(HONEST // 20)]
    for row in rng.sample(range(ROWS), ROWS // 4):
        votes[row] += [against(row, user, 0) for user in rng.sample(colluders, 4)]
    for user in colluders:
        for row in rng.sample(range(ROWS), 40):
            votes[row].append(signal("thumbs_up", 1.0 if row < ROWS // 2 else -1.0, user, row))
    found = voters_of(rows(*({"interaction_id": f"i{row:04}", "signals": said} for row, said in votes.items())))
    assert found == dict.fromkeys(colluders, colluders[0])  # and nobody honest


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
