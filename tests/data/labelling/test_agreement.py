"""Krippendorff's alpha against published examples, and over labels in the log."""

import pytest
from sqlalchemy.engine import Engine

from data.labelling.agreement import agreement_of
from data.labelling.krippendorff import krippendorff_alpha
from data.log import EventLog
from tests.data.labelling.test_requests import item_of, label

FOUR_OBSERVERS = """
1 2 3 3 2 1 4 1 2 . . .
1 2 3 3 2 2 4 1 2 5 . 3
. 3 3 3 2 3 4 2 2 5 1 .
1 2 3 3 2 4 4 1 2 5 1 .
"""
"""Krippendorff 2011, Computing Krippendorff's Alpha-Reliability, section C: nominal .743; section D: interval .849.
https://repository.upenn.edu/handle/20.500.14332/2089"""
THREE_CODERS = """
. . . . . 3 4 1 2 1 1 3 3 . 3
1 . 2 1 3 3 4 3 . . . . . . .
. . 2 1 3 4 4 . 2 1 1 3 3 . 4
"""
"""https://en.wikipedia.org/wiki/Krippendorff%27s_alpha, A computational example: nominal .691, interval .811."""
TWO_OBSERVERS = """
0 1 0 0 0 0 0 0 1 0
1 1 1 0 0 1 0 0 0 0
"""
"""Krippendorff 2011, section A: binary data, .095."""


def units(table: str) -> list[list[int]]:
    rows = [line.split() for line in table.strip().splitlines()]
    return [[int(value) for value in column if value != "."] for column in zip(*rows, strict=True)]


@pytest.mark.parametrize(
    ("table", "level", "alpha"),
    [
        (FOUR_OBSERVERS, "nominal", 0.743),
        (FOUR_OBSERVERS, "interval", 0.849),
        (THREE_CODERS, "nominal", 0.691),
        (THREE_CODERS, "interval", 0.811),
        (TWO_OBSERVERS, "nominal", 0.095),
    ],
)
def test_alpha_is_the_published_one(table: str, level: str, alpha: float) -> None:
    assert krippendorff_alpha(units(table), level) == pytest.approx(alpha, abs=5e-4)  # type: ignore[arg-type]


@pytest.mark.parametrize("given", [[], [[1]], [[1], [2]], [[1, 1], [1, 1]]])
def test_alpha_of_nothing_to_compare_is_none(given: list[list[int]]) -> None:
    assert krippendorff_alpha(given) is None


def judged(log: EventLog, *pairs: tuple[int, int | None]) -> None:
    """Rita's preference and Ann's, an item each; Rita first says the opposite and then thinks again."""
    for number, (rita, ann) in enumerate(pairs):
        item = item_of(f"r{number}")
        for place in (0, 1):
            log.append([label(item, place, 1, preferred=1 - rita, scores={"success": 0.0})])
            log.append([label(item, place, 2, preferred=rita, scores={"success": 1.0})])
            if ann is not None:
                log.append([label(item, place, 1, preferred=ann, reviewer="ann")])


def test_agreement_goes_by_the_newest_label_and_by_what_two_judged(sqlite_database: Engine) -> None:
    log = EventLog(sqlite_database)
    judged(log, (0, 0), (0, 0), (0, 0), (0, 0), (0, None))
    preference, success = agreement_of(log, "default", "default")
    assert (preference.name, preference.judged_twice, preference.reviewers) == ("preference", 4, 2)
    assert preference.alpha == 1.0  # the same version each time, yet not always the one shown first
    assert (success.name, success.judged_twice, success.reviewers, success.alpha) == ("success", 0, 1, None)


def test_reviewers_who_contradict_each_other_are_below_chance(sqlite_database: Engine) -> None:
    log = EventLog(sqlite_database)
    judged(log, (0, 1), (1, 0), (0, 1))
    # each item has one of each: 3 * 2 differing pairs against 2 * 3 * 3 / 5
    assert agreement_of(log, "default", "default")[0].alpha == pytest.approx(1 - 6 / (18 / 5))
