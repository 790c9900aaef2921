"""Topics of questions: TF-IDF of words and word pairs, k-means, each topic named by its top terms.

A model is fitted on a sample and then given to all blocks, so that one question has one topic wherever it
is. K-means starts several times and keeps the tightest result, which makes the topics the same ones under
another seed.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

WORD = re.compile(r"[^\W\d_]{3,}")
STARTS = 20  # of k-means; the tightest clustering of them is kept
DIGITS = 9  # to which vectors of different texts may agree
NAMED_BY = 4  # terms in a topic's name


@dataclass(frozen=True)
class TopicModel:
    """Vectoriser, reduction and centroids, fitted."""

    vectors: Any
    """From texts to unit vectors: a fitted scikit-learn pipeline, or a model of embeddings; `None` for one topic."""
    centroids: Any
    """float [topics, dimensions]."""
    names: tuple[str, ...]

    def assign(self, texts: Sequence[str]) -> list[int]:
        """The topic of each text: the nearest centroid."""
        if self.vectors is None:
            return [0] * len(texts)
        if not texts:
            return []
        likeness = self.vectors.transform(texts) @ self.centroids.T
        lengths = (self.centroids**2).sum(axis=1)
        return [int(topic) for topic in np.argmax(2 * likeness - lengths, axis=1)]


def content_terms(text: str) -> list[str]:
    """The words of a text that can name a topic: letters only, no English function words."""
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    return [word for word in WORD.findall(text.lower()) if word not in ENGLISH_STOP_WORDS]


def fit_topics(texts: Sequence[str], topics: int, seed: int = 0, space: Any = None) -> TopicModel:
    """Topics of a sample of texts, at most as many as there are different texts.

    They are found in the space of the texts' words, or in that of `space`, a model of embeddings; either way their
    words name them.
    """
    from sklearn.cluster import KMeans
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import Normalizer
    from threadpoolctl import threadpool_limits

    words = TfidfVectorizer(sublinear_tf=True, stop_words="english", max_features=20_000, min_df=_least(len(texts)))
    try:
        weights = words.fit_transform(texts)
    except ValueError:  # no text, or none with a word that could name a topic
        return TopicModel(None, None, ("everything",))
    dimensions = max(1, min(topics * 2, 100, weights.shape[1] - 1, weights.shape[0] - 1))
    with threadpool_limits(1):  # sums in one order: the same texts give the same centroids on any machine
        if space is None:
            reduce = make_pipeline(TruncatedSVD(dimensions, random_state=seed), Normalizer())
            vectors, space = reduce.fit_transform(weights), make_pipeline(words, reduce)
        else:
            vectors = space.transform(texts)
        number = min(topics, len(np.unique(vectors.round(DIGITS), axis=0)))
        model = KMeans(number, n_init=STARTS, random_state=seed).fit(vectors)
    return TopicModel(space, model.cluster_centers_, _names(words, weights, model.labels_))


def _least(texts: int) -> int:
    """Texts a word must be in: a word of a single text joins nothing, but a small sample has few others."""
    return 2 if texts >= 50 else 1


def _names(words: Any, weights: Any, labels: Any) -> tuple[str, ...]:
    terms = words.get_feature_names_out()
    tops = [np.asarray(weights[labels == topic].mean(axis=0)).ravel() for topic in range(labels.max() + 1)]
    return tuple(" ".join(terms[i] for i in np.argsort(-top, kind="stable")[:NAMED_BY]) for top in tops)
