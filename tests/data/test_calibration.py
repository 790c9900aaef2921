import json
import random
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from cluster.clock import DAY_US
from cluster.errors import InputError
from cluster.settings import Settings
from data.behaviour import add_implicit_signals
from data.calibration import calibrate, fit, to_text
from data.events import Event, parse_body
from data.join import join_events
from data.log import EventLog
from data.seal import seal
from data.signal_pairs import Pair, from_table, pairs_of, pairs_of_rows, sample, to_table
from tests.data.test_commands import rayloop
from tests.data.test_join import block
from tests.data.traffic import START_US, feedback, interaction


def behaviour(number: int, action: str, *, user: str, after_s: float, **body: object) -> Event:
    return Event(
        "behaviour", "default", "default", parse_body("behaviour", {"action": action, **body}),
        event_id=f"b{number}{action}", occurred_at_us=START_US + number * 60_000_000 + round(after_s * 1e6),
        user_id=user, interaction_id=f"i{number}",
    )  # fmt: skip


def copied(count: int, liked_share: float) -> list[Event]:
    """Answers that were copied after 20 s, each by a user of its own; some of them were liked."""
    events: list[Event] = []
    for number in range(count):
        user = f"u{number}"
        events.append(interaction(number, f"question {number}", "short", user=user))
        events.append(behaviour(number, "copy", user=user, after_s=20, duration_s=20))
        liked = number < liked_share * count
        events.append(feedback(number, *(("thumbs_up", 1.0) if liked else ("thumbs_down", -1.0)), user=user))
    return events


def test_single_signal_is_worth_its_mean_reward_drawn_to_the_configured_one(settings: Settings) -> None:
    found = fit(pairs_of(copied(40, 0.25), settings), settings)
    weight = next(w for w in found.weights if w.signal == "copy_response")
    # by hand: (40 rows x mean -0.5 + 10 prior rows x 0.4) / 50
    assert weight.fitted == pytest.approx((40 * -0.5 + 10 * 0.4) / 50)
    assert (weight.rows, weight.users, weight.mean_explicit, weight.differs) == (40, 40, -0.5, True)
    assert found.as_settings() == {"copy_response": -0.32}
    assert (found.agreement_configured, found.agreement_fitted) == (0.25, 0.75)
    # residuals: 10 of 1 + 0.32 and 30 of -1 + 0.32, one a user; the sandwich is their root sum of squares over 50
    error = (10 * 1.32**2 + 30 * 0.68**2) ** 0.5 / 50
    assert weight.high - weight.fitted == pytest.approx(1.959964 * error)


def test_weights_are_told_apart_where_signals_come_together(settings: Settings) -> None:
    rng = random.Random(5)
    pairs = []
    for number in range(4000):
        copies, clicks, left = rng.random() < 0.5, rng.randrange(3), rng.random() < 0.3
        signals = {"copy_response": int(copies), "citation_click": clicks, "abandonment": int(left)}
        explicit = 0.2 * copies + 0.1 * clicks - 0.6 * left + rng.gauss(0, 0.1)
        pairs.append(Pair(f"i{number}", f"u{number}", Counter(signals), explicit))
    weights = {w.signal: w for w in fit(pairs, settings).weights}
    truth = {"copy_response": 0.2, "citation_click": 0.1, "abandonment": -0.6}
    for name, value in truth.items():
        assert weights[name].fitted == pytest.approx(value, abs=0.02)
    assert weights["reformulation"].fitted == settings.rewards.reformulation


def test_one_user_who_says_everything_widens_the_interval(settings: Settings) -> None:
    pairs = pairs_of(copied(40, 0.25), settings)
    one = [Pair(pair.interaction_id, "ann", pair.signals, pair.explicit) for pair in pairs]
    widths = [w.high - w.low for p in (pairs, one) for w in fit(p, settings).weights if w.signal == "copy_response"]
    assert widths[1] > widths[0]


def test_rare_signal_proposes_nothing(settings: Settings) -> None:
    assert fit(pairs_of(copied(10, 0.0), settings), settings).as_settings() == {}


