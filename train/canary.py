"""What a trained adapter finds of a few fixed texts, written beside it.

An engine that has loaded the adapter scores the same token ids. Where it finds something else, it does not serve what
was trained: another base, another scale, layers that were not reached.
"""

import json
from pathlib import Path
from typing import Any

import torch

from cluster.model_files import CANARY_FILE

TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "Seven boxes of twelve eggs are 84 eggs; three of them broke.",
    '{"verdict": "escalate", "owner": "payments", "reason": "two refunds in an hour"}',
)


@torch.inference_mode()
def canary_logprobs(model: Any, ids: list[int]) -> list[float]:
    """Log-probability of each token after the first, in nats."""
    ids_1T = torch.tensor([ids], device=model.device)
    logits_TV = model(input_ids=ids_1T, use_cache=False).logits[0, :-1].float()
    logps_TV = torch.log_softmax(logits_TV, -1)
    found: list[float] = logps_TV.gather(1, ids_1T[0, 1:, None]).squeeze(1).tolist()
    return found


def write_canary(folder: Path, model: Any, tokenizer: Any) -> None:
    """Score the texts and write their ids and log-probabilities."""
    was_training = model.training
    model.eval()
    texts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    rows = [{"ids": ids, "logprobs": canary_logprobs(model, ids)} for ids in texts if len(ids) > 1]
    model.train(was_training)
    (folder / CANARY_FILE).write_text(json.dumps(rows) + "\n")
