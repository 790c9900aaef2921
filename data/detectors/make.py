"""Which detectors the settings ask for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from cluster.settings.curation import DetectorSettings
from data.detectors.grounding import Grounding
from data.detectors.interface import Detector
from data.detectors.linear import shipped
from data.detectors.sentiment import Sentiment, sentiment
from data.detectors.topics import TopicModel, fit_topics
from data.similarity import ngram_similarity


@dataclass(frozen=True, slots=True)
class Detectors:
    """The detectors that the filter asks, as the settings name them."""

    toxicity: Detector
    refusal: Detector
    ungrounded: Detector


def similarity_by(settings: DetectorSettings) -> Callable[[str, str], float]:
    """What tells how alike two questions are: character n-grams, or the model the settings name."""
    if settings.similarity_model is None:
        return ngram_similarity
    from data.detectors.embeddings import Embeddings

    return Embeddings(settings.similarity_model).similarity


def sentiment_by(settings: DetectorSettings) -> Callable[[str], Sentiment]:
    """What tells how a text sounds: VADER, or the model the settings name."""
    if settings.sentiment_model is None:
        return sentiment
    from data.detectors.model import SentimentModel

    return SentimentModel(settings.sentiment_model)


def topics_of(texts: Sequence[str], topics: int, settings: DetectorSettings, seed: int = 0) -> TopicModel:
    """Topics of a sample of texts, by their words or in the space of the model the settings name."""
    if settings.topic_model is None:
        return fit_topics(texts, topics, seed)
    from data.detectors.embeddings import Embeddings

    return fit_topics(texts, topics, seed, Embeddings(settings.topic_model))


@cache
def detectors(settings: DetectorSettings) -> Detectors:
    """The default detectors, or the stronger models the settings name; loaded once a process."""
    toxicity: Detector = shipped("toxicity")
    refusal: Detector = shipped("refusal", settings.refusal_sentences)
    ungrounded: Detector = Grounding(settings.support_overlap)
    if settings.toxicity_model or settings.refusal_model or settings.grounding_model:
        from data.detectors.model import EntailmentModel, TextModel

        if settings.toxicity_model:
            toxicity = TextModel(settings.toxicity_model, settings.toxicity_label)
        if settings.refusal_model:
            refusal = TextModel(settings.refusal_model, settings.refusal_label)
        if settings.grounding_model:
            ungrounded = EntailmentModel(settings.grounding_model, settings.entailment_label)
    return Detectors(toxicity, refusal, ungrounded)
