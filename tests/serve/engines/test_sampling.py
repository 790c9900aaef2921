"""What is added to logits before a token is chosen; expected values by hand."""

import pytest
import torch

from serve.engines.generation import Generation, SamplingParams
from serve.engines.sampling import sample

LOGITS = [2.0, 1.5, 1.0, -3.0]


class NoText:
    """Nobody reads it."""


def row(tokens: list[int], **params: object) -> Generation:
    chosen = SamplingParams(temperature=0.0, logprobs=True, **params)  # type: ignore[arg-type]
    return Generation([0], chosen, NoText(), tokens=tokens)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tokens", "params", "token"),
    [
        ([0, 0], {}, 0),
        ([0, 0], {"presence_penalty": 0.4}, 0),  # 1.6 against 1.5
        ([0, 0], {"presence_penalty": 0.6}, 1),  # 1.4
        ([0, 0], {"frequency_penalty": 0.2}, 0),  # 1.6
        ([0, 0], {"frequency_penalty": 0.3}, 1),  # 1.4
        ([0, 1, 1], {"frequency_penalty": 0.3, "presence_penalty": 0.5}, 0),  # 1.2, 0.4, 1.0
        ([2], {"presence_penalty": -1.5}, 2),  # rewarded: 2.5
        ([], {"logit_bias": ((3, 5.5),)}, 3),  # 2.5
        ([], {"logit_bias": ((0, -100.0),)}, 1),
    ],
)
def test_penalties_and_biases_change_the_choice_and_not_the_log_probability(
    tokens: list[int], params: dict[str, object], token: int
) -> None:
    logits_BV = torch.tensor([LOGITS, LOGITS])
    steered, plain = sample(logits_BV, [row(tokens, **params), row(tokens)]).tokens, 0
    assert steered == [token, plain]
    known = sample(logits_BV, [row(tokens, **params), row(tokens)]).logprobs[0]
    assert known is not None
    assert known.logprob == pytest.approx(float(torch.log_softmax(torch.tensor(LOGITS), -1)[token]))
