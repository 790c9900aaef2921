"""Our objectives against numbers worked out by hand and against TRL's trainers."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from train.config import TrainConfig
from train.loss import bradley_terry_loss, dpo_loss, kto_kl, kto_loss, sequence_logp, sft_loss


def test_sequence_logp_sums_the_masked_tokens_only() -> None:
    # two symbols, p(1) = sigmoid of the second logit minus the first
    logits_BTV = torch.tensor([[[0.0, math.log(3.0)], [0.0, 0.0], [0.0, math.log(9.0)]]])
    ids_BT, mask_BT = torch.tensor([[1, 1, 0]]), torch.tensor([[0, 1, 1]])
    assert sequence_logp(logits_BTV, ids_BT, mask_BT).tolist() == pytest.approx([math.log(3 / 4) + math.log(1 / 2)])


def test_dpo_loss_by_hand() -> None:
    # margins against the reference 2 and -1 nats, beta 0.5: logits 1 and -0.5
    expected = (math.log1p(math.exp(-1.0)) + math.log1p(math.exp(0.5))) / 2
    assert dpo_loss(torch.tensor([3.0, 0.0]), torch.tensor([1.0, 1.0]), 0.5).item() == pytest.approx(expected, abs=1e-6)


def test_dpo_loss_of_the_reference_itself_is_ln_2() -> None:
    margin_B = torch.tensor([0.7, -3.0])
    assert dpo_loss(margin_B, margin_B, 0.1).item() == pytest.approx(math.log(2), abs=1e-6)


def test_bradley_terry_loss_by_hand() -> None:
    # differences 2 and -0.5; sums 4 and 0.5, squared 16 and 0.25
    plain = (math.log1p(math.exp(-2.0)) + math.log1p(math.exp(0.5))) / 2
    chosen, rejected = torch.tensor([3.0, 0.0]), torch.tensor([1.0, 0.5])
    assert bradley_terry_loss(chosen, rejected).item() == pytest.approx(plain, abs=1e-6)
    assert bradley_terry_loss(chosen, rejected, 0.1).item() == pytest.approx(plain + 0.1 * 16.25 / 2, abs=1e-6)


def test_kto_loss_by_hand() -> None:
    # liked: ratio 2, disliked: ratio -1; kl 0.5, beta 0.2, weights 1.5 and 1
    liked, disliked = 1 / (1 + math.exp(-0.2 * 1.5)), 1 / (1 + math.exp(-0.2 * 1.5))
    expected = (1.5 * (1 - liked) + (1 - disliked)) / 2
    loss = kto_loss(torch.tensor([2.0, -1.0]), torch.tensor([True, False]), torch.tensor(0.5), 0.2, (1.5, 1.0))
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_kto_kl_is_never_negative() -> None:
    assert kto_kl(torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0])).item() == 0
    assert kto_kl(torch.tensor([-1.0, -1.0]), torch.tensor([-1.5, -1.5])).item() == pytest.approx(0.5)


@pytest.mark.parametrize(
    "call", [lambda b: dpo_loss(b, b[:1], 0.1), lambda b: dpo_loss(b, b, 0.0), lambda b: bradley_terry_loss(b, b[:1])]
)
def test_wrong_shapes_and_beta_are_refused(call: Callable[[torch.Tensor], Any]) -> None:
    with pytest.raises(ValueError, match=r"differ|beta"):
        call(torch.zeros(2))


@pytest.mark.parametrize("method", ["sft", "dpo", "kto", "reward"])
def test_losses_equal_those_of_trl_on_a_real_batch(method: str, config_of: Callable[..., TrainConfig]) -> None:
    """TRL's trainer computes the loss of one batch; ours is computed from the model's plain outputs."""
    from train.run import build_trainer, prepare

    trainer = build_trainer(prepare(config_of(method, precision="fp32", sft_weight=0.7, beta=0.3)), None)
    model = trainer.model.eval()
    _move_away_from_base(model)
    batch = next(iter(trainer.get_eval_dataloader()))
    with torch.no_grad():
        theirs = trainer.compute_loss(model, dict(batch)).item()
        ours = {"sft": _sft, "dpo": _dpo, "kto": _kto, "reward": _reward}[method](model, batch, trainer)
    assert ours == pytest.approx(theirs, abs=1e-6)


def _move_away_from_base(model: Any) -> None:
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)


def _sft(model: Any, batch: Any, trainer: Any) -> float:
    mask_BT = batch["labels"][:, 1:] != -100
    return sft_loss(_logps(model, batch["input_ids"], batch["attention_mask"]), mask_BT).item()


def _dpo(model: Any, batch: Any, trainer: Any) -> float:
    ids, attention, mask = batch["input_ids"], batch["attention_mask"], batch["completion_mask"]
    totals = []
    for context in (False, True):
        logps_BT = _logps(model, ids, attention, base=context)
        chosen, rejected = (logps_BT * mask[:, 1:]).sum(-1).chunk(2)
        totals.append(chosen - rejected)
    half = len(ids) // 2
    own = sft_loss(_logps(model, ids, attention)[:half], mask[:half, 1:])
    return (dpo_loss(totals[0], totals[1], 0.3) + 0.7 * own).item()


def _kto(model: Any, batch: Any, trainer: Any) -> float:
    def total(prefix: str, base: bool) -> torch.Tensor:
        logps_BT = _logps(model, batch[f"{prefix}input_ids"], batch[f"{prefix}attention_mask"], base=base)
        return (logps_BT * batch[f"{prefix}completion_mask"][:, 1:]).sum(-1)

    kl = kto_kl(total("KL_", False), total("KL_", True))
    weights = (trainer.desirable_weight, trainer.undesirable_weight)
    return kto_loss(total("", False) - total("", True), batch["label"].bool(), kl, 0.3, weights).item()


def _reward(model: Any, batch: Any, trainer: Any) -> float:
    scores = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.squeeze(-1)
    chosen, rejected = scores.chunk(2)
    return bradley_terry_loss(chosen, rejected, 0.01).item()


def _logps(model: Any, ids: torch.Tensor, attention: torch.Tensor, *, base: bool = False) -> torch.Tensor:
    from contextlib import nullcontext

    with model.disable_adapter() if base else nullcontext():
        logits_BTV = model(input_ids=ids, attention_mask=attention).logits
    logps_BTV = torch.log_softmax(logits_BTV[:, :-1], -1)
    return logps_BTV.gather(-1, ids[:, 1:, None]).squeeze(-1)
