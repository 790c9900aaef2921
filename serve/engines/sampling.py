"""Choosing the next token of every row at once.

Each row draws from its own random numbers, one a token, so a seeded answer does not depend on which
other answers share its batch (but for the last digits of the logits).

Shape letters: B rows, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from serve.engines.generation import Generation, TokenLogprob


@dataclass(frozen=True)
class Sampled:
    """One token a row; `None` where the logits were not finite."""

    tokens: list[int | None]
    logprobs: list[TokenLogprob | None]


def sample(logits_BV: Tensor, rows: Sequence[Generation]) -> Sampled:
    """The next token of each row and, where asked for, its log-prob before all that steers the choice."""
    logits_BV = logits_BV.float()
    normaliser_B = torch.logsumexp(logits_BV, dim=-1)
    allowed_BV = _steered(logits_BV, rows)
    chosen_B = allowed_BV.argmax(dim=-1)
    drawing = [i for i, row in enumerate(rows) if row.params.temperature > 0]
    if drawing:
        everyone = len(drawing) == len(rows)
        drawn = _draw(allowed_BV if everyone else allowed_BV[drawing], [rows[i] for i in drawing])
        chosen_B = drawn if everyone else chosen_B.index_copy(0, torch.tensor(drawing, device=drawn.device), drawn)
    finite = torch.isfinite(normaliser_B).tolist()
    tokens = chosen_B.tolist()
    return Sampled(
        [token if ok else None for token, ok in zip(tokens, finite, strict=True)],
        _logprobs(logits_BV, normaliser_B, chosen_B, rows),
    )


def _steered(logits_BV: Tensor, rows: Sequence[Generation]) -> Tensor:
    """The logits with biases and penalties, and with what rows must not write set to minus infinity."""
    if not any(row.constraint is not None or row.params.is_biased for row in rows):
        return logits_BV
    steered_BV = logits_BV.clone()
    for number, row in enumerate(rows):
        if row.params.is_biased:
            steered_BV[number] += _bias(row, logits_BV.shape[1]).to(logits_BV.device)
        if row.constraint is not None:
            steered_BV[number].masked_fill_(row.constraint.forbidden().to(logits_BV.device), -torch.inf)
    return steered_BV


def _bias(row: Generation, vocabulary: int) -> Tensor:
    """What is added to a row's logits, float [V]: `logit_bias`, less the penalties on tokens its answer has.

    Source: https://developers.openai.com/api/docs/guides/completions (frequency and presence penalties)
    """
    params, bias_V = row.params, torch.zeros(vocabulary)
    for token_id, value in params.logit_bias:
        bias_V[token_id] += value
    count_V = torch.bincount(torch.tensor(row.tokens, dtype=torch.long), minlength=vocabulary)
    return bias_V - params.frequency_penalty * count_V - params.presence_penalty * (count_V > 0)


def _draw(logits_BV: Tensor, rows: Sequence[Generation]) -> Tensor:
    """Invert the cumulative distribution at one uniform number a row."""
    device = logits_BV.device
    temperature_B1 = torch.tensor([row.params.temperature for row in rows], device=device).unsqueeze(1)
    probabilities_BV = torch.softmax(logits_BV / temperature_B1, dim=-1).nan_to_num(0.0)
    if any(row.params.top_p < 1 for row in rows):
        probabilities_BV = _keep_top_p(
            probabilities_BV, torch.tensor([row.params.top_p for row in rows], device=device)
        )
    cumulative_BV = probabilities_BV.cumsum(dim=-1)
    uniform_B1 = torch.tensor([row.draws.random() for row in rows], device=device).unsqueeze(1)
    target_B1 = uniform_B1 * cumulative_BV[:, -1:]  # the sum is not exactly one
    token_B = torch.searchsorted(cumulative_BV, target_B1, right=True).squeeze(1)
    # Rounding can put the target on the very end; the last token with any probability is meant then.
    last_B = logits_BV.shape[1] - 1 - probabilities_BV.gt(0).flip(-1).int().argmax(dim=-1)
    return torch.minimum(token_B, last_B)


def _keep_top_p(probabilities_BV: Tensor, top_p_B: Tensor) -> Tensor:
    """Zero the tokens beyond the smallest set whose probability reaches `top_p`.

    Source: Holtzman et al. 2020, https://arxiv.org/abs/1904.09751
    """
    ordered_BV, order_BV = probabilities_BV.sort(dim=-1, descending=True)
    before_BV = ordered_BV.cumsum(dim=-1) - ordered_BV
    ordered_BV = ordered_BV.masked_fill(before_BV >= top_p_B.unsqueeze(1), 0.0)
    return torch.zeros_like(probabilities_BV).scatter_(1, order_BV, ordered_BV)


def _logprobs(
    logits_BV: Tensor, normaliser_B: Tensor, chosen_B: Tensor, rows: Sequence[Generation]
) -> list[TokenLogprob | None]:
    if not any(row.params.logprobs for row in rows):
        return [None] * len(rows)
    values = (logits_BV.gather(1, chosen_B.unsqueeze(1)).squeeze(1) - normaliser_B).tolist()
    most = max(row.params.top_logprobs for row in rows)
    if most:
        top_BK, ids_BK = logits_BV.topk(min(most, logits_BV.shape[1]), dim=-1)
        tops, ids = (top_BK - normaliser_B.unsqueeze(1)).tolist(), ids_BK.tolist()
    answers: list[TokenLogprob | None] = []
    for i, row in enumerate(rows):
        if not row.params.logprobs:
            answers.append(None)
            continue
        count = row.params.top_logprobs
        answers.append(
            TokenLogprob(values[i], tuple(zip(ids[i][:count], tops[i][:count], strict=True)) if count else ())
        )
    return answers
