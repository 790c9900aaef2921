"""What a reward model is worth on held-out pairs: how often it is right, and whether its confidence is.

A score difference means a probability, that of the chosen answer being the better one: sigmoid(difference)
under Bradley and Terry's model. A calibrated model is right in 80 % of the pairs where it says 80 %. The
temperature that would make it so is fitted and kept with the model, for the grader to divide by.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import ArrayLike, NDArray

from train.examples import Encoder
from train.loss import bradley_terry_loss

BINS = 10
UNNAMED = "unnamed"
"""Category of answers that nobody put into one."""
TEMPERATURES = (0.05, 20.0)
"""Bounds of the fitted temperature."""


@dataclass(frozen=True)
class Bin:
    """Pairs about which a reward model is about equally sure."""

    confidence: float
    """Mean probability given to the answer with the higher score, 0.5 to 1."""
    accuracy: float
    """Share of these pairs in which that answer is the chosen one."""
    pairs: int


@dataclass(frozen=True)
class Calibration:
    """Measures on the validation pairs; `None` where there are none."""

    pair_accuracy: float | None = None
    """Share of pairs whose chosen answer has the higher score; a tie counts half."""
    loss: float | None = None
    """Bradley-Terry loss; ln 2 for a model that knows nothing."""
    calibration_error: float | None = None
    """Mean distance of confidence and accuracy over the bins, weighted by their pairs."""
    temperature: float | None = None
    """Score differences divided by this are calibrated best."""
    score_mean: float | None = None
    """Mean score of all answers."""
    pairs: int = 0
    bins: list[Bin] = field(default_factory=list)
    by_origin: dict[str, float] = field(default_factory=dict)
    """Accuracy on each origin of pairs (correction, same query, …)."""
    by_category: dict[str, float] = field(default_factory=dict)
    """Accuracy on each task category that reviewers named."""
    shift_nats_per_token: None = None

    def as_metrics(self) -> dict[str, float]:
        """The measures that exist, named for a report."""
        names = ("pair_accuracy", "loss", "calibration_error", "temperature", "score_mean", "pairs")
        found = {f"heldout/{name}": getattr(self, name) for name in names if getattr(self, name) is not None}
        found |= {f"heldout/pair_accuracy_on_{name}": value for name, value in self.by_origin.items()}
        return found | {f"heldout/pair_accuracy_in_{name}": value for name, value in self.by_category.items()}

    def write(self, folder: Path) -> None:
        """`calibration.json` and the plot `calibration.png`."""
        document = {**self.as_metrics(), "bins": [vars(one) for one in self.bins]}
        (folder / "calibration.json").write_text(json.dumps(document, indent=2) + "\n")
        _plot(self, folder / "calibration.png")


def calibrate(model: Any, encoder: Encoder, pairs: pa.Table) -> Calibration:
    """Score held-out pairs with a reward model and compare its confidence with its accuracy."""
    encoded = encoder.scored(pairs)
    if not encoded.rows:
        return Calibration()
    chosen_N = np.array(score_ids(model, [row["chosen_ids"] for row in encoded.rows]))
    rejected_N = np.array(score_ids(model, [row["rejected_ids"] for row in encoded.rows]))
    fitting = pairs.select(["origin", "category"]).take(encoded.kept)
    return measure_scores(chosen_N, rejected_N, *(fitting.column(name).to_pylist() for name in fitting.column_names))


def measure_scores(
    chosen_N: NDArray[np.float64],
    rejected_N: NDArray[np.float64],
    origins: Sequence[str] = (),
    categories: Sequence[str | None] = (),
) -> Calibration:
    """The measures of a list of pairs, from the two scores of each."""
    margins_N = chosen_N - rejected_N
    right_N = (margins_N > 0) + 0.5 * (margins_N == 0)
    bins = reliability(margins_N)
    accuracy, error, temperature = measure_margins(margins_N)
    return Calibration(
        pair_accuracy=accuracy,
        loss=float(bradley_terry_loss(torch.from_numpy(chosen_N), torch.from_numpy(rejected_N))),
        calibration_error=error,
        temperature=temperature,
        score_mean=float((chosen_N.mean() + rejected_N.mean()) / 2),
        pairs=len(margins_N),
        bins=bins,
        by_origin=_shares(right_N, origins),
        by_category=_shares(right_N, [category or UNNAMED for category in categories]) if any(categories) else {},
    )


def _shares(right_N: NDArray[np.float64], names: Sequence[str]) -> dict[str, float]:
    named = np.array(names)
    return {name: float(right_N[named == name].mean()) for name in sorted(set(names))}


def measure_margins(margins_N: ArrayLike) -> tuple[float, float, float]:
    """Accuracy (a tie counts half), calibration error and the temperature that fits, from the log odds of pairs."""
    found_N = np.asarray(margins_N, dtype=float)
    right_N = (found_N > 0) + 0.5 * (found_N == 0)
    error = sum(abs(b.confidence - b.accuracy) * b.pairs for b in reliability(found_N)) / len(found_N)
    return float(right_N.mean()), error, fit_temperature(found_N)


def reliability(margins_N: NDArray[np.float64]) -> list[Bin]:
    """Confidence and accuracy in ten bins of equal width; empty ones are left out."""
    confidence_N = 1 / (1 + np.exp(-np.abs(margins_N)))
    right_N = (margins_N > 0) + 0.5 * (margins_N == 0)
    place_N = np.minimum(((confidence_N - 0.5) * 2 * BINS).astype(int), BINS - 1)
    found = []
    for place in np.unique(place_N):
        here = place_N == place
        found.append(Bin(float(confidence_N[here].mean()), float(right_N[here].mean()), int(here.sum())))
    return found


def fit_temperature(margins_N: NDArray[np.float64]) -> float:
    """The temperature with the lowest Bradley-Terry loss, within bounds.

    Source: Guo et al. 2017, https://arxiv.org/abs/1706.04599, section 4.2
    """
    from scipy.optimize import minimize_scalar

    low, high = np.log(TEMPERATURES)
    found = minimize_scalar(
        lambda log_t: np.logaddexp(0, -margins_N / np.exp(log_t)).mean(), bounds=(low, high), method="bounded"
    )
    return float(np.exp(found.x))


def score_ids(model: Any, rows: Sequence[Sequence[int]]) -> list[float]:
    """Scores of conversations given as token ids, by a model with one score head."""
    return [score for (score,) in score_heads(model, rows)]


@torch.inference_mode()
def score_heads(model: Any, rows: Sequence[Sequence[int]], batch_size: int = 64) -> list[list[float]]:
    """The output of every head for conversations given as token ids."""
    was_training, pad = model.training, int(model.config.get_text_config().pad_token_id)
    model.eval()
    scores: list[list[float]] = [[]] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        longest = len(rows[batch[0]])
        ids_BT = torch.tensor([[*rows[i], *[pad] * (longest - len(rows[i]))] for i in batch], device=model.device)
        mask_BT = torch.tensor([[1] * len(rows[i]) + [0] * (longest - len(rows[i])) for i in batch])
        logits_BH = model(input_ids=ids_BT, attention_mask=mask_BT.to(model.device), use_cache=False).logits
        for index, value in zip(batch, logits_BH.float().tolist(), strict=True):
            scores[index] = value
    model.train(was_training)
    return scores


def _plot(found: Calibration, file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([0.5, 1], [0.5, 1], color="grey", linewidth=1, label="calibrated")
    sizes = [20 + 180 * b.pairs / max(found.pairs, 1) for b in found.bins]
    axes.scatter([b.confidence for b in found.bins], [b.accuracy for b in found.bins], s=sizes, label="held-out pairs")
    axes.set(
        xlabel="how sure the reward model is", ylabel="how often it is right", xlim=(0.48, 1.02), ylim=(-0.02, 1.02)
    )
    axes.legend(loc="upper left")
    figure.savefig(file, dpi=110)
