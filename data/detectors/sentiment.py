"""Sentiment of what a person writes, by VADER: a lexicon with rules for negation, emphasis and smileys.

Source: Hutto and Gilbert 2014, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social
Media Text"; the limits of ±0.05 on the compound score are theirs.
"""

from functools import cache
from typing import Any, Literal, get_args

Sentiment = Literal["positive", "neutral", "negative"]
SENTIMENTS: tuple[Sentiment, ...] = get_args(Sentiment)
NEUTRAL = 0.05


def sentiment(text: str) -> Sentiment:
    """What a text sounds like."""
    score = compound(text)
    if score >= NEUTRAL:
        return "positive"
    return "negative" if score <= -NEUTRAL else "neutral"


def compound(text: str) -> float:
    """VADER's compound score in [-1, 1]."""
    return float(_analyser().polarity_scores(text)["compound"])


@cache
def _analyser() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()
