import itertools
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from cluster.settings import Settings, load_settings
from cluster.settings.experiments import METRIC_NAMES
from cluster.tables import arm_statistics, experiment_users
from data.events import ROUTER, Event, interaction_event_id, parse_body
from data.log import EventLog
from serve.assignment import Assignment, alone, in_control_slice
from serve.experiments import readings
from serve.experiments.metrics import METRICS, is_rejected
from serve.experiments.projection import Projection
from serve.experiments.readings import read_as_served, read_evidence, read_latency, read_moments, segments_of
from serve.experiments.timeline import draw, read_timeline
from tests.serve.rollout_world import TENANT, Population, feedback, fixed_split, interaction

Key = tuple[str, str, str, str]


def settings_with(**experiment: Any) -> Settings:
    return load_settings(experiment={"breach_min_users_per_arm": 2} | experiment)[0]


def statistics(database: Engine) -> dict[Key, tuple[float, float]]:
    with database.connect() as connection:
        rows = connection.execute(sa.select(arm_statistics)).mappings().all()
    return {
        (metric, r["period"], r["arm"], r["user_id"]): (count, total)
        for r in rows
        for metric, (count, total, *_) in orjson.loads(r["sums"]).items()
    }


def users(database: Engine) -> dict[str, Any]:
    with database.connect() as connection:
        return {row["user_id"]: row for row in connection.execute(sa.select(experiment_users)).mappings()}


CANDIDATE = Assignment("candidate", 0.1, 0.25, "user")
CONTROL = Assignment("stable", 0.9, 0.75, "user")
BETWEEN = Assignment("stable", 0.5, 0.75, "user")


def test_both_sides_are_counted_per_user_and_the_middle_only_for_the_split(database: Engine) -> None:
    EventLog(database).append(
        [
            interaction("a", CANDIDATE, user="ann"),
            interaction("b", CONTROL, user="bob", flags={"fallback": True}),
            interaction("c", BETWEEN, user="cy"),
            interaction("d", None, user="dee"),
            feedback("a", "rating", 0.5, value=4),
            feedback("a", "thumbs_up", 1.0),
            feedback("b", "copy_response", 0.4, source="implicit"),
            feedback("c", "thumbs_up", 1.0),
        ]
    )
    assert Projection(database, settings_with()).catch_up() == 8
    found = statistics(database)
    assert found["satisfaction", "ramp", "candidate", "ann"] == (2, 1.5)
    assert found["rating", "ramp", "candidate", "ann"] == (1, 4)
    assert found["feedback_response_rate", "ramp", "candidate", "ann"] == (1, 1)
    assert found["feedback_response_rate", "ramp", "control", "bob"] == (1, 0)
    assert found["error_rate", "ramp", "control", "bob"] == (1, 1)
    assert not [key for key in found if key[3] in ("cy", "dee")]
    assert {user: row["arm"] for user, row in users(database).items()} == {
        "ann": "candidate",
        "bob": "stable",
        "cy": "stable",
    }


def test_a_fallback_answer_is_an_error_of_the_candidate_and_its_feedback_counts_there(
    database: Engine,
) -> None:
    EventLog(database).append(
        [interaction("a", CANDIDATE, user="ann", flags={"fallback": True}), feedback("a", "thumbs_up", 1.0)]
    )
    Projection(database, settings_with()).catch_up()
    found = statistics(database)
    assert found["error_rate", "ramp", "candidate", "ann"] == (1, 1)
    assert found["satisfaction", "ramp", "candidate", "ann"] == (1, 1)


def test_feedback_before_its_interaction_and_long_after_counts_once_for_the_assigned_arm(
    database: Engine,
) -> None:
    log, projection = EventLog(database), Projection(database, settings_with())
    log.append([feedback("a", "thumbs_down", -1.0)])
    projection.catch_up()
    assert statistics(database) == {}
    log.append([interaction("a", CANDIDATE, user="ann")])
    projection.catch_up()
    log.append([feedback("a", "thumbs_up", 1.0)])
    projection.catch_up()
    projection.catch_up()
    found = statistics(database)
    assert found["satisfaction", "ramp", "candidate", "ann"] == (2, 0)
    assert found["feedback_response_rate", "ramp", "candidate", "ann"] == (1, 1)


