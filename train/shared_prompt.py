"""DPO that reads the prompt of a pair once (optional: `training.dpo.shared_prompt`).

TRL runs a pair as two rows, prompt and chosen, prompt and rejected, and on a CPU scores every position against
the vocabulary. Here one row holds prompt, chosen and rejected; the rejected answer sees the prompt and itself,
takes its positions after the prompt, and only positions that predict a token of an answer reach the head. Both
give the same log-probabilities and, since the prompt's states are the same in both, the same gradients. What is
made of them, loss and metrics, stays TRL's: `SharedPrompt` stands where TRL calls the model and answers in
TRL's layout.

Letters: B pairs, R = 2B rows of TRL's (chosen, then rejected), T tokens of such a row, L tokens of a shared row,
N predicted tokens, D hidden, V vocabulary.
"""

import functools
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Sampler
from transformers.utils import ModelOutput

from cluster.errors import InputError

IGNORED = -100
CHUNK = 1 << 26  # logits that are kept for the backward pass at once; beyond it they are computed again
TOLERANCES = {"fp32": 1e-3, "bf16": 0.1, "fp16": 0.05}
"""Nats a token by which both ways may differ; a model that cannot share prompts differs by whole nats."""
MEGABATCH = 50  # batches that are sorted by length together, as in transformers' LengthGroupedSampler


@dataclass
class Scored(ModelOutput):  # type: ignore[misc]  # transformers is untyped here
    """What the head says of each predicted token; float, `is_top1` bool."""

    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None


@dataclass(frozen=True)
class Shared:
    """A batch of pairs, one row a pair."""

    ids_BL: Tensor
    positions_BL: Tensor
    visible_BLL: Tensor
    """bool: query l may look at key m."""
    answers_N3: Tensor
    """Row, place whose output predicts the token, and the token."""
    rows_N: Tensor
    columns_N: Tensor
    """Where the N tokens stand in TRL's [R, T - 1] outputs."""


def share_prompts(ids_RT: Tensor, attention_RT: Tensor, labels_RT: Tensor) -> Shared:
    """TRL's rows of chosen and of rejected answers as one row a pair; both rows of a pair start with one prompt."""
    pairs = len(ids_RT) // 2
    answer_R = (labels_RT != IGNORED).sum(1)
    prompt_B = (attention_RT.sum(1) - answer_R)[:pairs]
    chosen_B, rejected_B = (answer_R - 1).clamp(min=0).chunk(2)  # nothing is predicted from the last token
    place_L = torch.arange(int((prompt_B + chosen_B + rejected_B).max()), device=ids_RT.device)
    in_rejected_BL = place_L >= (prompt_B + chosen_B)[:, None]
    in_chosen_BL = (place_L >= prompt_B[:, None]) & ~in_rejected_BL
    positions_BL = place_L - chosen_B[:, None] * in_rejected_BL
    positions_BL = positions_BL.clamp(max=ids_RT.shape[1] - 1)  # padding only
    chosen_BL, rejected_BL = (half.gather(1, positions_BL) for half in ids_RT.chunk(2))
    causal_LL = place_L[:, None] >= place_L
    rows_N, columns_N = (labels_RT[:, 1:] != IGNORED).nonzero(as_tuple=True)
    pair_N = rows_N % pairs
    shifted_N = (rows_N >= pairs) & (columns_N >= prompt_B[pair_N])
    place_N = columns_N + chosen_B[pair_N] * shifted_N
    return Shared(
        ids_BL=torch.where(in_rejected_BL, rejected_BL, chosen_BL),
        positions_BL=positions_BL,
        visible_BLL=causal_LL & ~(in_rejected_BL[:, :, None] & in_chosen_BL[:, None, :]),
        answers_N3=torch.stack([pair_N, place_N, labels_RT[rows_N, columns_N + 1]], 1),
        rows_N=rows_N,
        columns_N=columns_N,
    )


