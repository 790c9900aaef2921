"""The objectives as short pure functions: what the trainers minimise, and what reports are made of.

TRL's trainers compute the gradients; tests hold these functions against theirs and against numbers
worked out by hand. Log-probabilities are natural, in nats. Letters: B examples, T tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

SPREAD_FLOOR = 1e-4  # keeps the advantages of a group without spread finite


def sequence_logp(logits_BTV: Tensor, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Sum of log p(token | what came before) over the masked tokens; float [B].

    `logits_BTV` are a model's outputs for `ids_BT`: position t predicts token t + 1.
    """
    logps_BTV = torch.log_softmax(logits_BTV[:, :-1].float(), dim=-1)
    logps_BT = logps_BTV.gather(-1, ids_BT[:, 1:, None]).squeeze(-1)
    return (logps_BT * mask_BT[:, 1:]).sum(-1)


def sft_loss(logps_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean negative log-likelihood of the masked tokens, over the whole batch."""
    return -(logps_BT * mask_BT).sum() / mask_BT.sum().clamp(min=1)


def dpo_loss(policy_margin_B: Tensor, reference_margin_B: Tensor, beta: float) -> Tensor:
    """Mean DPO loss over a batch of preference pairs.

    Both margins are float [B]: log p(chosen) - log p(rejected), in nats.

    Raises:
        ValueError: the shapes differ, or `beta` is not positive.
    Source: Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, equation 7
    """
    if policy_margin_B.shape != reference_margin_B.shape:
        raise ValueError(f"margins differ in shape: {policy_margin_B.shape} and {reference_margin_B.shape}")
    if beta <= 0:
        raise ValueError(f"beta={beta} must be > 0")
    return -F.logsigmoid(beta * (policy_margin_B - reference_margin_B)).mean()


def bradley_terry_loss(chosen_B: Tensor, rejected_B: Tensor, center_weight: float = 0.0) -> Tensor:
    """Mean negative log-likelihood that the chosen answer beats the rejected one, from their scores.

    `center_weight` adds the mean squared sum of the two scores, which holds them near 0.

    Raises:
        ValueError: the shapes differ.
    Source: Bradley and Terry 1952, https://doi.org/10.2307/2334029; the second term: Eisenstein et al.
    2023, https://arxiv.org/abs/2312.09244, section 2
    """
    if chosen_B.shape != rejected_B.shape:
        raise ValueError(f"scores differ in shape: {chosen_B.shape} and {rejected_B.shape}")
    centred = (chosen_B + rejected_B).square().mean()
    return -F.logsigmoid(chosen_B - rejected_B).mean() + center_weight * centred


def group_advantages(rewards_PG: Tensor, *, by_spread: bool = True) -> Tensor:
    """How much better each of the G answers to each of the P prompts is than its group; float [P, G].

    `nan` marks an answer the grader abstained on: it counts in no mean and its advantage is 0.

    Source: Shao et al. 2024, https://arxiv.org/abs/2402.03300, section 4.1.2
    """
    mean_P1 = rewards_PG.nanmean(1, keepdim=True)
    centred_PG = rewards_PG - mean_P1
    if by_spread:
        count_P1 = (~rewards_PG.isnan()).sum(1, keepdim=True)
        variance_P1 = centred_PG.square().nansum(1, keepdim=True) / (count_P1 - 1).clamp(min=1)
        centred_PG = centred_PG / (variance_P1.sqrt() + SPREAD_FLOOR)
    return centred_PG.nan_to_num(0.0)


def kto_kl(policy_mismatched_B: Tensor, reference_mismatched_B: Tensor) -> Tensor:
    """KTO's estimate of KL(policy || reference) from answers paired with other prompts; never negative.

    Source: Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306, section 4.2
    """
    return (policy_mismatched_B - reference_mismatched_B).mean().clamp(min=0).detach()


def kto_loss(
    log_ratio_B: Tensor, liked_B: Tensor, kl: Tensor, beta: float, weights: tuple[float, float] = (1.0, 1.0)
) -> Tensor:
    """Mean KTO loss over thumbs.

    `log_ratio_B` is log p_policy(answer) - log p_reference(answer); `liked_B` is bool; `weights` are
    those of liked and of disliked answers.

    Raises:
        ValueError: the shapes differ, or `beta` is not positive.
    Source: Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306, equation 8
    """
    if log_ratio_B.shape != liked_B.shape:
        raise ValueError(f"log ratios and labels differ in shape: {log_ratio_B.shape} and {liked_B.shape}")
    if beta <= 0:
        raise ValueError(f"beta={beta} must be > 0")
    sign_B = torch.where(liked_B, 1.0, -1.0)
    weight_B = torch.where(liked_B, weights[0], weights[1])
    return (weight_B * (1 - torch.sigmoid(beta * sign_B * (log_ratio_B - kl)))).mean()
