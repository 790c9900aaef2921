"""What a detector is, and which ones the settings ask for.

A detector looks at many texts at once and returns for each a badness in [0, 1], or `None` when it cannot
tell; above 0.5 it means yes. Everything else about it, how it was made and how fast it is, is its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

from cluster.settings.curation import DetectorSettings

YES = 0.5
"""Badness above which a detector means yes."""


@dataclass(frozen=True, slots=True)
class Item:
    """A text to judge, with the passages it may rest on."""

    text: str
    passages: Sequence[str] = ()


class Detector(Protocol):
    """Judges texts; the same items always get the same answers."""

    def __call__(self, items: Sequence[Item]) -> list[float | None]:
        """Badness in [0, 1] of each item, or `None` where it cannot tell."""
        ...


@dataclass(frozen=True, slots=True)
class Detectors:
    """The detectors that the filter asks, as the settings name them."""

    toxicity: Detector
    refusal: Detector
    ungrounded: Detector


@cache
def detectors(settings: DetectorSettings) -> Detectors:
    """The default detectors, or the stronger models the settings name; loaded once a process."""
    from data.detectors.grounding import Grounding
    from data.detectors.linear import shipped

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
