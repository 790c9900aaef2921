"""Which detectors the settings ask for."""

from dataclasses import dataclass
from functools import cache

from cluster.settings.curation import DetectorSettings
from data.detectors.grounding import Grounding
from data.detectors.interface import Detector
from data.detectors.linear import shipped


@dataclass(frozen=True, slots=True)
class Detectors:
    """The detectors that the filter asks, as the settings name them."""

    toxicity: Detector
    refusal: Detector
    ungrounded: Detector


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
