"""How a trained adapter does on held-out feedback, in numbers that compare between methods.

DPO and KTO are reported beside SFT on the same feedback, so the measures are the same for all: how likely
the adapter finds answers people liked, how often it prefers the better of two answers more than its base
did, and how far it has moved from its base.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa
import torch

from data.template import render
from train.config import TrainConfig
from train.episodes import Player
from train.examples import Encoder, Row
from train.generate import Sampling, SequenceLogprob, decode, end_tokens, score
from train.loss import dpo_loss
from train.rewards import answer_grader, mean_reward

Pair = tuple[list[int], list[int]]


@dataclass(frozen=True)
class HeldOut:
    """Measures on the validation split; `None` where it holds no such examples."""

    liked_nats_per_token: float | None = None
    """Negative log-likelihood of liked answers; lower is better."""
    base_liked_nats_per_token: float | None = None
    pair_accuracy: float | None = None
    """Share of pairs whose chosen answer gained more than the rejected one against the base."""
    pair_dpo_loss: float | None = None
    """DPO loss at beta 0.1, ln 2 for the base itself."""
    kl_to_base: float | None = None
    """Nats a token on the adapter's own sampled answers: an estimate of KL(adapter || base)."""
    shift_nats_per_token: float | None = None
    """Mean absolute change of the log-probability of held-out answers; 0 for a no-op."""
    reward: float | None = None
    """GRPO: mean reward of greedy answers to held-out prompts."""
    base_reward: float | None = None
    examples: int = 0

    def as_metrics(self) -> dict[str, float]:
        """The measures that exist, named for a report."""
        return {f"heldout/{name}": value for name, value in asdict(self).items() if value is not None}


Base = Callable[[], AbstractContextManager[Any]]
"""Gives, for a block, the base that a trained model is compared with."""


def held_out_report(
    model: Any,
    base: Base,
    encoder: Encoder,
    liked: pa.Table,
    pairs: pa.Table,
    *,
    limit: int,
    max_new_tokens: int,
    seed: int,
) -> HeldOut:
    """Compare a trained model with its base on up to `limit` validation examples of each kind."""
    was_training = model.training
    model.eval()
    try:
        liked_rows = _liked_pairs(encoder, liked.slice(0, limit))
        pair_rows = encoder.preference(pairs.slice(0, limit)).rows
        chosen = [(row["prompt_ids"], row["chosen_ids"]) for row in pair_rows]
        rejected = [(row["prompt_ids"], row["rejected_ids"]) for row in pair_rows]
        everything = liked_rows + chosen + rejected
        if not everything:
            return HeldOut()
        after = score(model, everything)
        with base() as start:
            before = score(start, everything)
        prompts = [prompt for prompt, _ in (liked_rows or chosen)]
        kl = estimate_kl(model, base, encoder.tokenizer, prompts, max_new_tokens, seed)
        return _summary(before, after, len(liked_rows), len(pair_rows), kl)
    finally:
        model.train(was_training)


def _summary(
    before: Sequence[SequenceLogprob], after: Sequence[SequenceLogprob], liked: int, pairs: int, kl: float | None
) -> HeldOut:
    shift = sum(abs(a.total - b.total) for a, b in zip(after, before, strict=True)) / sum(a.tokens for a in after)
    gains = [a.total - b.total for a, b in zip(after, before, strict=True)]
    margin_B = torch.tensor(gains[liked : liked + pairs]) - torch.tensor(gains[liked + pairs :])
    return HeldOut(
        liked_nats_per_token=_nats(after[:liked]) if liked else None,
        base_liked_nats_per_token=_nats(before[:liked]) if liked else None,
        pair_accuracy=float((margin_B > 0).float().mean()) if pairs else None,
        pair_dpo_loss=float(dpo_loss(margin_B, torch.zeros_like(margin_B), 0.1)) if pairs else None,
        kl_to_base=kl,
        shift_nats_per_token=shift,
        examples=liked + pairs,
    )


def estimate_kl(
    model: Any, base: Base, tokenizer: Any, prompts: Sequence[list[int]], max_new_tokens: int, seed: int
) -> float | None:
    """Mean over tokens of log p(model) - log p(base) on answers sampled from the model."""
    sampling = Sampling(max_new_tokens, temperature=1.0, seed=seed, batch_size=64)
    answers = decode(model, prompts, end_tokens(model, tokenizer), sampling)
    pairs = [(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True) if answer]
    if not pairs:
        return None
    after = score(model, pairs)
    with base() as start:
        before = score(start, pairs)
    tokens = sum(row.tokens for row in after)
    return sum(a.total - b.total for a, b in zip(after, before, strict=True)) / tokens


def greedy_lengths(model: Any, tokenizer: Any, prompts: Sequence[list[int]], max_new_tokens: int) -> float:
    """Mean number of tokens of greedy answers."""
    was_training = model.training
    model.eval()
    answers = decode(model, prompts, end_tokens(model, tokenizer), Sampling(max_new_tokens, batch_size=64))
    model.train(was_training)
    return sum(len(answer) for answer in answers) / max(len(answers), 1)


def validation_prompts(encoder: Encoder, table: pa.Table, limit: int) -> list[list[int]]:
    """Prompt ids of the first validation examples of any kind."""
    prompts = []
    for row in table.slice(0, limit).to_pylist():
        messages = json.loads(row["prompt"]) if "prompt" in row else json.loads(row["messages"])[:-1]
        tools = json.loads(row["tools"]) if row.get("tools") else None
        ids = render(encoder.tokenizer, messages, tools, add_generation_prompt=True)
        if len(ids) < encoder.max_length:
            prompts.append(ids)
    return prompts


def graded_report(
    report: HeldOut, model: Any, base: Base, tokenizer: Any, rows: Sequence[Row], config: TrainConfig
) -> HeldOut:
    """`report` with the mean reward of greedy answers to held-out prompts, before and after."""
    if not rows:
        return report
    grade = answer_grader(config.grader, config.reward_model)
    items, prompts = [row["item"] for row in rows], [row["prompt"] for row in rows]
    sampling = Sampling(config.max_completion_tokens, batch_size=64)

    def reward(answering: Any) -> float | None:
        answering.eval()
        if config.plays_episodes:
            player = Player(tokenizer, config.tools, config.max_completion_tokens)
            return mean_reward(grade(items, [e.sample() for e in player.play(answering, prompts, sampling)]))
        ids = [json.loads(prompt) for prompt in prompts]
        answers = decode(answering, ids, end_tokens(answering, tokenizer), sampling)
        texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
        return mean_reward(grade(items, [{"output_text": text} for text in texts]))

    after = reward(model)
    with base() as start:
        return replace(report, reward=after, base_reward=reward(start))


def _liked_pairs(encoder: Encoder, table: pa.Table) -> list[Pair]:
    rows = Encoder(encoder.tokenizer, encoder.max_length).sft(table).rows
    pairs = []
    for row in rows:
        start = next(i for i, label in enumerate(row["labels"]) if label != -100)
        pairs.append((row["input_ids"][:start], row["input_ids"][start:]))
    return pairs


def _nats(rows: Sequence[SequenceLogprob]) -> float:
    return -sum(row.total for row in rows) / sum(row.tokens for row in rows)
