"""A linear classifier on n-grams, trained on the shipped cases: the offline default for toxicity and refusals.

A sentence is a bag of its words, of runs of two and three words, and of the letter n-grams inside each
word, hashed into buckets. Everything about a word is summed once for each distinct word, so judging a
column of long answers costs little more than splitting it. A text is as bad as its worst sentence.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from data.detectors.cases import cases
from data.detectors.interface import Item
from data.minhash import MULTIPLIER, U64, mix, only_words

BUCKETS = 2**16
LETTERS = (4, 5)
"""Lengths of the letter n-grams; words are written with their ends marked."""
RUNS = (2,)
"""Lengths of the runs of words."""
STRENGTH = 10.0  # inverse of the L2 regularisation
CLASS_WEIGHTS: dict[str, dict[bool, float] | str] = {"toxicity": {False: 2.0, True: 1.0}, "refusal": "balanced"}
"""What a case counts in training. Toxic text is far rarer among answers than among the cases, and an answer is judged
by its worst sentence, so there a false alarm costs more than a miss; see docs/decisions/0032."""
SENTENCE_END = r"[.!?;\n]+(?:\s+|$)"

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Sentences:
    """Sentences as words: sentence `i` has `words[offsets[i]:offsets[i+1]]`, indexes into `vocabulary`."""

    words: NDArray[np.int64]
    offsets: NDArray[np.int64]
    vocabulary: list[str]


@dataclass(frozen=True)
class LinearDetector:
    """Weights of the buckets; judges texts by their worst sentence."""

    weights: Matrix
    bias: float
    first_sentences: int | None = None
    """Look at so many sentences from the beginning only; `None` for all."""

    def __call__(self, items: Sequence[Item]) -> list[float | None]:
        """Probability of yes for each text; `None` for a text without a word."""
        return self.judge(pa.array([item.text for item in items], pa.string()))

    def judge(self, texts: pa.Array) -> list[float | None]:
        """The same for a column."""
        lists = pc.split_pattern_regex(texts, SENTENCE_END)
        text_of = pc.list_parent_indices(lists).to_numpy()
        flat = lists.flatten()
        if self.first_sentences is not None and len(flat):
            place = np.arange(len(flat)) - lists.offsets.to_numpy()[text_of] + lists.offsets[0].as_py()
            chosen = place < self.first_sentences
            flat, text_of = flat.filter(pa.array(chosen)), text_of[chosen]
        scores = self._margins(sentences_of(flat))
        worst = np.full(len(texts), -np.inf)
        np.maximum.at(worst, text_of, scores)
        return [float(1 / (1 + np.exp(-score))) if np.isfinite(score) else None for score in worst]

    def _margins(self, found: Sentences) -> Matrix:
        """Log odds of each sentence; minus infinity without words."""
        lengths = np.diff(found.offsets)
        total = np.zeros(len(lengths))
        sentence_of = np.repeat(np.arange(len(lengths)), lengths)
        np.add.at(total, sentence_of, self._word_scores(found.vocabulary)[found.words])
        for owner, bucket in run_buckets(found):
            np.add.at(total, owner, self.weights[bucket])
        scaled = total / np.sqrt(np.maximum(lengths, 1)) + self.bias
        return np.where(lengths > 0, scaled, -np.inf)

    def _word_scores(self, vocabulary: list[str]) -> Matrix:
        """Sum of the weights of each word's buckets."""
        buckets, starts = word_buckets(vocabulary)
        return np.add.reduceat(self.weights[buckets], starts) if vocabulary else np.zeros(1)


def sentences_of(texts: pa.Array) -> Sentences:
    """Words of each text, in lower case."""
    lists = pc.utf8_split_whitespace(pc.utf8_trim_whitespace(only_words(texts.cast(pa.string()))))
    encoded = pc.dictionary_encode(lists.flatten())
    vocabulary = [word or "" for word in encoded.dictionary.to_pylist()]
    words = encoded.indices.to_numpy().astype(np.int64)
    lengths = pc.list_value_length(lists).to_numpy(zero_copy_only=False)
    return _without_blanks(words, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), vocabulary)


def _without_blanks(words: NDArray[np.int64], offsets: NDArray[np.int64], vocabulary: list[str]) -> Sentences:
    """An empty text splits into one empty word, which is none."""
    real = np.array([word != "" for word in vocabulary] or [False])[words] if len(words) else np.zeros(0, bool)
    kept = np.concatenate([[0], np.cumsum(real)])
    return Sentences(words[real], kept[offsets].astype(np.int64), vocabulary)