def test_catching_up_ends_under_steady_traffic(sqlite_database: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    log, projection = EventLog(sqlite_database), Projection(sqlite_database, settings_with(projection_page=2))
    log.append([interaction(f"i{n}", CANDIDATE, user="ann") for n in range(6)])
    step, numbers = projection.step, itertools.count()

    def busy() -> int:
        """Whoever asks meanwhile asks as fast as anybody counts."""
        log.append([interaction(f"j{next(numbers)}", CANDIDATE, user="ann") for _ in range(2)])
        return step()

    monkeypatch.setattr(projection, "step", busy)
    assert projection.catch_up() == 6
    assert projection.catch_up(lambda: False) == 2


def test_a_client_cannot_put_its_word_before_the_routers(database: Engine) -> None:
    log, projection = EventLog(database), Projection(database, settings_with())
    served = replace(interaction("a", CANDIDATE, user="ann"), event_id=interaction_event_id("a", ROUTER))
    claimed = replace(interaction("a", None, user="mallory"), event_id=interaction_event_id("a"))
    log.append([claimed])
    projection.catch_up()
    assert [verdict.status for verdict in log.append([served])] == ["accepted"]
    assert [verdict.status for verdict in log.append([replace(claimed, event_id="again")])] == ["duplicate"]
    log.append([feedback("a", "thumbs_up", 1.0)])
    projection.catch_up()
    assert statistics(database)["satisfaction", "ramp", "candidate", "ann"] == (1, 1)


def test_above_one_half_a_period_of_its_own_begins(database: Engine) -> None:
    late = [Assignment("candidate", 0.9, 0.95, "user"), Assignment("stable", 0.97, 1 - 0.95, "user")]
    EventLog(database).append([interaction(f"i{n}", made, user=f"u{n}") for n, made in enumerate([CONTROL, *late])])
    Projection(database, settings_with()).catch_up()
    periods = {(key[1], key[2], key[3]) for key in statistics(database) if key[0] == "error_rate"}
    assert periods == {("ramp", "control", "u0"), ("0.95", "candidate", "u1"), ("0.95", "control", "u2")}


@pytest.mark.parametrize(
    "moved",
    [
        [Assignment("stable", 0.1, 0.75, "user")],  # by hand: the bucket says candidate
        [CANDIDATE, Assignment("stable", 0.1, 0.9, "user")],  # back to stable within one experiment
    ],
)
def test_a_user_moved_by_hand_counts_for_nobody(database: Engine, moved: list[Assignment]) -> None:
    EventLog(database).append([interaction(f"m{n}", made, user="mo") for n, made in enumerate(moved)])
    EventLog(database).append(
        [
            interaction("a", CANDIDATE, user="ann"),
            interaction("b", CONTROL, user="bob"),
        ]
    )
    Projection(database, settings_with()).catch_up()
    evidence = read_evidence(database, "exp", settings_with().experiment, period="ramp")
    assert evidence.exposed == {"candidate": 1, "control": 1}


def test_pinned_shadow_and_unassigned_requests_count_for_nobody(database: Engine) -> None:
    pinned = Assignment("stable", 0.9, 1.0, "user")
    EventLog(database).append(
        [
            interaction("a", pinned, user="ann"),
            interaction("b", CANDIDATE, user="bob", flags={"shadow": True}),
        ]
    )
    Projection(database, settings_with()).catch_up()
    assert (statistics(database), users(database)) == ({}, {})


def test_a_user_whom_a_pin_kept_from_the_candidate_counts_for_nobody_afterwards(database: Engine) -> None:
    """As the router records it: the arm `none`, with the bucket and the experiment of the candidate."""
    pinned = interaction("b", None, user="ann", arm="none", bucket=0.1)
    pinned.body["experiment_id"] = "exp"
    EventLog(database).append([interaction("a", CANDIDATE, user="ann"), interaction("c", CANDIDATE, user="bob")])
    EventLog(database).append([pinned, interaction("d", CANDIDATE, user="ann"), interaction("e", CONTROL, user="cy")])
    Projection(database, settings_with()).catch_up()
    evidence = read_evidence(database, "exp", settings_with().experiment, period="ramp")
    assert evidence.exposed == {"candidate": 1, "control": 1}
    assert evidence.split.users == {"candidate": 2, "stable": 1}


def test_sessions_stand_in_for_users(database: Engine) -> None:
    EventLog(database).append([interaction("a", CANDIDATE, user=None, session="s1")])
    Projection(database, settings_with()).catch_up()
    assert list(users(database)) == ["session:s1"]


def test_requests_that_were_rejected_say_nothing_of_the_arm(sqlite_database: Engine) -> None:
    events = [
        interaction(f"i{n}", CANDIDATE, user="ann", flags={"rejected": "invalid_value"}, latency_s=99.0)
        for n in range(6)
    ]
    events += [interaction("good", CANDIDATE, user="ann"), feedback("i0", "thumbs_down", -1.0)]
    EventLog(sqlite_database).append(events)
    Projection(sqlite_database, settings_with()).catch_up()
    found = statistics(sqlite_database)
    assert found["error_rate", "ramp", "candidate", "ann"] == (1, 0)
    assert found["latency_over_slo", "ramp", "candidate", "ann"] == (1, 0)
    assert ("satisfaction", "ramp", "candidate", "ann") not in found
    evidence = read_evidence(sqlite_database, "exp", settings_with().experiment, period="ramp")
    assert (evidence.first_requests, evidence.first_errors) == (1, 0)


def test_a_rejected_request_that_the_candidate_failed_on_first_is_its_error() -> None:
    assert is_rejected({"flags": {"rejected": "invalid_value"}})
    assert not is_rejected({"flags": {"rejected": "invalid_value", "fallback": True}})


def test_first_requests_stop_counting_at_the_limit(database: Engine) -> None:
    settings = load_settings(rollout={"first_requests": 5})[0]
    log, projection = EventLog(database), Projection(database, settings)
    for batch in range(2):
        flags = {"error": "boom"} if batch == 0 else {}
        log.append([interaction(f"{batch}-{n}", CANDIDATE, user="ann", flags=flags) for n in range(4)])
        projection.catch_up()
    evidence = read_evidence(database, "exp", settings.experiment, period="ramp")
    assert (evidence.first_requests, evidence.first_errors) == (5, 4)


def test_what_was_bet_on_is_never_changed_by_what_comes_later(database: Engine) -> None:
    """A user's first value stays, wherever the user stands and whatever the user says afterwards."""
    log = EventLog(database)
    log.append([interaction(f"{user}{n}", CANDIDATE, user=user) for user in ("ann", "bob", "cy") for n in range(2)])
    said = [("bob0", 1.0), ("ann0", -1.0), ("bob1", -1.0), ("cy1", 0.5), ("ann1", 1.0)]
    bets = []
    for page in (1, 1000):
        projection = Projection(database, settings_with(projection_page=page))
        for name, reward in said if page == 1 else ():
            log.append([feedback(name, "correction", reward)])
            projection.catch_up()
            with database.connect() as connection:
                bets.append(readings._user_values(connection, "exp", "ramp", "satisfaction").candidate)
        projection.rebuild()
        with database.connect() as connection:
            bets.append(readings._user_values(connection, "exp", "ramp", "satisfaction").candidate)
    assert bets == [(1.0,), (1.0, -1.0), (1.0, -1.0), (1.0, -1.0, 0.5), *[(1.0, -1.0, 0.5)] * 3]
    assert read_moments(database, "exp", period="ramp")["satisfaction"]["candidate"].sum_m == 0.5


def test_grades_and_outcomes_become_metrics(database: Engine) -> None:
    def about(kind: str, body: dict[str, Any]) -> Event:
        return Event(kind, TENANT, "main", parse_body(kind, body), interaction_id="a")

    EventLog(database).append(
        [
            interaction("a", CANDIDATE, user="ann"),
            about("grade", {"grader": "rubric", "grader_version": "1", "reward": 0.75}),
            about("grade", {"grader": "rubric", "grader_version": "1"}),
            about("outcome", {"name": "closed", "value": 1}),
        ]
    )
    Projection(database, settings_with()).catch_up()
    found = statistics(database)
    assert found["grader_score", "ramp", "candidate", "ann"] == (1, 0.75)
    assert found["outcome:closed", "ramp", "candidate", "ann"] == (1, 1)


def test_a_grade_of_a_clients_report_is_none_of_the_arms(database: Engine) -> None:
    routed = interaction("a", CANDIDATE, user="ann")
    routed = replace(routed, event_id=interaction_event_id("a", ROUTER))

    def grade(reward: float, judged: str) -> Event:
        body = parse_body("grade", {"grader": "rubric", "grader_version": "1", "reward": reward, "judged": judged})
        return Event("grade", TENANT, "main", body, interaction_id="a")

    EventLog(database).append([grade(1.0, "the client's"), routed, grade(0.25, routed.event_id)])
    Projection(database, settings_with()).catch_up()
    assert statistics(database)["grader_score", "ramp", "candidate", "ann"] == (1, 0.25)


def test_any_page_size_and_a_rebuild_give_the_same_tables(database: Engine) -> None:
    log, population = EventLog(database), Population(users=40, seed=3)
    for round_ in range(4):
        share = (0.1, 0.25, 0.5, 0.95)[round_]
        population.ask(log, fixed_split(share, "salt"), range(40), (round_ + 1) * 1_000_000)
    late = [r.event.interaction_id for r in log.scan(kinds=["interaction"])]
    random.Random(1).shuffle(late)
    log.append([feedback(str(i), "rating", 0.5, value=4) for i in late[:30]])
    projection = Projection(database, settings_with(projection_page=7))
    projection.catch_up()
    by_sevens = (statistics(database), users(database))
    assert Projection(database, settings_with(projection_page=1000)).rebuild() == log.last_seq()
    assert (statistics(database), users(database)) == by_sevens
    projection.catch_up()
    assert (statistics(database), users(database)) == by_sevens
    assert any(key[1] == "0.95" for key in by_sevens[0])


def test_only_the_control_slice_is_compared(sqlite_database: Engine) -> None:
    log, population = EventLog(sqlite_database), Population(users=200)
    population.ask(log, fixed_split(0.25, "salt"), range(200), 1_000_000)
    Projection(sqlite_database, settings_with()).catch_up()
    everybody = users(sqlite_database)
    expected = [u for u, row in everybody.items() if in_control_slice(alone(0.25), 0, row["bucket"])]
    found = {key[3] for key in statistics(sqlite_database) if key[2] == "control"}
    assert found == set(expected) and len(everybody) == 200


def test_evidence_survives_json(sqlite_database: Engine) -> None:
    from serve.experiments.evidence import Evidence

    population = Population(users=60)
    population.ask(EventLog(sqlite_database), fixed_split(0.5, "salt"), range(60), 1_000_000)
    Projection(sqlite_database, settings_with()).catch_up()
    evidence = read_evidence(sqlite_database, "exp", settings_with().experiment, period="ramp")
    assert Evidence.from_json(evidence.as_json()) == evidence
    assert evidence.primary.problem is None and evidence.split.p_value > 0.01


def test_sums_over_users_follow_the_users_exactly(database: Engine) -> None:
    """Moments kept page by page equal those taken over all per-user rows at once, people moved by hand left out."""
    log, population = EventLog(database), Population(users=60, seed=4)
    for round_, share in enumerate((0.1, 0.25, 0.5, 0.25)):  # the last sends some users back: they leave
        population.ask(log, fixed_split(share, "salt"), range(60), (round_ + 1) * 1_000_000)
    Projection(database, settings_with(projection_page=13)).catch_up()
    left = {user for user, row in users(database).items() if row["excluded"]}
    assert left
    expected: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for (metric, period, arm, user), sums in statistics(database).items():
        if period == "ramp" and user and user not in left:
            expected.setdefault((metric, arm), []).append(sums)
    found = read_moments(database, "exp", period="ramp")
    assert {(m, a) for m, arms in found.items() for a in arms} == set(expected)
    for (metric, arm), rows in expected.items():
        moments = found[metric][arm]
        assert moments.users == len(rows)
        by_hand = [sum(n for n, _ in rows), sum(y for _, y in rows), sum(n * y for n, y in rows)]
        assert [moments.sum_n, moments.sum_y, moments.sum_ny] == pytest.approx(by_hand, rel=1e-12)
        assert moments.sum_mm == pytest.approx(sum((y / n) ** 2 for n, y in rows), rel=1e-12)


def test_segments_are_those_of_the_first_exposure(database: Engine) -> None:
    EventLog(database).append(
        [
            interaction("a", CANDIDATE, user="ann", user_tier="pro"),
            interaction("b", CANDIDATE, user="ann", user_tier="free"),
            interaction("c", CONTROL, user="bob", user_tier="free"),
        ]
    )
    Projection(database, settings_with()).catch_up()
    assert segments_of(database, "exp") == ["agent=triage", "modality=text", "tier=free", "tier=pro"]
    pro = read_moments(database, "exp", period="ramp", segment="tier=pro")["error_rate"]
    assert pro["candidate"].sum_n == 2 and "control" not in pro


def test_what_users_said_before_is_a_covariate_and_what_they_say_after_is_not(database: Engine) -> None:
    """The page's size must not matter; the feedback after the exposure is about an answer from before."""
    events = [
        interaction("old", None, user="ann"),
        interaction("older", None, user="ann"),
        feedback("old", "thumbs_up", 1.0),
        feedback("older", "rating", 0.5, value=4),
        interaction("a", CANDIDATE, user="ann"),
        feedback("old", "thumbs_down", -1.0),
        feedback("a", "thumbs_up", 1.0),
        interaction("b", CONTROL, user="bob"),
    ]
    EventLog(database).append(events)
    for page in (3, 1000):
        Projection(database, settings_with(projection_page=page)).rebuild()
        found = users(database)
        assert found["ann"]["covariates"] == {"satisfaction": 0.75} and found["bob"]["covariates"] == {}
        moments = read_moments(database, "exp", period="ramp")["satisfaction"]["candidate"]
        assert (moments.known, moments.sum_x, moments.sum_xm, moments.sum_m_known) == (1, 0.75, 0.75, 1)


def test_latency_is_counted_in_bins_and_read_as_a_quantile(database: Engine) -> None:
    made = [interaction(f"c{n}", CANDIDATE, user=f"u{n}", latency_s=2.0 + n / 50) for n in range(100)]
    made += [interaction(f"s{n}", CONTROL, user=f"v{n}", latency_s=0.5 + n / 1000) for n in range(100)]
    EventLog(database).append(made)
    Projection(database, settings_with()).catch_up()
    arms, p_value = read_latency(database, "exp", settings_with().experiment, period="ramp")
    assert arms["candidate"].low <= 3.9 <= arms["candidate"].high and abs(arms["candidate"].value / 3.9 - 1) < 0.06
    assert p_value is not None and p_value > 0.1  # five of a hundred lie beyond: they prove nothing
    _, p_value = read_latency(database, "exp", settings_with().experiment, period="ramp", quantile=0.5)
    assert p_value is not None and p_value < 1e-6


def test_a_fallback_is_shown_beside_by_served_version(database: Engine) -> None:
    EventLog(database).append(
        [
            interaction("a", CANDIDATE, user="ann", flags={"fallback": True}),
            interaction("b", CANDIDATE, user="bea"),
            interaction("c", CONTROL, user="cy"),
            feedback("a", "thumbs_down", -1.0),
            feedback("b", "thumbs_up", 1.0),
        ]
    )
    Projection(database, settings_with()).catch_up()
    assigned = read_moments(database, "exp", period="ramp")["error_rate"]["candidate"]
    assert assigned.sum_y / assigned.sum_n == 0.5
    served = read_as_served(database, "exp", period="ramp")
    assert served["error_rate"] == 0.0 and served["satisfaction"] == 1.0


def test_tools_and_score_cards_become_metrics(database: Engine) -> None:
    messages = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "tool", "content": '{"error": "timeout"}'},
        {"role": "tool", "content": "fine"},
    ]
    card = {"ungrounded": 0.8, "win": 0.5}
    graded = parse_body("grade", {"grader": "pair", "grader_version": "1", "score_card": card})
    EventLog(database).append(
        [
            interaction("a", CANDIDATE, user="ann", messages=messages),
            Event("grade", TENANT, "main", graded, interaction_id="a"),
        ]
    )
    Projection(database, settings_with()).catch_up()
    found = statistics(database)
    assert found["tool_error_rate", "ramp", "candidate", "ann"] == (2, 1)
    assert found["hallucination_rate", "ramp", "candidate", "ann"] == (1, 1)
    assert found["win_rate", "ramp", "candidate", "ann"] == (1, 0.5)


def test_the_sums_over_time_are_kept_and_drawn(database: Engine, tmp_path: Path) -> None:
    settings = settings_with(history_interval_s=10.0)
    log, population = EventLog(database), Population(users=80, seed=6)
    for round_ in range(5):
        population.ask(log, fixed_split(0.5, "salt"), range(80), (1 + 8 * round_) * 1_000_000)
        Projection(database, settings).catch_up()
    points = read_timeline(database, "exp", "satisfaction", settings)
    assert [p.at_us for p in points] == [1_000_000, 17_000_000, 33_000_000, None]
    assert all(p.low <= p.effect <= p.high for p in points) and points[0].users < points[-1].users
    draw(points, "satisfaction", tmp_path / "plots" / "effect.png")
    assert (tmp_path / "plots" / "effect.png").read_bytes().startswith(b"\x89PNG")


def test_every_metric_has_a_name_the_settings_know() -> None:
    assert set(METRIC_NAMES) == set(METRICS)
