"""Ungrounded answers: claims that no passage supports, by agreement of words, stems and numbers.

A passage sentence supports a claim when it holds enough of the claim's content words; all numbers of the
claim must be in that passage. Words are compared by their stem, so that "returns" supports "return".
"""

import re
from collections.abc import Sequence

from data.detectors.interface import Item
from data.score import content_words
from data.wordlists import word_list

SENTENCE = re.compile(r"(?<=[.!?;])\s+|\n+")
NUMBER = re.compile(r"\d+(?:[.,:]\d+)*")
SUFFIX = re.compile(r"(?:ations?|ings?|edly|ed|es|s|ly|ment|ion)$")
STEM = 4  # letters that a stem keeps at least
FUNCTION_WORDS = word_list("function_words")
"""Words of four letters and more that say nothing about the matter."""


class Grounding:
    """The offline detector: share of an answer's sentences without support."""

    def __init__(self, support_overlap: float) -> None:
        self.support_overlap = support_overlap

    def __call__(self, items: Sequence[Item]) -> list[float | None]:
        """Share of unsupported sentences; `None` without passages or sentences."""
        return [ungrounded_share(item.text, item.passages, self.support_overlap) for item in items]


def ungrounded_share(answer: str, passages: Sequence[str], support_overlap: float) -> float | None:
    """Share of the answer's sentences that no passage supports; `None` without passages or sentences."""
    claims = [s for s in SENTENCE.split(answer) if _stems(s)] if passages else []
    if not claims:
        return None
    unsupported = sum(not any(_supports(p, claim, support_overlap) for p in passages) for claim in claims)
    return unsupported / len(claims)


def _supports(passage: str, claim: str, support_overlap: float) -> bool:
    if not set(NUMBER.findall(claim)) <= set(NUMBER.findall(passage)):
        return False
    words = {word for word in _stems(claim) if not word.isdigit()}
    return len(words & _stems(passage)) >= support_overlap * len(words)


def _stems(text: str) -> set[str]:
    return {_stem(word) for word in content_words(text) - FUNCTION_WORDS}


def _stem(word: str) -> str:
    cut = SUFFIX.sub("", word)
    return cut if len(cut) >= STEM else word
