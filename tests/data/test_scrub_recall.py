"""Recall on marked sentences (presidio-research); run with `-s` to see it by kind."""

from pathlib import Path

import pytest

from cluster.errors import InputError
from data.detectors.marked import KINDS, measure_marked
from data.scrub_text import Looks


def test_structured_kinds_are_found_on_marked_sentences(shared_data: Path) -> None:
    result = measure_marked(shared_data / "pii_synthetic_sentences.json")
    print(*result.lines(), *result.missed, sep="\n")
    for kind in KINDS:
        assert result.recall(kind) >= 0.99, (kind, result.missed)
        assert result.precision(kind) >= 0.98, (kind, result.spans, result.right)
    assert sum(result.spurious.values()) <= 0.02 * sum(result.marks[kind] for kind in KINDS)


def test_names_places_and_dates_are_found_when_asked_for(shared_data: Path) -> None:
    result = measure_marked(shared_data / "pii_synthetic_sentences.json", looks=Looks(names="builtin"))
    print(*result.lines(), sep="\n")
    covered, _, precision = result.overall
    assert covered >= 0.84 and precision >= 0.87
    assert all(result.recall(kind) >= 0.6 for kind in result.marks), "a kind is hardly found"


def test_a_file_of_another_form_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('[{"text": "a"}]')
    with pytest.raises(InputError, match="is no list of marked sentences"):
        measure_marked(tmp_path / "x.json")
    with pytest.raises(InputError, match="cannot be read"):
        measure_marked(tmp_path / "none.json")
