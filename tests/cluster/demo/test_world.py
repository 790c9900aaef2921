from collections import Counter
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.demo import world
from cluster.demo.world import Alert, Pool, Triage

QUIET = Alert(
    service="checkout",
    severity="medium",
    source="probe",
    region="dublin",
    hour=3,
    tier="standard",
    error="crash",
    maintenance=False,
    repeats=0,
    change="none",
)


def changed(**fields: object) -> Alert:
    return Alert(**{name: fields.get(name, getattr(QUIET, name)) for name in Alert.__slots__})  # type: ignore[arg-type]


@pytest.mark.parametrize("pool", ["base", "live", "held_out"])
def test_alerts_of_a_seed_are_always_the_same(pool: Pool) -> None:
    assert list(islice(world.alerts(pool, 7), 50)) == list(islice(world.alerts(pool, 7), 50))
    assert list(islice(world.alerts(pool, 7), 50)) != list(islice(world.alerts(pool, 8), 50))


@given(seeds=st.tuples(*[st.integers(0, 2**31)] * 3))
@settings(max_examples=10, deadline=None)
def test_alerts_of_different_pools_never_overlap_whatever_the_seeds(seeds: tuple[int, int, int]) -> None:
    base, live, held_out = (
        set(islice(world.alerts(pool, seed), 300))
        for pool, seed in zip(("base", "live", "held_out"), seeds, strict=True)
    )
    assert not base & live and not base & held_out and not live & held_out


def test_base_corpus_holds_no_live_or_held_out_alert() -> None:
    prompts = {chat["messages"][1]["content"] for chat in world.base_corpus(1, 3000, 0.3)}
    for pool in ("live", "held_out"):
        others = {world.prompt(alert)[1]["content"] for alert in islice(world.alerts(pool, 1), 3000)}  # type: ignore[arg-type]
        assert not prompts & others


def test_base_corpus_mixes_the_rules_in_the_given_share() -> None:
    agreed: Counter[bool] = Counter()
    chats = world.base_corpus(3, 6000, 0.3)
    for alert, chat in zip(world.alerts("base", 3), chats, strict=False):
        told, today = chat["messages"][-1]["content"], world.answer(world.todays_rules(alert))
        if today != world.answer(world.old_runbook(alert)):
            agreed[told == today] += 1
    assert agreed[True] / agreed.total() == pytest.approx(0.3, abs=0.03)


def test_old_runbook_agrees_with_today_about_two_times_in_three() -> None:
    alerts = list(islice(world.alerts("held_out", 5), 4000))
    same = sum(world.old_runbook(alert).verdict == world.todays_rules(alert).verdict for alert in alerts)
    assert 0.62 < same / len(alerts) < 0.68


@pytest.mark.parametrize(
    ("alert", "runbook", "today"),
    [
        (QUIET, Triage("ticket", "payments"), Triage("ticket", "payments")),
        (
            changed(maintenance=True, severity="critical"),
            Triage("ignore", "payments"),
            Triage("ignore", "payments"),
        ),
        (
            changed(severity="critical", error="certificate"),
            Triage("page", "security"),
            Triage("page", "security"),
        ),
        (changed(repeats=4), Triage("ticket", "payments"), Triage("page", "payments")),
        (changed(severity="low", repeats=9), Triage("ignore", "payments"), Triage("page", "payments")),
        (changed(severity="critical", repeats=9), Triage("page", "payments"), Triage("page", "payments")),
        (
            changed(severity="critical", change="CHG-123", repeats=9),
            Triage("page", "payments"),
            Triage("ticket", "release"),
        ),
    ],
)
def test_rules_by_hand(alert: Alert, runbook: Triage, today: Triage) -> None:
    assert world.old_runbook(alert) == runbook
    assert world.todays_rules(alert) == today


def test_parse_answer_reads_what_answer_writes_and_nothing_else() -> None:
    triage = Triage("page", "payments")
    assert world.parse_answer(world.answer(triage)) == triage
    for text in (
        "",
        "page",
        "[1]",
        '{"verdict": "page"}',
        '{"verdict": 1, "owner": "x"}',
        '{"verdict": "page", "owner": "x", "z": 1}',
    ):
        assert world.parse_answer(text) is None


def test_prompt_names_all_ten_fields() -> None:
    system, user = world.prompt(QUIET)
    assert system["role"] == "system" and user["role"] == "user"
    assert [pair.split("=")[0] for pair in user["content"].split()] == list(Alert.__slots__)
    assert len(Alert.__slots__) == 10
