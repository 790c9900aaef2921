"""Sentence embeddings: how alike two texts are in meaning, and the space that topics are found in.

A text's embedding is the mean of the last hidden states over its tokens, of unit length. Loading takes seconds and
torch, so it happens at the first use in each process.

Source: Reimers and Gurevych 2019, "Sentence-BERT: Sentence Embeddings using Siamese BERT-Networks".
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.errors import InputError
from data.similarity import value_agreement

BATCH = 32  # texts in one forward pass
KEPT = 10_000  # embeddings of single texts: a turn is compared with the one before and with the one after


@dataclass(frozen=True)
class Embeddings:
    """A model by hub id or folder; holds no weights itself, so it travels to workers as its name."""

    name: str

    def transform(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """float32 [texts, dimensions], rows of unit length.

        Raises:
            InputError: no such model.
        """
        import torch

        tokenizer, model = _loaded(self.name)
        parts = []
        for start in range(0, len(texts), BATCH):
            batch = [text or " " for text in texts[start : start + BATCH]]
            encoded = tokenizer(batch, truncation=True, padding=True, return_tensors="pt")
            with torch.inference_mode():
                states_BTD = model(**encoded).last_hidden_state
            mask_BT1 = encoded["attention_mask"].unsqueeze(-1)
            means_BD = (states_BTD * mask_BT1).sum(1) / mask_BT1.sum(1).clamp(min=1)
            parts.append(torch.nn.functional.normalize(means_BD, dim=-1).numpy())
        return np.concatenate(parts)

    def similarity(self, first: str, second: str) -> float:
        """Cosine in [0, 1], 0 where it is negative; lower where the texts hold different values."""
        cosine = float(_embedded(self, first) @ _embedded(self, second))
        return min(1.0, max(0.0, cosine)) * value_agreement(first, second)


@lru_cache(KEPT)
def _embedded(model: Embeddings, text: str) -> NDArray[np.float32]:
    vector: NDArray[np.float32] = model.transform([text])[0]
    return vector


@cache
def _loaded(name: str) -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name), AutoModel.from_pretrained(name).eval()
    except (OSError, ValueError) as error:
        cause = str(error).splitlines()[0]
        remedy = "name a model folder or hub id"
        raise InputError("curation.detectors", name, f"cannot be loaded ({cause})", remedy) from None
