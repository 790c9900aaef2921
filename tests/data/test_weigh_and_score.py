import orjson
import pytest

from cluster.clock import DAY_US, SECOND_US
from cluster.settings.curation import ScoreSettings, WeighSettings
from data.score import combine, completeness, components, context_used, score
from data.weigh import count_votes, exceptions, most_votes, user_totals, votes_of, weigh
from tests.data.rows import rows, signal

SCORE = ScoreSettings(complete_min_words=10, complete_max_words=20)


def test_one_users_signals_are_one_vote() -> None:
    votes = votes_of(
        [
            signal("thumbs_up", 1.0),
            signal("rating", 0.5),
            signal("copy_response", 0.4, source="implicit"),
            signal("thumbs_down", -1.0, user="bob"),
        ]
    )
    assert votes == [
        {"user": "ada", "day": 0, "weight": 1.0, "explicit": 0.75, "implicit": 0.4, "wrote": 0},
        {"user": "bob", "day": 0, "weight": 1.0, "explicit": -1.0, "implicit": None, "wrote": 0},
    ]


def test_implicit_signals_are_summed_and_clamped() -> None:
    clicks = [signal("citation_click", 0.3, source="implicit")] * 5
    assert votes_of(clicks)[0]["implicit"] == 1.0


def test_a_days_votes_beyond_the_cap_share_its_weight() -> None:
    table = rows(*({"interaction_id": f"i{n}", "signals": [signal("thumbs_up", 1.0)]} for n in range(40)))
    totals = user_totals(count_votes(table, WeighSettings()), votes_per_day=20)
    assert totals.to_pylist() == [{"user": "ada", "votes": 20.0, "answers": 20.0, "days": '{"0":0.5}'}]
    settings = WeighSettings(votes_per_day=20, dataset_share=1)
    weighed, _ = weigh(table, settings, exceptions([totals], 1.0))
    assert sum(weighed["weight"].to_pylist()) == pytest.approx(20.0)


def test_a_user_has_at_most_a_share_of_all_votes() -> None:
    loud = [{"signals": [signal("thumbs_up", 1.0, at_us=n * DAY_US)]} for n in range(90)]
    quiet = [{"signals": [signal("thumbs_up", 1.0, user=f"u{n}")]} for n in range(10)]
    totals = user_totals(count_votes(rows(*loud, *quiet), WeighSettings()), votes_per_day=20)
    assert exceptions([totals], 0.05) == {"ada": {"*": pytest.approx(5 / 90)}}  # eleven users: no cap can hold


def test_a_votes_day_is_the_logs_and_not_the_clients() -> None:
    spread = [signal("thumbs_up", 1.0, at_us=n * DAY_US, logged_us=5 * DAY_US) for n in range(3)]
    table = rows(*({"interaction_id": f"i{n}", "signals": [said]} for n, said in enumerate(spread)))
    assert count_votes(table, WeighSettings())["day"].to_pylist() == [5]
    assert count_votes(table, WeighSettings(day="occurred"))["day"].to_pylist() == [0, 1, 2]


def test_the_corrections_of_one_user_share_their_vote() -> None:
    said = [signal("correction", -0.5, text=text) for text in ("a", "a", "b")]
    said.append(signal("correction", -0.5, user="bob", text="a"))
    weighed, _ = weigh(rows({"signals": said}), WeighSettings(), {"ada": {"*": 0.5}})
    assert [s["weight"] for s in orjson.loads(weighed["signals"][0].as_py())] == [0.25, 0, 0.25, 1]


def test_the_share_is_of_what_is_left_after_the_cut() -> None:
    limit = most_votes([1000.0, *[10.0] * 30], 1300.0, 0.05)
    assert limit == pytest.approx(0.05 * 300 / 0.95)
    assert limit / (300 + limit) == pytest.approx(0.05)
    assert most_votes([10.0] * 30, 300.0, 0.05) == pytest.approx(15.0)


def test_a_coordinated_burst_is_left_out() -> None:
    users = [signal("thumbs_up", 1.0, user=f"u{n}", at_us=n * SECOND_US) for n in range(5)]
    slow = [{**s, "at_us": n * 100 * SECOND_US} for n, s in enumerate(users)]
    settings = WeighSettings(burst_users=5, burst_window_s=10)
    kept, dropped = weigh(rows({"signals": users}, {"signals": slow, "interaction_id": "slow"}), settings, {})
    assert kept["interaction_id"].to_pylist() == ["slow"]
    assert dropped == {"coordinated burst": 1}


def test_score_is_the_weighted_mean_of_what_there_is() -> None:
    votes = votes_of([signal("thumbs_up", 1.0), signal("copy_response", 0.4, source="implicit")])
    parts = components(votes, [], [], "five words are in here", [], SCORE)
    assert parts == {
        "explicit": 1.0, "implicit": 0.7, "grade": None, "label": None, "complete": 0.5, "context": None,
    }  # fmt: skip
    assert combine(parts, SCORE) == pytest.approx((0.4 * 1.0 + 0.3 * 0.7 + 0.15 * 0.5) / 0.85)


def test_label_overrides_and_grade_stands_in_for_explicit_feedback() -> None:
    votes = votes_of([signal("thumbs_down", -1.0)])
    labelled = components(votes, [{"scores": {"success": 1.0, "tone": 0.5}}], [], "a", [], SCORE)
    assert combine(labelled, SCORE) == 0.75
    graded = components([], [], [{"reward": 0.5}], "ten words " * 5, [], SCORE)
    assert combine(graded, SCORE) == pytest.approx((0.4 * 0.5 + 0.15 * 1.0) / 0.55)


def test_votes_are_averaged_by_weight() -> None:
    votes = votes_of([signal("thumbs_up", 1.0), signal("thumbs_down", -1.0, user="bob")])
    votes[1]["weight"] = 0.25
    assert components(votes, [], [], "", [], SCORE)["explicit"] == pytest.approx(((1 - 0.25) / 1.25 + 1) / 2)


def test_a_row_without_any_judgement_is_dropped() -> None:
    table, _ = weigh(rows({}, {"interaction_id": "i2", "signals": [signal("thumbs_up", 1.0)]}), WeighSettings(), {})
    scored, dropped = score(table, SCORE)
    assert scored["interaction_id"].to_pylist() == ["i2"]
    assert dropped == {"no signal": 1}
    assert orjson.loads(scored["parts"][0].as_py())["explicit"] == 1.0


@pytest.mark.parametrize(("words", "expected"), [(5, 0.5), (10, 1.0), (20, 1.0), (40, 0.5), (0, 0.0)])
def test_completeness_falls_off_outside_the_usual_length(words: int, expected: float) -> None:
    assert completeness("w " * words, SCORE) == expected


def test_context_used_is_the_share_of_content_words_found() -> None:
    assert context_used("the tower has 330 metres", ["A tower of 330 m."]) == pytest.approx(2 / 3)
    assert context_used("anything", []) is None
