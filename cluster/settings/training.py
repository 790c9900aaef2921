"""Training and sweeps (training.md)."""

from typing import Any, Literal

from pydantic import Field, model_validator

from cluster.settings.base import Section


class LoraSettings(Section):
    """The shape of an adapter."""

    r: int = Field(16, ge=1, le=512)
    """Rank of the two low-rank matrices."""
    alpha: int = Field(32, ge=1)
    """The adapter's output is scaled by `alpha / r`."""
    dropout: float = Field(0.05, ge=0, lt=1)
    """Dropout on the adapter's input in SFT. DPO and KTO train without dropout, since their reference
    log-probabilities are computed without."""
    target_modules: tuple[str, ...] = Field(("q_proj", "k_proj", "v_proj", "o_proj"), min_length=1)
    """Names of the linear layers that get an adapter."""


class SftSettings(Section):
    """SFT on liked answers and corrections."""

    learning_rate: float = Field(2e-4, gt=0, le=1)
    """Peak learning rate."""
    full_learning_rate: float = Field(2e-5, gt=0, le=1)
    """The same for full fine-tuning, where all weights move."""
    epochs: float = Field(3.0, gt=0, le=1000)
    """Passes over the training split."""
    loss: Literal["answer", "assistant", "all"] = "answer"
    """Tokens the loss is taken over: the judged answer, every assistant turn, or everything. Earlier
    turns were not judged, so by default nothing is learned from them."""
    packing: bool = True
    """Put several short examples into one row where the attention kernel keeps them apart: on a GPU with
    the package `flash-attn`, for adapters in half precision. Elsewhere rows are padded."""


class DpoSettings(Section):
    """DPO on pairs of answers."""

    learning_rate: float = Field(5e-5, gt=0, le=1)
    """Peak learning rate; sweep it."""
    full_learning_rate: float = Field(5e-7, gt=0, le=1)
    """The same for full fine-tuning, where all weights move."""
    epochs: float = Field(1.0, gt=0, le=1000)
    """Passes over the training split."""
    full_batch_size: int = Field(2, ge=1, le=4096)
    """`batch_size` of full fine-tuning, where a second model, the reference, is in memory."""
    beta: float = Field(0.1, gt=0, le=100)
    """KL coefficient."""
    sft_weight: float = Field(1.0, ge=0)
    """Weight of the SFT term on the chosen answers; 0 leaves it out, which is fragile and warned about."""
    shared_prompt: bool = False
    """Read the prompt of a pair once instead of twice, score only the answers' tokens, and batch pairs of
    similar length: the same log-probabilities and gradients several times as fast where prompts are long. A
    run compares both ways on its first batch and is refused where they differ."""


class KtoSettings(Section):
    """KTO on unpaired thumbs."""

    learning_rate: float = Field(5e-5, gt=0, le=1)
    """Peak learning rate."""
    full_learning_rate: float = Field(5e-7, gt=0, le=1)
    """The same for full fine-tuning, where all weights move."""
    epochs: float = Field(1.0, gt=0, le=1000)
    """Passes over the training split."""
    beta: float = Field(0.1, gt=0, le=100)
    """KL coefficient."""
    desirable_weight: float | None = Field(None, gt=0)
    """Weight of the loss of liked answers. `None` raises it until the liked answers weigh as much as the
    disliked ones together: with more dislikes than likes, plain KTO unlearned both (measured)."""
    undesirable_weight: float = Field(1.0, gt=0)
    """Weight of the loss of disliked answers."""


class RewardModelSettings(Section):
    """A reward model (Bradley–Terry) on pairs of answers."""

    learning_rate: float = Field(1e-4, gt=0, le=1)
    """Peak learning rate."""
    full_learning_rate: float = Field(1e-5, gt=0, le=1)
    """The same for full fine-tuning, where all weights move."""
    epochs: float = Field(1.0, gt=0, le=1000)
    """Passes over the training split."""
    center_weight: float = Field(0.01, ge=0)
    """Weight of the term that holds the mean score of a pair at 0, so that scores compare across prompts."""


