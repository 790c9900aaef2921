"""Judgements about text, each a function behind one name, with a default that works offline.

A detector returns the share or probability that the text is bad, or `None` when it cannot tell.
"""

import re
from collections.abc import Callable, Sequence

from data.score import content_words

Detector = Callable[[str, Sequence[str]], float | None]
"""(answer, passages) -> badness in [0, 1], or `None`."""
SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


def ungrounded_share(answer: str, passages: Sequence[str], support_overlap: float) -> float | None:
    """Share of the answer's sentences that no passage supports; `None` without passages or sentences.

    A passage supports a sentence when it holds enough of its content words and all of its numbers.
    """
    claims = [s for s in SENTENCE.split(answer) if content_words(s)]
    if not passages or not claims:
        return None
    unsupported = sum(not any(_supports(p, claim, support_overlap) for p in passages) for claim in claims)
    return unsupported / len(claims)


def _supports(passage: str, claim: str, support_overlap: float) -> bool:
    if not set(NUMBER.findall(claim)) <= set(NUMBER.findall(passage)):
        return False
    words = content_words(claim)
    return len(words & content_words(passage)) >= support_overlap * len(words)


def no_toxicity(_answer: str, _passages: Sequence[str] = ()) -> float | None:
    """The toxicity detector where none is installed: it cannot tell, and says so."""
    return None
