import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import InputError
from cluster.settings.curation import ScrubSettings
from data.names import find_names
from data.presidio import find_with_presidio
from data.scrub import scrub
from data.scrub_text import Looks, Placeholders, scrub_text
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


def test_an_address_is_one_span_from_its_number_to_its_postcode() -> None:
    text = "Send it to 3744 Retreat Avenue Suite 4\n Graz\n Austria 8010, please."
    assert [(s.kind, s.value) for s in find_names(text)] == [("ADDRESS", text[11:-9])]
    listed = "Sofie Holm\nRua Direita 17\nLisbon"
    assert [s.kind for s in find_names(listed)] == ["NAME", "ADDRESS"]


@given(
    st.lists(
        st.sampled_from(
            ["221 ", "2024 ", "Baker Street ", "Suite 4", "\n", ", ", "Graz ", "AT 8010 ", "12/05/2024 ", "Mr. Falk ",
             "Unit 7 Box 9 ", "at ", "Austrian ", "my name is ", "anna ", "inc. ", ". ", "New Zealand "]
        ),
        max_size=12,
    )
)  # fmt: skip
def test_spans_lie_apart_and_hold_their_text(parts: list[str]) -> None:
    text, at = "".join(parts), 0
    for span in find_names(text):
        assert at <= span.start < span.end <= len(text) and text[span.start : span.end] == span.value
        at = span.end


def test_presidio_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "presidio_analyzer", None)
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(InputError, match=r"rayloop\[presidio\]"):
        find_with_presidio("Ada", "any")


def test_presidio_judges_names_and_our_rules_the_rest(tmp_path: Path) -> None:
    import spacy

    model = spacy.blank("en")
    ruler = model.add_pipe("entity_ruler")
    ruler.add_patterns([{"label": "PERSON", "pattern": "ada lovelace"}, {"label": "GPE", "pattern": "turin"}])
    model.to_disk(tmp_path / "model")
    text = "ada lovelace moved from turin to 221 Baker Street, write to ada@example.org"
    looks = Looks(names="presidio", presidio_model=str(tmp_path / "model"))
    clean = scrub_text(text, looks=looks)
    assert clean == "<PERSON_1> moved from <LOCATION_1> to <ADDRESS_1>, write to <EMAIL_1>"
    with pytest.raises(InputError, match="presidio_model='none' is no installed spaCy model"):
        find_with_presidio("Ada", "none")
