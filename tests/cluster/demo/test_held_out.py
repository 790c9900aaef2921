import json
import math
from itertools import islice
from pathlib import Path

import pytest

from cluster.demo import world
from cluster.demo.held_out import measure, wilson, write_prompts
from cluster.demo.world import Triage


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [
        # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_against_published_intervals(right: int, total: int, low: float, high: float) -> None:
    share = wilson(right, total)
    assert share.value == right / total
    assert (share.low, share.high) == pytest.approx((low, high), abs=5e-5)


def test_wilson_of_nothing_says_nothing() -> None:
    share = wilson(0, 0)
    assert math.isnan(share.value) and (share.low, share.high, share.total) == (0.0, 1.0, 0)


def test_measure_counts_verdict_both_and_valid() -> None:
    alerts = list(islice(world.alerts("held_out", 1), 4))
    truths = [world.todays_rules(alert) for alert in alerts]
    answers = [
        world.answer(truths[0]),
        world.answer(Triage(truths[1].verdict, "nobody")),
        world.answer(Triage("shrug", truths[2].owner)),
        "not JSON",
    ]
    found = measure(alerts, answers)
    assert (found.verdict.value, found.both.value, found.valid.value) == (0.5, 0.25, 0.75)


def test_prompts_are_written_in_the_order_of_their_alerts(tmp_path: Path) -> None:
    alerts = write_prompts(tmp_path / "prompts.jsonl", seed=3, count=25)
    lines = (tmp_path / "prompts.jsonl").read_text().splitlines()
    assert [json.loads(line)["messages"] for line in lines] == [world.prompt(alert) for alert in alerts]
    assert {world.pool_of(alert) for alert in alerts} == {"held_out"}
