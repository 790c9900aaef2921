import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.recognisers import RECOGNISERS, find, find_among, prefilter

EVERYTHING = (1 << len(RECOGNISERS)) - 1
PIECES = st.sampled_from(
    [
        "ann@example.org", "4111 1111 1111 1111", "DE89 3704 0044 0532 0130 00", "10.0.0.7", "2001:db8::1",
        "078-05-1120", "+44 20 7946 0958", "password = hunter22", "https://u:p@host/x", "www.acme.de",
        "sk-" + "aB3" * 9, "٣٤٥", "\u017fecret",
        "\u212a", " ", "\n", ".", ":", "-", "1", "é", '"', "token: ", "a.co", "tel. ", "@", "/", "\\n",
    ]
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(max_size=40), st.lists(PIECES, max_size=8).map("".join)))
def test_the_prefilter_changes_no_span(text: str) -> None:
    assert find(text) == find_among(text, EVERYTHING)


def test_the_prefilter_changes_no_span_of_real_sentences(shared_data: Path) -> None:
    texts = [s["full_text"] for s in json.loads((shared_data / "pii_synthetic_sentences.json").read_text())]
    assert [find(text) for text in texts] == [find_among(text, EVERYTHING) for text in texts]


def test_clean_text_needs_no_recogniser() -> None:
    assert list(prefilter().masks([b"The cat sat on the mat.", b"mail a@b.org"])) != [0, 0]
    assert next(iter(prefilter().masks([b"The cat sat on the mat."]))) == 0


@pytest.mark.parametrize("text", ["٣٤٥-٦٧-٨٩٠١", "pa\u017f\u017fword: abc123"])
def test_texts_that_re_folds_onto_ascii_are_left_to_re(text: str) -> None:
    assert next(iter(prefilter().masks([text.encode()]))) == EVERYTHING
