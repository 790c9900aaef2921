from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
from sqlalchemy.engine import Engine

from cluster.clock import DAY_US
from cluster.settings import load_settings
from cluster.tables import training_jobs
from data.answers import EXAMPLES
from data.eligibility import count_good, eligibility
from data.log import EventLog
from data.manifest import Manifest, Shard, write_shards
from data.stages import StageCount
from tests.data.traffic import START_US, feedback, interaction

NOW = START_US + DAY_US
SETTINGS, _ = load_settings(
    curation={"eligibility": {"positive_feedbacks": 3, "good_interactions": 2, "pairs_for_dpo": 5}}
)
DATASET = Manifest(
    "d", "h", 1, "", "default", "default", "triage", {}, None, {}, [], [],
    {"sft": {"train": 2}, "preference": {"train": 4}}, [],
)  # fmt: skip


def with_answers(folder: Path, *rows: dict[str, Any]) -> Manifest:
    """The dataset with these examples to imitate."""
    base = {"kind": "sft", "split": "train", "origin": "answer", "synthetic": False, "agent": "triage", "score": 0.9}
    examples = [base | {"example_id": str(n), "interaction_ids": [f"i{n}"]} | row for n, row in enumerate(rows)]
    table = pa.Table.from_pylist(examples, EXAMPLES).append_column("shard", [["sft/train/00000"] * len(rows)])
    shards = [Shard(**row) for row in write_shards(table, folder).to_pylist()]
    return replace(DATASET, shards=shards, path=str(folder))


def test_only_answers_that_the_agent_gave_and_people_found_good_count(tmp_path: Path) -> None:
    lesser = ({"score": 0.6}, {"origin": "correction"}, {"synthetic": True})
    made = with_answers(tmp_path, {"interaction_ids": ["i1", "i2"]}, {"agent": "other"}, *lesser)
    assert count_good(made, (), 0.7) == 3
    assert count_good(made, ["triage"], 0.7) == 2


def test_other_workspaces_do_not_count_and_trajectories_do(database: Engine) -> None:
    run = replace(interaction(1, "q", "a", user="ada"), kind="trajectory", event_id="run-1", interaction_id=None)
    said = [replace(feedback(n, "thumbs_up", 1.0, user="ada"), interaction_id="run-1") for n in (1, 2)]
    EventLog(database).append([run, said[0], replace(said[1], workspace="lab")])
    with database.begin() as connection:
        connection.execute(
            training_jobs.insert().values(
                job_id="j", tenant="default", workspace="lab", agent="triage", kind="sft", config={},
                state="completed", retries=0, created_at_us=0, finished_at_us=NOW,
            )
        )  # fmt: skip
    rules = {rule.name: rule for rule in eligibility(SETTINGS, database, DATASET, method="sft", now=NOW)}
    assert rules["positive feedback"].found == 1 and rules["rest"].passed


def test_each_rule_says_by_how_much_it_fails(database: Engine, tmp_path: Path) -> None:
    log = EventLog(database)
    log.append([interaction(n, "q", "a", user="ada", agent="triage" if n < 3 else "other") for n in range(5)])
    log.append([feedback(n, "thumbs_up" if n else "thumbs_down", 1.0 if n else -1.0, user="ada") for n in range(5)])
    enough = with_answers(tmp_path, {}, {})
    rules = {rule.name: rule for rule in eligibility(SETTINGS, database, enough, method="dpo", now=NOW)}
    assert str(rules["positive feedback"]) == "positive feedback: 2 in 30 days, needs 3: 1 short"
    assert str(rules["pairs"]) == "pairs: 4 preference pairs, needs 5: 1 short"
    assert rules["good interactions"].passed and rules["rest"].passed
    assert "pairs" not in {r.name for r in eligibility(SETTINGS, database, DATASET, method="sft", now=NOW)}


def test_an_archetype_is_judged_together_and_the_whole_model_needs_traffic(database: Engine) -> None:
    log = EventLog(database)
    log.append([interaction(n, "q", "a", user="ada", agent=f"agent{n % 3}") for n in range(9)])
    log.append([feedback(n, "thumbs_up", 1.0, user="ada") for n in range(9)])
    everything = replace(DATASET, agent=None, stages=[StageCount("filter", 2000, 400, {})])
    two = eligibility(SETTINGS, database, everything, method="sft", agents=["agent0", "agent1"], now=NOW)
    assert two[0].found == 6 and "interactions" not in {rule.name for rule in two}
    whole = {rule.name: rule for rule in eligibility(SETTINGS, database, everything, method="sft", now=NOW)}
    assert str(whole["interactions"]) == "interactions: 400 usable interactions, needs 1000: 600 short"


def test_old_feedback_does_not_count_and_any_agent_does_without_one(database: Engine) -> None:
    EventLog(database).append([feedback(n, "thumbs_up", 1.0, user="ada") for n in range(4)])
    everything = replace(DATASET, agent=None)
    now = eligibility(SETTINGS, database, everything, method="sft", now=NOW)[0]
    later = eligibility(SETTINGS, database, everything, method="sft", now=NOW + 31 * DAY_US)[0]
    assert (now.found, later.found) == (4, 0)


def test_a_training_three_days_ago_needs_four_more(database: Engine) -> None:
    with database.begin() as connection:
        connection.execute(
            training_jobs.insert().values(
                job_id="j", tenant="default", workspace="default", agent="triage", kind="sft", config={},
                state="completed", retries=0, created_at_us=0, finished_at_us=NOW - 3 * DAY_US,
            )
        )  # fmt: skip
    rest = {r.name: r for r in eligibility(SETTINGS, database, DATASET, method="sft", now=NOW)}["rest"]
    assert str(rest) == "rest: 3 days since the last training, needs 7: 4 short"
