import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DECISIONS = sorted((ROOT / "docs" / "decisions").glob("*.md"))
REFERENCE = re.compile(r"(?:docs/decisions/|decisions?/|[Dd]ecision )(\d{4})\b")
READ = ("*.md", "*.py", "*.yaml", "*.yml")
FOLDERS = ("cluster", "data", "train", "tune", "serve", "k8s", "docs", "tests")


def number(path: Path) -> str:
    return path.name.split("-")[0]


def test_every_decision_has_a_number_of_its_own() -> None:
    assert len(DECISIONS) > 40
    assert [n for n, times in Counter(map(number, DECISIONS)).items() if times > 1] == []


@pytest.mark.parametrize("path", DECISIONS, ids=number)
def test_a_decision_is_headed_by_its_number(path: Path) -> None:
    assert re.fullmatch(r"\d{4}-[a-z0-9-]+\.md", path.name)
    assert path.read_text(encoding="utf-8").startswith(f"# {int(number(path))}. ")


def test_decisions_that_are_referred_to_exist() -> None:
    files = [*ROOT.glob("*.md"), *(file for name in FOLDERS for kind in READ for file in (ROOT / name).rglob(kind))]
    named = {(found, file.name) for file in files for found in REFERENCE.findall(file.read_text(encoding="utf-8"))}
    assert {"0032", "0036"} <= {found for found, _ in named}
    assert {(found, file) for found, file in named if found not in set(map(number, DECISIONS))} == set()