def word_buckets(words: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Buckets of each word and of its letter n-grams, one word after the other, and where each word's begin.

    An n-gram counts once in a word, however often it is there: else a model that stutters ("ownerownerowner…") adds up
    what a letter or two have to do with insults.
    """
    grams: list[str] = []
    starts = []
    for word in words:
        marked = f"<{word}>"
        starts.append(len(grams))
        grams.append(marked)
        grams += dict.fromkeys(marked[i : i + n] for n in LETTERS for i in range(len(marked) - n + 1))
    return _hash(grams) % BUCKETS, np.array(starts, np.int64)


def _hash(texts: Sequence[str]) -> NDArray[np.int64]:
    hashed: U64 = pd.util.hash_array(np.asarray(texts, dtype=object), categorize=False)
    return (hashed >> np.uint64(1)).astype(np.int64)


def run_buckets(found: Sentences) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """For each length of run: the sentence and the bucket of every run of words."""
    words = _hash(found.vocabulary or [""]).astype(np.uint64)[found.words]
    sentence_of = np.repeat(np.arange(len(found.offsets) - 1), np.diff(found.offsets))
    runs = []
    for length in RUNS:
        last = len(words) - length + 1
        if last <= 0:
            continue
        rolled = np.zeros(last, np.uint64)
        for shift in range(length):
            rolled = mix(rolled * MULTIPLIER + words[shift : shift + last])
        whole = sentence_of[:last] == sentence_of[length - 1 :]
        runs.append((sentence_of[:last][whole], (rolled[whole] % np.uint64(BUCKETS)).astype(np.int64)))
    return runs


def features(texts: Sequence[str]) -> Any:
    """Sparse matrix [texts, BUCKETS]: what `LinearDetector` sums, for training."""
    from scipy.sparse import csr_matrix

    found = sentences_of(pa.array(list(texts), pa.string()))
    lengths = np.diff(found.offsets)
    buckets_of, starts = word_buckets(found.vocabulary)
    of_word = np.split(buckets_of, starts[1:])
    owners, buckets = [], []
    for sentence, (begin, end) in enumerate(pairwise(found.offsets)):
        for word in found.words[begin:end]:
            owners.append(np.full(len(of_word[word]), sentence))
            buckets.append(of_word[word])
    for owner, bucket in run_buckets(found):
        owners.append(owner)
        buckets.append(bucket)
    rows, columns = np.concatenate(owners), np.concatenate(buckets)
    values = (1 / np.sqrt(np.maximum(lengths, 1)))[rows]
    return csr_matrix((values, (rows, columns)), shape=(len(texts), BUCKETS))


def train(
    texts: Sequence[str],
    labels: Sequence[bool],
    first_sentences: int | None = None,
    class_weights: dict[bool, float] | str = "balanced",
) -> LinearDetector:
    """Logistic regression; the same cases always give the same weights."""
    from sklearn.linear_model import LogisticRegression

    seen = features(texts)
    used = np.flatnonzero(seen.getnnz(axis=0))  # the weight of a bucket without a case is 0 whatever is fitted
    model = LogisticRegression(C=STRENGTH, class_weight=class_weights, max_iter=2000)
    model.fit(seen[:, used], list(labels))
    weights = np.zeros(BUCKETS)
    weights[used] = np.round(model.coef_[0], 6)
    return LinearDetector(weights, round(float(model.intercept_[0]), 6), first_sentences)


BACKGROUND = {
    "toxicity": ("ordinary", "refusal", "topics", "grounding"),
    "refusal": ("ordinary", "toxicity", "topics", "grounding"),
}
"""Whose cases stand for ordinary text, which is neither, when a detector is trained."""


@cache
def shipped(name: str, first_sentences: int | None = None) -> LinearDetector:
    """The detector trained on the shipped training cases of `name`; trained once a process, in a second."""
    known = [(case.text, case.label == "yes") for case in cases(name, "train")]
    known += [(text, False) for other in BACKGROUND[name] for text in ordinary(other)]
    return train([text for text, _ in known], [label for _, label in known], first_sentences, CLASS_WEIGHTS[name])


def ordinary(name: str) -> list[str]:
    """The cases of a detector as plain text: the training part, or all of those that train nothing."""
    return [case.text for case in cases(name, "train") or cases(name, "held_out")]
