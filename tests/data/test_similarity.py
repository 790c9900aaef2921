import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.settings.capture import ImplicitSettings
from data.similarity import TfidfSimilarity, ngram_similarity, value_agreement

CASES = Path(__file__).parents[2] / "data/detectors/cases/reformulation.jsonl"


def test_precision_and_recall_on_held_out_cases() -> None:
    cases = [json.loads(line) for line in CASES.read_text(encoding="utf-8").splitlines()]
    held_out = [case for case in cases if case["part"] == "held_out"]
    threshold = ImplicitSettings().reformulation_similarity
    flagged = [c["same"] for c in held_out if ngram_similarity(c["first"], c["second"]) >= threshold]
    precision, recall = sum(flagged) / len(flagged), sum(flagged) / sum(c["same"] for c in held_out)
    print(f"reformulation: precision {precision:.2f}, recall {recall:.2f} on {len(held_out)} held-out cases")
    assert min(precision, recall) >= 0.85


def test_case_accents_and_punctuation_do_not_count() -> None:
    assert ngram_similarity("Où est le café ?", "ou est le cafe") == pytest.approx(1)


def test_values_must_agree() -> None:
    assert value_agreement("refund order 8812.", "order 8812, refund") == 1
    assert value_agreement("5 km in miles", "7 km in miles") == 0.5
    assert value_agreement("cpu=high host=web", "cpu=high host=db") == pytest.approx(0.5 + 0.5 / 3)
    assert value_agreement("how far", "7 km") == 1


def test_rare_words_weigh_more_than_a_template() -> None:
    corpus = [f"please tell me about the {thing}" for thing in ("whale", "comet", "loan", "oven")]
    assert TfidfSimilarity.fit(corpus)(corpus[0], corpus[1]) < ngram_similarity(corpus[0], corpus[1])


@given(st.text(max_size=40), st.text(max_size=40))
def test_similarity_is_symmetric_and_bounded(first: str, second: str) -> None:
    alike = ngram_similarity(first, second)
    assert 0 <= alike <= 1
    assert alike == pytest.approx(ngram_similarity(second, first))
    assert ngram_similarity(first, first) == pytest.approx(1)
