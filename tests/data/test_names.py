import sys

import pytest

from cluster.errors import InputError
from cluster.settings.curation import ScrubSettings
from data.names import find_names, find_with_presidio
from data.scrub import Looks, Placeholders, scrub, scrub_text
from tests.data.rows import rows

BUILTIN = Looks(names="builtin")


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("please ask Mrs. Holm about it", "PERSON", "Holm"),
        ("my name is Ana de la Cruz and I wait", "PERSON", "Ana de la Cruz"),
        ("they moved from Lisbon last year", "PLACE", "Lisbon"),
        ("she works at Hansen Systems Inc. as a clerk", "ORGANIZATION", "Hansen Systems Inc."),
        ("send it to 221 Baker Street today", "ADDRESS", "221 Baker Street"),
        ("it opened on 2024-05-17 at last", "DATE", "2024-05-17"),
        ("a man aged 57 called", "AGE", "57"),
        ("the Norwegian clerk", "NATIONALITY", "Norwegian"),
    ],
)
def test_names_places_and_dates_are_found(text: str, kind: str, value: str) -> None:
    assert (kind, value) in [(span.kind, span.value) for span in find_names(text)]


@pytest.mark.parametrize(
    "text",
    [
        "The queue grows until somebody restarts the process.",
        "I think we should wait. Then we can try again.",
        "use the API with JSON over HTTP",
        "add 250 grams of flour and 2 eggs",
    ],
)
def test_ordinary_sentences_hold_no_names(text: str) -> None:
    assert find_names(text) == []


def test_names_get_placeholders_beside_structured_data_and_only_when_asked() -> None:
    text = "Write to Mr. Falk at falk@example.org. Falk answers."
    assert "Falk" in scrub_text(text)
    known = Placeholders()
    clean = scrub_text(text, known, looks=BUILTIN)
    assert clean.startswith("Write to <TITLE_1> <PERSON_1> at <EMAIL_1>")
    assert scrub_text(clean, Placeholders(), looks=BUILTIN) == clean


def test_rows_without_structured_data_are_looked_at_for_names() -> None:
    table = rows({"messages": [{"role": "user", "content": "we met Mrs. Holm there"}]})
    assert "Holm" in scrub(table, ScrubSettings())[0]["messages"][0].as_py()
    assert "Holm" not in scrub(table, ScrubSettings(names="builtin"))[0]["messages"][0].as_py()


def test_presidio_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "presidio_analyzer", None)
    with pytest.raises(InputError, match=r"rayloop\[presidio\]"):
        find_with_presidio("Ada")
