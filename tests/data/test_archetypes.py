from pathlib import Path

import pytest
from sqlalchemy.engine import Engine

from cluster.errors import DatasetError, InputError
from cluster.settings import load_settings
from cluster.settings.curation import ArchetypeSettings
from data.archetypes import (
    Profile,
    archetype_of,
    cluster_agents,
    load_rules,
    profiles,
    report,
    save_rules,
    transfers,
)
from data.log import EventLog
from tests.data.traffic import feedback, interaction

SETTINGS = load_settings(curation={"archetypes": {"min_interactions": 10, "number": 2}})[0]
WORDS = {"parcels": "courier parcel delivery", "post": "parcel courier street", "bakery": "dough oven bread"}


def fill(log: EventLog) -> None:
    number = 0
    for agent, words in WORDS.items():
        for n in range(30):
            good = agent != "post" or n % 5 == 0
            log.append(
                [
                    interaction(number, f"{words} case {n}", "a b c", user=f"u{n}", agent=agent),
                    feedback(number, "thumbs_up" if good else "thumbs_down", 1.0 if good else -1.0, user=f"u{n}"),
                ]
            )
            number += 1
    log.append([interaction(number, "rare", "a", user="x", agent="unknown")])


def test_alike_agents_share_an_archetype_and_the_worse_one_is_offered_a_transfer(
    database: Engine, tmp_path: Path
) -> None:
    log = EventLog(database)
    fill(log)
    found = profiles(log, SETTINGS)
    assert [p.agent for p in found] == ["bakery", "parcels", "post"]
    assert [(p.interactions, p.judged, p.good) for p in found] == [(30, 30, 30), (30, 30, 30), (30, 30, 6)]
    rules = cluster_agents(found, SETTINGS.curation.archetypes)
    assert [rule.agents for rule in rules] == [("bakery",), ("parcels", "post")]
    save_rules(rules, tmp_path / "rules.yaml")
    assert load_rules(tmp_path / "rules.yaml") == rules
    text = report(found, rules)
    assert "`post` could start from the examples of `parcels`" in text and text.count("could start") == 1


def test_a_new_agent_goes_to_the_nearest_centroid_unless_pinned(database: Engine, tmp_path: Path) -> None:
    log = EventLog(database)
    fill(log)
    rules = cluster_agents(profiles(log, SETTINGS), SETTINGS.curation.archetypes)
    baker = Profile("cakes", 10)
    baker.terms.update(["oven", "bread", "cake"])
    assert archetype_of(baker, rules) == rules[0].name
    save_rules(rules, tmp_path / "rules.yaml")
    edited = (tmp_path / "rules.yaml").read_text().replace("- post\n", "- post\n  - cakes\n")
    (tmp_path / "rules.yaml").write_text(edited)
    assert archetype_of(baker, load_rules(tmp_path / "rules.yaml")) == rules[1].name


def test_the_interval_is_wilsons() -> None:
    low, high = Profile("a", judged=10, good=8).interval  # Wilson 1927: 8 of 10
    assert (low, high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert Profile("b").interval == (0, 1) and transfers([Profile("a", judged=10, good=8), Profile("b")]) == []


def test_too_few_agents_and_bad_rules_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="1 agents have enough"):
        cluster_agents([Profile("a", 30)], ArchetypeSettings())
    with pytest.raises(InputError, match="cannot be read"):
        load_rules(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("archetypes: [{name: x}]")
    with pytest.raises(InputError, match="must list archetypes"):
        load_rules(tmp_path / "bad.yaml")