class SharedPrompt:
    """Stands for the model where TRL calls it with pairs in two rows each."""

    def __init__(self, model: Any, attention: str) -> None:
        self.model, self.attention = model, attention

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, **_: Any) -> Scored:
        """The outputs that TRL's head gives, [R, T - 1], 0 where nothing is predicted."""
        shared = share_prompts(input_ids, attention_mask, labels)
        found = self.model(
            input_ids=shared.ids_BL,
            attention_mask=self._mask(shared.visible_BLL),
            position_ids=shared.positions_BL,
            answers=shared.answers_N3,
        )
        shape = (len(input_ids), input_ids.shape[1] - 1)
        where = (shared.rows_N, shared.columns_N)
        return Scored(**{name: value_N.new_zeros(shape).index_put(where, value_N) for name, value_N in found.items()})

    def _mask(self, visible_BLL: Tensor) -> Tensor:
        """What the attention adds to its scores, or for the fused kernel what it may look at; [B, 1, L, L]."""
        visible_B1LL = visible_BLL[:, None]
        if self.attention == "sdpa":
            return visible_B1LL
        blocked = torch.finfo(torch.float32).min
        return torch.zeros(visible_B1LL.shape, device=visible_BLL.device).masked_fill_(~visible_B1LL, blocked)


def add_answer_head(model: Any) -> None:
    """Give a causal language model a forward pass that scores the tokens in `answers` (int64 [N, 3]) alone.

    It goes through `forward`, so PEFT, autocast and DDP around the model see it as any other pass.
    """
    original = model.forward

    @functools.wraps(type(model).forward)  # `generate` looks at the signature
    def forward(self: Any, *args: Any, answers: Tensor | None = None, **kwargs: Any) -> Any:
        if answers is None:
            return original(*args, **kwargs)
        hidden_BLD = self.base_model(*args, use_cache=False, **kwargs).last_hidden_state
        row_N, place_N, token_N = answers.unbind(1)
        return _score(self.get_output_embeddings(), hidden_BLD[row_N, place_N], token_N)

    model.forward = types.MethodType(forward, model)


def _score(head: Any, hidden_ND: Tensor, token_N: Tensor) -> Scored:
    size = max(1, CHUNK // head.weight.shape[0])
    if len(token_N) <= size:
        return Scored(*_score_chunk(head, hidden_ND, token_N))
    parts = [
        checkpoint(_score_chunk, head, *chunk, use_reentrant=False)
        for chunk in zip(torch.split(hidden_ND, size), torch.split(token_N, size), strict=True)
    ]
    return Scored(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def _score_chunk(head: Any, hidden_ND: Tensor, token_N: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits_NV = head(hidden_ND).float()
    normaliser_N = logits_NV.logsumexp(-1)
    logps_N = logits_NV.gather(-1, token_N[:, None]).squeeze(-1) - normaliser_N
    with torch.no_grad():
        probabilities_NV = (logits_NV - normaliser_N[:, None]).exp_()
        entropy_N = normaliser_N - (probabilities_NV * logits_NV).sum(-1)
        return logps_N, entropy_N, logits_NV.mean(-1), logits_NV.argmax(-1) == token_N


def check_equal(shared: Sequence[Tensor], apart: Sequence[Tensor], tokens: Tensor, precision: str) -> None:
    """Refuse a model for which both ways differ: one with windows in its attention, say, or scaled logits.

    Raises:
        InputError: log-probabilities (float [B], of chosen and of rejected) differ by more than rounding.
    """
    difference = (torch.cat(list(shared)) - torch.cat(list(apart))).abs() / tokens.clamp(min=1)
    if difference.max() > TOLERANCES[precision]:
        raise InputError(
            "training.dpo.shared_prompt",
            True,
            f"changes this model's log-probabilities (by {difference.max():.2g} nats a token): its attention is not "
            "the plain causal one",
            "set it to false",
        )


class ByLength(Sampler[int]):
    """Rows in random order, but of similar length within a batch; the same for each seed and epoch.

    Rows are shuffled, each stretch of `MEGABATCH` batches is sorted by length, and the batches are shuffled again.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer, also when it resumes."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        span = MEGABATCH * self.batch_size
        rows: list[int] = []
        for start in range(0, len(order), span):
            rows += sorted(order[start : start + span], key=lambda row: -self.lengths[row])
        batches = [rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)]
        last = batches.pop() if batches and len(batches[-1]) < self.batch_size else []
        for index in torch.randperm(len(batches), generator=generator).tolist():
            yield from batches[index]
        yield from last
