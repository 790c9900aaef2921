"""Does a loaded adapter do anything, and what it was trained to? Its log-probs of a few texts are compared with the
base's, and with those that its training wrote down.

An adapter that moves nothing was never trained, was saved before training, or did not reach the layers it
names: to give it traffic would measure the base against itself. One that yields not-a-number would fail
every answer.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from cluster.settings.engines import EngineSettings
from serve.engines.adapter_source import AdapterError
from serve.engines.as_trained import check_as_trained
from serve.engines.detokenise import AnswerText
from serve.engines.generation import Generation, SamplingParams
from serve.engines.lora import LoadedAdapter
from serve.engines.scheduler import Scheduler

CANARY_TIMEOUT_S = 120.0  # one short forward pass, behind at most one step of the batch


class Canary:
    """Prompts whose base log-probs are kept, to be compared with each adapter's."""

    def __init__(self, tokenizer: Any, scheduler: Scheduler, settings: EngineSettings) -> None:
        self._scheduler, self._min_shift = scheduler, settings.canary_min_shift
        self._max_distance = settings.canary_max_distance
        texts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in settings.canary_prompts]
        self._prompts: list[list[int]] = [ids for ids in texts if len(ids) > 1]
        self._base = self._logprobs(None)

    def check(self, adapter: LoadedAdapter) -> float:
        """The largest change in nats of any canary token's log-prob.

        Raises:
            AdapterError: the change is too small, or a log-prob is not finite.
        """
        shift = 0.0
        for base, moved in zip(self._base, self._logprobs(adapter), strict=True):
            if not bool(moved.isfinite().all()):
                raise AdapterError("its log-probs of the canary prompts are not finite")
            shift = max(shift, float((moved - base).abs().max()))
        if self._prompts and shift < self._min_shift:
            raise AdapterError(
                f"it changes nothing: the canary prompts' log-probs moved by {shift:.2g} nats at most, "
                f"{self._min_shift:.2g} is asked (`engine.canary_min_shift`)"
            )
        return shift

    def check_as_trained(self, adapter: LoadedAdapter, rows: Sequence[Mapping[str, Any]]) -> float:
        """The mean distance, in nats a token, from what the adapter's training found of the texts in `rows`.

        Raises:
            AdapterError: the distance is too large: another adapter, base or scale than was trained.
        """
        if not rows:
            return 0.0
        scored = self._scheduler.call(lambda: [self._score(row["ids"], adapter) for row in rows])
        served = torch.cat(scored.result(CANARY_TIMEOUT_S)).tolist()
        return check_as_trained(served, [logprob for row in rows for logprob in row["logprobs"]], self._max_distance)

    def _logprobs(self, adapter: LoadedAdapter | None) -> list[torch.Tensor]:
        return self._scheduler.call(lambda: [self._score(ids, adapter) for ids in self._prompts]).result(
            CANARY_TIMEOUT_S
        )

    def _score(self, ids: list[int], adapter: LoadedAdapter | None) -> torch.Tensor:
        """Log-prob of each token after the first, float [tokens - 1]."""
        row = Generation(ids, SamplingParams(), AnswerText(lambda _: ""), adapter=adapter)
        logits_QV = self._scheduler.forward([row], self._scheduler.running, [ids], all_logits=True)[0].float()
        logprobs_QV = torch.log_softmax(logits_QV[:-1], dim=-1)
        return logprobs_QV.gather(1, torch.tensor(ids[1:], device=logits_QV.device).unsqueeze(1)).squeeze(1)
