"""What the detectors say of live answers: toxic, and not borne by the passages they had.

A `grade` event of the grader `detectors` with `toxic` (a probability) and, where there were passages, `ungrounded`
(a share of the answer) in its card, and no reward. The metrics `toxicity_rate` and `hallucination_rate` read them.
"""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from cluster.settings.curation import DetectorSettings
from data import detectors
from data.detectors.interface import Item
from data.detectors.make import Detectors
from data.detectors.make import detectors as make_detectors
from data.events import Event
from serve.online_samples import verdict_event

NAME = "detectors"


class OnlineDetectors:
    """Looks at answers, off the event loop: detectors are made with the first ones, in a second."""

    def __init__(self, settings: DetectorSettings) -> None:
        self._settings = settings

    def look_at(self, events: Sequence[Event]) -> list[Event]:
        """The verdicts on interactions with an answer in words; none on one that nothing can be said of."""
        items = [Item(event.body["response"]["content"], event.body.get("context") or ()) for event in events]
        if not items:
            return []
        toxic, ungrounded = self._detectors.toxicity(items), self._detectors.ungrounded(items)
        cards = [
            {name: value for name, value in (("toxic", one), ("ungrounded", other)) if value is not None}
            for one, other in zip(toxic, ungrounded, strict=True)
        ]
        return [
            verdict_event(event, NAME, self._version, {"reason": "", "judged": event.event_id, "score_card": card})
            for event, card in zip(events, cards, strict=True)
            if card
        ]

    @cached_property
    def _detectors(self) -> Detectors:
        return make_detectors(self._settings)

    @cached_property
    def _version(self) -> str:
        """A digest of settings, code and cases, so that no edit can be forgotten."""
        digest = hashlib.sha256(self._settings.model_dump_json().encode())
        folder = Path(str(detectors.__file__)).parent
        for path in sorted([*folder.glob("*.py"), *folder.glob("cases/*.txt")]):
            digest.update(path.read_bytes())
        return f"{NAME}-{digest.hexdigest()[:12]}"
