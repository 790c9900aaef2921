"""How alike two short texts are: cosine of character n-grams, with a check that their values agree.

`ngram_similarity` needs nothing but the two texts, so it gives the same answer on every machine and for
every batch. `TfidfSimilarity` also knows how common each n-gram is in a corpus; use it where texts share
a template.
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

NGRAM = 3
"""Length of the character n-grams; part of what the similarity means, so not a setting."""

_WORD = re.compile(r"\w+")
_VALUE = re.compile(r"[\w-]+=[\w.-]+|[\w-]*\d[\w-]*")


def normalise(text: str) -> str:
    """Lower case without accents and punctuation, single blanks, a blank at both ends."""
    plain = unicodedata.normalize("NFKD", text.casefold())
    plain = "".join(c for c in plain if not unicodedata.combining(c))
    return f" {' '.join(_WORD.findall(plain))} "


def ngram_similarity(first: str, second: str) -> float:
    """Similarity in [0, 1]; 1 for texts that differ in case, accents and punctuation only."""
    return _cosine(_ngrams(first), _ngrams(second), {}) * value_agreement(first, second)


@dataclass(frozen=True, slots=True)
class TfidfSimilarity:
    """`ngram_similarity` with n-grams weighed by their rarity in a corpus."""

    weights: dict[str, float]
    unseen: float
    """Weight of an n-gram that the corpus does not hold."""

    @staticmethod
    def fit(corpus: Iterable[str]) -> "TfidfSimilarity":
        """Weights 1 + ln((1 + N) / (1 + df)), smoothed as in scikit-learn."""
        documents, count = Counter[str](), 0
        for text in corpus:
            documents.update(set(_ngrams(text)))
            count += 1
        weights = {gram: 1 + math.log((1 + count) / (1 + df)) for gram, df in documents.items()}
        return TfidfSimilarity(weights, 1 + math.log(1 + count))

    def __call__(self, first: str, second: str) -> float:
        """Similarity in [0, 1]."""
        cosine = _cosine(_ngrams(first), _ngrams(second), self.weights, self.unseen)
        return cosine * value_agreement(first, second)


def value_agreement(first: str, second: str) -> float:
    """1 where both texts hold the same values or one holds none; falls to 0.5 where none is shared.

    A value is a word with a digit, or `name=value`. "5 km in miles" and "7 km in miles" read alike and
    ask for different things.
    """
    one, two = set(_VALUE.findall(first.casefold())), set(_VALUE.findall(second.casefold()))
    if not one or not two:
        return 1.0
    return 0.5 + 0.5 * len(one & two) / len(one | two)


def _ngrams(text: str) -> Counter[str]:
    plain = normalise(text)
    return Counter(plain[i : i + NGRAM] for i in range(max(1, len(plain) - NGRAM + 1)))


def _cosine(first: Counter[str], second: Counter[str], weights: dict[str, float], unseen: float = 1.0) -> float:
    one = {gram: count * weights.get(gram, unseen) for gram, count in first.items()}
    two = {gram: count * weights.get(gram, unseen) for gram, count in second.items()}
    dot = sum(value * two.get(gram, 0.0) for gram, value in one.items())
    norms = math.sqrt(sum(v * v for v in one.values()) * sum(v * v for v in two.values()))
    return min(1.0, dot / norms)