class HeadWeights(Section):
    """How much each head of a score card counts, in the loss and in the one reward made of the four."""

    success: float = Field(1.0, ge=0)
    """Did the answer do what was asked?"""
    helpfulness: float = Field(1.0, ge=0)
    """Was it of use?"""
    tone: float = Field(1.0, ge=0)
    """Was it said well?"""
    safety: float = Field(1.0, ge=0)
    """Did it do no harm?"""

    @model_validator(mode="after")
    def _some_weight(self) -> "HeadWeights":
        if not any((self.success, self.helpfulness, self.tone, self.safety)):
            raise ValueError("at least one head needs a weight above 0")
        return self


class ScoreCardSettings(Section):
    """A reward model with four heads, on reviewers' score cards."""

    learning_rate: float = Field(1e-4, gt=0, le=1)
    """Peak learning rate."""
    full_learning_rate: float = Field(1e-5, gt=0, le=1)
    """The same for full fine-tuning, where all weights move."""
    epochs: float = Field(3.0, gt=0, le=1000)
    """Passes over the training split."""
    head_weights: HeadWeights = HeadWeights()
    """Weights of the heads."""


class ToolWorldSettings(Section):
    """GRPO for agents with tools: who answers their calls."""

    answers: Literal["none", "recorded", "stubs", "server"] = "none"
    """`none`: single answers to the prompts of liked examples. Otherwise whole episodes on the tasks of recorded
    trajectories, whose tool calls are answered from the recording, by fixed `stubs`, or by the tool server."""
    stubs: dict[str, str] = {}
    """What each tool answers under `stubs`."""
    url: str | None = Field(None, pattern=r"^https?://")
    """The tool server under `server`, in front of /v1/tools."""
    api_key_env: str = "RAYLOOP_API_KEY"
    """Name of the environment variable that holds a key of scope `tools`."""
    timeout_s: float = Field(10.0, gt=0)
    """Longest wait for one tool."""
    max_turns: int = Field(6, ge=1, le=1000)
    """Longest episode, in answers of the agent; `max_completion_tokens` bounds it in tokens, tools' results
    included."""

    @model_validator(mode="after")
    def _answers_exist(self) -> "ToolWorldSettings":
        if self.answers == "stubs" and not self.stubs:
            raise ValueError("`answers`=stubs needs `stubs`, a text for each tool")
        if self.answers == "server" and not self.url:
            raise ValueError("`answers`=server needs `url`")
        return self


class GrpoSettings(Section):
    """GRPO: prompts, answers sampled from the model itself, and a grader."""

    learning_rate: float = Field(1e-4, gt=0, le=1)
    """Peak learning rate."""
    full_learning_rate: float = Field(1e-6, gt=0, le=1)
    """The same for full fine-tuning, where all weights move."""
    epochs: float = Field(1.0, gt=0, le=1000)
    """Passes over the training prompts."""
    beta: float = Field(0.04, gt=0, le=100)
    """KL coefficient."""
    group_size: int = Field(8, ge=2, le=1024)
    """Answers sampled for each prompt; their rewards are compared with each other. The answers of one
    step (`batch_size` × `gradient_accumulation`) must be a multiple of it."""
    temperature: float = Field(1.0, gt=0, le=10)
    """Of the sampling."""
    max_completion_tokens: int = Field(256, ge=1)
    """Longest answer that is sampled."""
    reward_scale: Literal["group", "batch", "none"] = "group"
    """Rewards are divided by the spread within their group, within the batch, or not at all."""
    tools: ToolWorldSettings = ToolWorldSettings()
    """Agents with tools."""
    grader: dict[str, Any] = Field(default_factory=lambda: {"type": "dataset_label", "name": "recorded_truth"})
    """Gives the reward; its item has `reference` (the liked answer, or the recorded last one), `messages` and
    `example_id`. For an episode `sample.output_text` is the last thing the agent said and `sample.output_tools` are
    its calls; the item has `recorded_tools` and `recorded_reward` as well."""


