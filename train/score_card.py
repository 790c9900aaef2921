"""A reward model that learns reviewers' score cards: four heads, each a number in [0, 1].

Each head is a regression on a share, fitted by the cross-entropy of its sigmoid with the score, whose minimum is
the mean score; a card that leaves a head out teaches the others. One reward is made of the four by weights.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from cluster.settings.training import HeadWeights
from train.calibration import UNNAMED, score_heads
from train.examples import HEADS

WEIGHTS_KEY = "score_card_weights"
"""Where the header of an adapter's weights keeps them, so that its digest covers them."""
BINS = 10
PASSED = 0.5  # a score above it counts as good


def score_card_loss(logits_BH: Tensor, scores_BH: Tensor, weights_H: Tensor) -> Tensor:
    """Mean cross-entropy of sigmoid(logits) with the scores that there are, each head by its weight.

    `scores_BH` are in [0, 1], `nan` where a reviewer gave none.

    Source: Papke and Wooldridge 1996, https://doi.org/10.1002/(SICI)1099-1255(199611)11:6<619::AID-JAE418>3.0.CO;2-1
    """
    given_BH = ~scores_BH.isnan()
    loss_BH = F.binary_cross_entropy_with_logits(logits_BH.float(), scores_BH.nan_to_num(0.0), reduction="none")
    weight_BH = weights_H * given_BH
    return (loss_BH * weight_BH).sum() / weight_BH.sum().clamp(min=1e-9)


def one_reward(logits: Sequence[float], weights: Mapping[str, float]) -> float:
    """The weighted mean of the four scores, as a logit: its sigmoid is the reward."""
    chances = 1 / (1 + np.exp(-np.asarray(logits, dtype=np.float64)))
    shares = np.array([weights[head] for head in HEADS])
    mean = float(np.clip((chances * shares).sum() / shares.sum(), 1e-9, 1 - 1e-9))
    return float(np.log(mean / (1 - mean)))


@dataclass(frozen=True)
class HeadReport:
    """One head on held-out cards."""

    mean_error: float
    """Mean absolute difference from the reviewers' score."""
    accuracy: float
    """Share of cards on the right side of one half."""
    calibration_error: float
    """Mean distance between predicted and given score over ten bins of the prediction, by their cards."""
    cards: int
    bins: list[tuple[float, float, int]]
    """Mean prediction, mean score, cards."""


@dataclass(frozen=True)
class CardReport:
    """What four heads are worth on held-out cards; empty where there are none."""

    heads: dict[str, HeadReport] = field(default_factory=dict)
    by_category: dict[str, dict[str, float]] = field(default_factory=dict)
    """Accuracy of each head on each task category."""
    shift_nats_per_token: None = None

    def as_metrics(self) -> dict[str, float]:
        """The measures, named for a report."""
        found = {
            f"heldout/{head}_{name}": getattr(report, name)
            for head, report in self.heads.items()
            for name in ("mean_error", "accuracy", "calibration_error", "cards")
        }
        rows = [(head, category, share) for category, of in self.by_category.items() for head, share in of.items()]
        return found | {f"heldout/{head}_accuracy_on_{category}": share for head, category, share in rows}

    def write(self, folder: Path) -> None:
        """`calibration.json` and the plot `calibration.png`."""
        document = {
            "heads": {head: vars(report) for head, report in self.heads.items()},
            "accuracy_by_category": self.by_category,
        }
        (folder / "calibration.json").write_text(json.dumps(document, indent=2) + "\n")
        _plot(self, folder / "calibration.png")


def report_on_cards(model: Any, rows: Sequence[Mapping[str, Any]]) -> CardReport:
    """Score encoded held-out rows and compare with their cards."""
    if not rows:
        return CardReport()
    logits_NH = np.array(score_heads(model, [row["input_ids"] for row in rows]))
    scores_NH = np.array([row["labels"] for row in rows], dtype=np.float64)
    return measure_cards(1 / (1 + np.exp(-logits_NH)), scores_NH, [row["category"] for row in rows])


def measure_cards(
    predicted_NH: NDArray[np.float64], scores_NH: NDArray[np.float64], categories: Sequence[str | None]
) -> CardReport:
    """The measures, from predicted and given scores (`nan` where none was given)."""
    named_N = np.array([category or UNNAMED for category in categories])
    right_NH = (predicted_NH > PASSED) == (scores_NH > PASSED)
    heads: dict[str, HeadReport] = {}
    by_category: dict[str, dict[str, float]] = {}
    for place, head in enumerate(HEADS):
        given_N = ~np.isnan(scores_NH[:, place])
        if not given_N.any():
            continue
        heads[head] = _head_report(predicted_NH[given_N, place], scores_NH[given_N, place])
        for category in np.unique(named_N[given_N]):
            share = right_NH[given_N & (named_N == category), place].mean()
            by_category.setdefault(str(category), {})[head] = float(share)
    return CardReport(heads, by_category)


def _head_report(predicted_N: NDArray[np.float64], scores_N: NDArray[np.float64]) -> HeadReport:
    place_N = np.minimum((predicted_N * BINS).astype(int), BINS - 1)
    inside = [place_N == place for place in np.unique(place_N)]
    bins = [(float(predicted_N[here].mean()), float(scores_N[here].mean()), int(here.sum())) for here in inside]
    return HeadReport(
        mean_error=float(np.abs(predicted_N - scores_N).mean()),
        accuracy=float(((predicted_N > PASSED) == (scores_N > PASSED)).mean()),
        calibration_error=sum(abs(p - s) * n for p, s, n in bins) / len(predicted_N),
        cards=len(predicted_N),
        bins=bins,
    )


def _plot(found: CardReport, file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="grey", linewidth=1, label="calibrated")
    for head, report in found.heads.items():
        axes.plot([b[0] for b in report.bins], [b[1] for b in report.bins], marker="o", linewidth=1, label=head)
    axes.set(xlabel="predicted score", ylabel="reviewers' mean score", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axes.legend(loc="upper left")
    figure.savefig(file, dpi=110)


def weights_tensor(weights: HeadWeights) -> Tensor:
    """float [H]."""
    return torch.tensor([getattr(weights, head) for head in HEADS])


class CardCollator:
    """Rows of `input_ids` and `labels` as tensors, padded on the right."""

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """int64 [B, T] ids and mask, float [B, H] scores."""
        longest = max(len(row["input_ids"]) for row in rows)
        padded = [(list(row["input_ids"]), longest - len(row["input_ids"])) for row in rows]
        return {
            "input_ids": torch.tensor([ids + [self.pad] * missing for ids, missing in padded]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * missing for ids, missing in padded]),
            "labels": torch.tensor([row["labels"] for row in rows], dtype=torch.float32),
        }
