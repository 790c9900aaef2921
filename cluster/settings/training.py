"""Training and sweeps (training.md)."""

from typing import Literal

from pydantic import Field, model_validator

from cluster.settings.base import Section


class LoraSettings(Section):
    """The shape of an adapter."""

    r: int = Field(16, ge=1, le=512)
    """Rank of the two low-rank matrices."""
    alpha: int = Field(32, ge=1)
    """The adapter's output is scaled by `alpha / r`."""
    dropout: float = Field(0.05, ge=0, lt=1)
    """Dropout on the adapter's input while training."""
    target_modules: tuple[str, ...] = Field(("q_proj", "k_proj", "v_proj", "o_proj"), min_length=1)
    """Names of the linear layers that get an adapter."""


class MethodSettings(Section):
    """Defaults of one method; every field can be set for a single run on the command line."""

    learning_rate: float = Field(gt=0, le=1)
    """Peak learning rate."""
    epochs: float = Field(gt=0, le=1000)
    """Passes over the training split."""
    beta: float | None = Field(None, gt=0)
    """KL coefficient; `None` where the method has none."""


class DpoSettings(MethodSettings):
    """DPO on pairs."""

    learning_rate: float = Field(5e-5, gt=0, le=1)
    epochs: float = Field(1.0, gt=0, le=1000)
    beta: float | None = Field(0.1, gt=0)
    sft_weight: float = Field(1.0, ge=0)
    """Weight of the SFT term on the chosen answers; 0 leaves it out, which is fragile and warned about."""


class KtoSettings(MethodSettings):
    """KTO on unpaired thumbs."""

    learning_rate: float = Field(5e-5, gt=0, le=1)
    epochs: float = Field(1.0, gt=0, le=1000)
    beta: float | None = Field(0.1, gt=0)
    desirable_weight: float = Field(1.0, gt=0)
    """Weight of the loss of liked answers."""
    undesirable_weight: float = Field(1.0, gt=0)
    """Weight of the loss of disliked answers."""


class SftSettings(MethodSettings):
    """SFT on good answers."""

    learning_rate: float = Field(2e-4, gt=0, le=1)
    epochs: float = Field(3.0, gt=0, le=1000)
    packing: bool = True
    """Put several short examples into one row where the attention kernel keeps them apart (flash
    attention on a GPU); elsewhere rows are padded."""


class HealthSettings(Section):
    """When a training is stopped, with the reason."""

    window_steps: int = Field(10, ge=2)
    """Trends are judged over this many logged steps."""
    swapped_accuracy: float = Field(0.1, ge=0, lt=0.5)
    """Share of training pairs whose chosen answer the trained model must prefer over what the base did…"""
    min_steps: int = Field(10, ge=1)
    """No trend is judged before this many steps."""
    swapped_similarity: float = Field(0.95, gt=0.5, le=1)
    """Pairs count as swapped when this share of those with a known liked answer has it as `rejected`."""
    collapse_nats_per_token: float = Field(2.0, gt=0)
    """Stop when the chosen answers lost this much log-likelihood a token against the start while the
    margin grew."""
    max_truncated_share: float = Field(0.05, ge=0, le=1)
    """Stop when more than this share of the examples does not fit `max_length`."""
    max_length_ratio: float = Field(2.0, gt=1)
    """Stop when sampled answers became this many times longer or shorter than the reference answers."""
    length_samples: int = Field(16, ge=0)
    """Validation prompts answered after each epoch to see length drift; 0 turns it off."""


class ToySettings(Section):
    """The offline base model that `rayloop train toy` trains from scratch."""

    hidden: int = Field(128, ge=8)
    """Width of the residual stream."""
    layers: int = Field(4, ge=1)
    heads: int = Field(4, ge=1)
    intermediate: int = Field(336, ge=8)
    """Width of the feed-forward layers."""
    vocab: int = Field(512, ge=300)
    """Size of the byte-level BPE vocabulary, special tokens included."""
    max_positions: int = Field(2048, ge=64)
    """Longest sequence in tokens."""
    epochs: float = Field(1.0, gt=0, le=1000)
    """Passes over the examples."""
    batch_size: int = Field(64, ge=1)
    """Examples in one step."""
    learning_rate: float = Field(2e-3, gt=0, le=1)
    """Peak of the cosine."""
    warmup_ratio: float = Field(0.05, ge=0, lt=1)
    """Share of the steps with a rising learning rate."""
    weight_decay: float = Field(0.01, ge=0)
    loss: Literal["answer", "all"] = "answer"
    """Tokens the loss is taken over: the assistant's answers, or everything."""
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _heads_divide_hidden(self) -> "ToySettings":
        if self.hidden % (2 * self.heads):
            raise ValueError("`hidden` must be divisible by twice the number of `heads`")
        return self


class TrainingSettings(Section):
    """Defaults of every training run."""

    toy: ToySettings = ToySettings()


class SweepSettings(Section):
    """Defaults of a sweep."""
