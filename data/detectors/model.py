"""Detectors that ask a transformer: a text classifier, or an NLI cross-encoder for claims and passages.

Loading takes seconds and torch, so it happens at the first use in each process; `data` itself stays light.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from cluster.errors import InputError
from data.detectors.grounding import SENTENCE
from data.detectors.interface import Item
from data.detectors.sentiment import SENTIMENTS, Sentiment

BATCH = 32  # texts in one forward pass


class _Model:
    """A sequence classifier and its tokenizer, loaded at first use."""

    def __init__(self, name: str, *labels: str) -> None:
        self.name, self.labels = name, labels

    @cached_property
    def _loaded(self) -> tuple[Any, Any, list[int]]:
        """Tokenizer, model, and the places of the labels.

        Raises:
            InputError: no such model, or it does not know the label.
        """
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(self.name)
            model = AutoModelForSequenceClassification.from_pretrained(self.name).eval()
        except (OSError, ValueError) as error:
            cause = str(error).splitlines()[0]
            raise InputError(
                "curation.detectors", self.name, f"cannot be loaded ({cause})", "name a model folder or hub id"
            ) from None
        known = {str(label).lower(): index for index, label in model.config.id2label.items()}
        for label in self.labels:
            if label.lower() not in known:
                rule = f"has no label {label!r}, only {', '.join(sorted(known))}"
                raise InputError("curation.detectors", self.name, rule, "set the label's name")
        return tokenizer, model, [int(known[label.lower()]) for label in self.labels]

    def probabilities(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> list[float]:
        """Probability of the first label for each text, or for each text with its pair."""
        return [row[0] for row in self.of_labels(texts, pairs)]

    def of_labels(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> list[list[float]]:
        """Probability of each label for each text, or for each text with its pair."""
        import torch

        tokenizer, model, places = self._loaded
        found: list[list[float]] = []
        for start in range(0, len(texts), BATCH):
            part = slice(start, start + BATCH)
            second = None if pairs is None else list(pairs[part])
            encoded = tokenizer(list(texts[part]), second, truncation=True, padding=True, return_tensors="pt")
            with torch.inference_mode():
                logits = model(**encoded).logits
            found += torch.softmax(logits, dim=-1)[:, places].tolist()
        return found


class TextModel(_Model):
    """A text classifier; badness is the probability of its label."""

    def __call__(self, items: Sequence[Item]) -> list[float | None]:
        """Probability that each text has the label; `None` for an empty one."""
        spoken = [item.text for item in items if item.text.strip()]
        found = iter(self.probabilities(spoken))
        return [next(found) if item.text.strip() else None for item in items]


class SentimentModel(_Model):
    """A text classifier with three labels; what a text sounds like is the likeliest of them."""

    def __init__(self, name: str) -> None:
        super().__init__(name, *SENTIMENTS)

    def __call__(self, text: str) -> Sentiment:
        """What a text sounds like."""
        (chances,) = self.of_labels([text])
        return SENTIMENTS[chances.index(max(chances))]


class EntailmentModel(_Model):
    """An NLI cross-encoder; badness is the share of claims that no passage entails."""

    def __call__(self, items: Sequence[Item]) -> list[float | None]:
        """Share of unsupported sentences of each answer; `None` without passages or sentences."""
        return [self._share(item) for item in items]

    def _share(self, item: Item) -> float | None:
        claims = [claim for claim in SENTENCE.split(item.text) if claim.strip()]
        if not claims or not item.passages:
            return None
        asked = [(passage, claim) for claim in claims for passage in item.passages]
        found = self.probabilities([p for p, _ in asked], [c for _, c in asked])
        width = len(item.passages)
        best = [max(found[i * width : (i + 1) * width]) for i in range(len(claims))]
        return sum(value < 0.5 for value in best) / len(claims)