def test_abandonment_is_seen_although_the_user_spoke(settings: Settings) -> None:
    answer = "word " * 238
    events = [
        interaction(1, "q", answer, user="ann"),
        behaviour(1, "leave", user="ann", after_s=5, duration_s=5),
        feedback(1, "thumbs_down", -1.0, user="ann"),
    ]
    (pair,) = pairs_of(events, settings)
    assert pair.signals == {"abandonment": 1}


def test_log_is_read_for_one_tenant_and_reported(database: Engine, settings: Settings) -> None:
    events = copied(35, 0.2)
    strangers = [
        Event(
            e.kind,
            "other",
            e.workspace,
            e.body,
            e.event_id,
            e.occurred_at_us,
            e.user_id,
            interaction_id=e.interaction_id,
        )
        for e in copied(50, 1.0)
    ]
    EventLog(database).append(events + strangers)
    found = calibrate(database, settings)
    assert found.rows == 35
    assert "rewards:\n  copy_response: -0.38" in to_text(found)


def test_command_prints_weights_or_one_clear_error(tmp_path: Path, settings: Settings) -> None:
    empty = rayloop(tmp_path, "data", "calibration")
    assert (empty.returncode, "both behaviour and explicit feedback" in empty.stderr) == (2, True)
    from cluster.database import connect
    from cluster.settings import load_settings

    engine = connect(load_settings(home=tmp_path)[0])
    EventLog(engine).append(copied(40, 0.25))
    engine.dispose()
    report = json.loads(rayloop(tmp_path, "data", "calibration", "--json").stdout)
    assert report["rewards"] == {"copy_response": -0.32}


def test_nothing_to_compare_is_an_error(sqlite_database: Engine, settings: Settings) -> None:
    with pytest.raises(InputError, match="calibration=0"):
        calibrate(sqlite_database, settings)


def test_sealed_days_are_read(sqlite_database: Engine, settings: Settings) -> None:
    EventLog(sqlite_database).append(copied(40, 0.25))
    options = settings.seal.model_copy(update={"keep_days": 0})
    report = seal(sqlite_database, settings.model_copy(update={"seal": options}), START_US + 3 * DAY_US)
    with sqlite_database.connect() as connection:
        bodies = connection.execute(sa.text("SELECT count(*) FROM event_bodies")).scalar_one()
    assert report and bodies < 40
    assert calibrate(sqlite_database, settings).as_settings() == {"copy_response": -0.32}


def test_rows_of_curation_give_the_pairs_of_the_log(settings: Settings) -> None:
    events = [*copied(40, 0.25), feedback(3, "citation_click", 0.3, user="u3", source="implicit")]
    expected = sorted(pairs_of(events, settings), key=lambda pair: pair.interaction_id)
    rows, _ = join_events(block(*events))
    assert from_table(pairs_of_rows(rows, settings)) == expected
    assert next(pair for pair in expected if pair.interaction_id == "i3").signals["citation_click"] == 1


def test_a_sample_is_the_same_whatever_the_parts(settings: Settings) -> None:
    pairs = to_table(pairs_of(copied(40, 0.25), settings))
    parts = [sample(pairs.slice(start, 10), 5) for start in range(0, 40, 10)]
    whole = from_table(sample(pairs, 5))
    assert len(whole) == 5
    assert from_table(sample(pa.concat_tables(parts), 5)) == whole


def test_calibrated_weights_reach_computed_and_reported_signals(settings: Settings) -> None:
    on = settings.model_copy(update={"feedback": settings.feedback.model_copy(update={"implicit": True})})
    events = [*copied(2, 1.0), feedback(1, "copy_response", 0.4, user="u1", source="implicit")]
    rows, _ = join_events(block(*events))
    table, _ = add_implicit_signals(rows, on, {"copy_response": -0.32})
    found = [s for text in table["signals"].to_pylist() for s in json.loads(text) if s["source"] == "implicit"]
    assert [(s["type"], s["reward"]) for s in found] == [("copy_response", -0.32)] * 3
    plain, _ = add_implicit_signals(rows, on)
    assert {s["reward"] for t in plain["signals"].to_pylist() for s in json.loads(t)} == {1.0, 0.4}