class HealthSettings(Section):
    """When a training is stopped, with the reason."""

    window_steps: int = Field(10, ge=2)
    """Trends are judged over this many logged steps, and not before as many have passed."""
    max_swapped_share: float = Field(0.5, gt=0, le=1)
    """Pairs count as swapped when, in more than this share of those that can be checked, the rejected
    answer is the one people liked."""
    min_checked_pairs: int = Field(8, ge=1)
    """Fewer checkable pairs than this prove nothing."""
    collapse_nats_per_token: float = Field(1.0, gt=0)
    """Stop when the chosen answers lost this much log-likelihood a token while the margin grew."""
    max_truncated_share: float = Field(0.05, ge=0, lt=1)
    """Stop when more than this share of the examples does not fit `max_length`."""
    max_length_ratio: float = Field(2.0, gt=1)
    """Stop when greedy answers became this many times longer or shorter than the reference answers,
    and were not so at the start."""
    length_samples: int = Field(8, ge=0)
    """Validation prompts answered at each evaluation to see length drift; 0 turns it off."""
    min_canary_shift_nats: float = Field(1e-3, ge=0)
    """Warn when training moved the log-probability of held-out answers by less than this a token."""
    max_zero_spread_share: float = Field(0.9, gt=0, le=1)
    """GRPO: stop when, over two windows, at least this share of the groups had answers that all earn the
    same. A healthy run has many such groups (34–54 % were seen), but not nearly all of them for long."""
    solved_reward: float = Field(0.95, gt=0, le=1)
    """GRPO: groups without spread at a mean reward of at least this are a task that has been learned."""
    max_abstained_share: float = Field(0.5, gt=0, le=1)
    """GRPO: stop when, over a window, the grader abstained on more than this share of the answers."""


class LimitSettings(Section):
    """What trainings may cost; a run that would exceed it is refused before it starts."""

    max_steps: int = Field(100_000, ge=1)
    """Optimiser steps."""
    max_epochs: float = Field(100.0, gt=0)
    """Passes over the data."""
    max_concurrent_jobs: int = Field(4, ge=1)
    """Jobs of one tenant that may run at the same time, in all its workspaces."""
    max_training_hours: float = Field(200.0, gt=0)
    """Hours that the trainings of one tenant may have run within `usage_days`; beyond them none is started."""
    max_gpu_hours: float = Field(500.0, gt=0)
    """The same in hours times GPUs."""
    usage_days: float = Field(30.0, gt=0)
    """The period of `max_training_hours` and `max_gpu_hours`."""


class ToySettings(Section):
    """The offline base model that `rayloop train toy` trains from scratch."""

    hidden: int = Field(128, ge=8)
    """Width of the residual stream."""
    layers: int = Field(4, ge=1)
    """Transformer blocks."""
    heads: int = Field(4, ge=1)
    """Attention heads of a block."""
    intermediate: int = Field(336, ge=8)
    """Width of the feed-forward layers."""
    vocab: int = Field(512, ge=300)
    """Size of the byte-level BPE vocabulary, special tokens included."""
    max_positions: int = Field(2048, ge=64)
    """Longest sequence in tokens."""
    initializer_range: float = Field(0.06, gt=0, le=1)
    """Standard deviation of the first weights; a narrow model starts better above the usual 0.02."""
    epochs: float = Field(1.0, gt=0, le=1000)
    """Passes over the examples."""
    batch_size: int = Field(64, ge=1)
    """Examples in one step."""
    learning_rate: float = Field(2e-3, gt=0, le=1)
    """Peak of the cosine."""
    warmup_ratio: float = Field(0.05, ge=0, lt=1)
    """Share of the steps with a rising learning rate."""
    weight_decay: float = Field(0.01, ge=0)
    """AdamW's weight decay."""
    loss: Literal["answer", "all"] = "answer"
    """Tokens the loss is taken over: the assistant's answers, or everything."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of the weights and of the order of examples."""

    @model_validator(mode="after")
    def _heads_divide_hidden(self) -> "ToySettings":
        if self.hidden % (2 * self.heads):
            raise ValueError("`hidden` must be divisible by twice the number of `heads`")
        return self


