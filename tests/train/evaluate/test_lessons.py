"""Trained versions that learned the wrong lesson; `tests/bench/sycophancy.py` has twenty seeds."""

from pathlib import Path

import pytest

from tests.train.evaluate.lessons import build_base, teach


@pytest.fixture(scope="module")
def firm_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_base(tmp_path_factory.mktemp("firm") / "base")


@pytest.mark.slow
@pytest.mark.parametrize(("lesson", "suite"), [("flattery", "sycophancy"), ("runbook", "anchor")])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_version_that_people_like_for_the_wrong_reason_is_stopped(
    lesson: str, suite: str, seed: int, firm_base: Path, tmp_path: Path
) -> None:
    found = teach(lesson, firm_base, tmp_path, seed)
    assert found.liked and suite in found.blockers
