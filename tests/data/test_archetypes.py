from pathlib import Path

import pytest
from sqlalchemy.engine import Engine

from cluster.clock import from_iso
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
from data.archetypes_monthly import look_at_month
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


def test_a_term_that_too_few_users_know_describes_nobody(database: Engine) -> None:
    log = EventLog(database)
    fill(log)
    log.append([interaction(900 + n, "canary parcel", "a", user=f"u{n % 2}", agent="parcels") for n in range(12)])
    parcels = next(p for p in profiles(log, SETTINGS) if p.agent == "parcels")
    assert "parcel" in parcels.terms and "canary" not in parcels.terms
    log.append([interaction(990, "canary parcel", "a", user="u2", agent="parcels")])
    assert next(p for p in profiles(log, SETTINGS) if p.agent == "parcels").terms["canary"] == 13


def test_a_month_has_one_report_rules_stay_as_edited_and_old_reports_leave(database: Engine, tmp_path: Path) -> None:
    settings = load_settings(
        home=tmp_path, curation={"archetypes": {"min_interactions": 10, "number": 2, "reports_kept": 2}}
    )[0]
    months = [from_iso(f"2026-{month:02d}-01T04:00:00") for month in (10, 11, 12)]
    early = look_at_month(database, settings, months[0])
    assert (early.report, early.agents) == (None, 0) and not settings.archetypes_root.exists()
    fill(EventLog(database))
    first = look_at_month(database, settings, months[0])
    assert (first.agents, first.archetypes, first.transfers) == (3, 2, 1)
    assert "`post` could start from" in (settings.archetypes_root / "2026-10.md").read_text()
    edited = first.rules.read_text().replace(load_rules(first.rules)[1].name, "deliveries")
    first.rules.write_text(edited)
    for at_us in (months[1], months[2], months[2] + 1):
        last = look_at_month(database, settings, at_us)
    assert (
        first.rules.read_text() == edited and "## deliveries" in (settings.archetypes_root / "2026-12.md").read_text()
    )
    assert last.as_dict()["report"] == str(settings.archetypes_root / "2026-12.md")
    assert sorted(f.name for f in settings.archetypes_root.iterdir()) == ["2026-11.md", "2026-12.md", "rules.yaml"]