class TrainingSettings(Section):
    """Defaults of every training run; a single run can set most of them on the command line."""

    base_model: str = "Qwen/Qwen2.5-0.5B-Instruct"
    """Base model where neither the command nor the agent's champion names one."""
    weights: Literal["lora", "qlora", "full"] = "lora"
    """What is trained: an adapter, an adapter on a base in 4 bits (needs a GPU and bitsandbytes), or all
    weights of the base."""
    lora: LoraSettings = LoraSettings()
    sft: SftSettings = SftSettings()
    dpo: DpoSettings = DpoSettings()
    kto: KtoSettings = KtoSettings()
    reward: RewardModelSettings = RewardModelSettings()
    score_card: ScoreCardSettings = ScoreCardSettings()
    grpo: GrpoSettings = GrpoSettings()
    health: HealthSettings = HealthSettings()
    limits: LimitSettings = LimitSettings()
    toy: ToySettings = ToySettings()
    batch_size: int = Field(4, ge=1, le=4096)
    """Examples (pairs, for DPO) in one forward pass of one worker."""
    gradient_accumulation: int = Field(4, ge=1, le=4096)
    """Forward passes in one optimiser step."""
    warmup_steps: int = Field(100, ge=0)
    """Steps with a rising learning rate…"""
    warmup_max_ratio: float = Field(0.1, ge=0, le=1)
    """…but never more than this share of the run."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Learning rate after the warm-up."""
    weight_decay: float = Field(0.01, ge=0)
    """AdamW's weight decay."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are clipped to this norm."""
    max_length: int = Field(2048, ge=16)
    """Longest example in tokens; longer ones are cut at the end."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of adapter weights, data order and dropout."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes a GPU where there is one."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Arithmetic of forward and backward; `auto` is bf16 where the hardware has it, fp16 on older GPUs."""
    threads: int = Field(0, ge=0, le=256)
    """CPU threads of one worker; 0 takes every core. Results depend on it in the last bits."""
    gradient_checkpointing: Literal["auto", "on", "off"] = "auto"
    """Recompute activations to save memory; `auto` does so on a GPU."""
    eval_steps: int = Field(100, ge=1)
    """Validation loss at least every so many steps, and at the end of every epoch."""
    save_steps: int = Field(200, ge=1)
    """Checkpoint at least every so many steps, and at the end of every epoch."""
    report_examples: int = Field(256, ge=0)
    """Validation examples of each kind in the report on held-out feedback."""
    workers: int = Field(1, ge=1, le=1024)
    """Ray Train workers of one run."""
    max_failures: int = Field(3, ge=0)
    """How often a run whose worker died is resumed from its last checkpoint."""
    job_retries: int = Field(1, ge=0, le=20)
    """How often a job is started again after its workers died more often than that."""
    retry_backoff_s: float = Field(5.0, ge=0)
    """Wait before the first such start; it doubles each time."""
    job_silent_s: float = Field(300.0, gt=0)
    """A running job that has said nothing for so long counts as failed."""
    sft_baseline: bool = True
    """Train SFT on the same feedback beside every DPO or KTO run and report both."""


class SweepSettings(Section):
    """Defaults of a sweep."""

    trials: int = Field(8, ge=1, le=10_000)
    """Configurations that are tried; the first is the method's own default."""
    learning_rate_spread: float = Field(10.0, ge=1)
    """Highest learning rate over the lowest; the range is centred on the default, in logarithms."""
    beta_spread: float = Field(10.0, ge=1)
    """The same for the KL coefficient."""
    kl_limit: float = Field(0.1, gt=0)
    """A configuration counts only if its KL divergence from the model it started from is at most this, in
    nats a token."""
    validation_prompts: int = Field(96, ge=1)
    """Held-out prompts of the validation split behind each measurement."""
    kl_samples: int = Field(2, ge=1)
    """Answers sampled for each of these prompts to estimate the KL divergence."""
    concurrency: int = Field(2, ge=1)
    """Trials that run at once, at most; fewer where the cluster has no room for them."""
    cpus_per_trial: float = Field(1.0, gt=0)
    """Logical CPUs of a trial."""
    gpus_per_trial: float = Field(0.0, ge=0)
    """GPUs of a trial."""
    rungs: int = Field(2, ge=1, le=20)
    """Measurements in the course of a trial; at each but the last the worse trials stop, or copy better ones."""
    reduction: float = Field(2.0, gt=1)
    """ASHA lets one in this many go on from a rung, and each rung is this many times as far as the one before."""
    exploit_share: float = Field(0.25, gt=0, le=0.5)
    """PBT: at each rung this share of the trials, the worst, goes on from one of as many best."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of the search and of sampling."""
