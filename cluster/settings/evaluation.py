"""What a version must pass before any traffic (evaluation.md)."""

from pathlib import Path
from typing import Any

from pydantic import Field

from cluster.settings.base import Section


class EvaluationSettings(Section):
    """Suites and gates. Margins are shares: 0.01 is one percentage point."""

    suites: Path | None = None
    """Folder with a team's own `regression.jsonl`, `refusal.jsonl`, …; they add to the built-in cases."""
    not_applicable: dict[str, str] = Field(default_factory=dict)
    """Suites whose prerequisite does not exist, each with the reason; recorded with the version."""
    grader: dict[str, Any] = Field(default_factory=lambda: {"type": "dataset_label", "name": "recorded_truth"})
    """Decides which of two answers is better; its item has `reference` (recorded truth) and `messages`."""
    judge: dict[str, Any] | None = None
    """Grader that sees two answers side by side and decides the win rate instead: it grades the first and finds the
    second as `item.other`; a reward above one half means that the first is better. Asked in both orders."""
    reward_model: str | None = None
    """The reward model that `reward_model` graders ask: folder of its adapter as its training left it, or the
    address of `rayloop train reward-server`."""
    drift_agreement: float = Field(0.7, gt=0.5, le=1)
    """Grader and reward model should prefer the same of two answers at least this often; when they surely
    do not, evaluation raises the drift alert."""
    calibration_days: float = Field(30.0, gt=0)
    """People's judgements of so many days are held against grader and reward model."""
    calibration_error: float = Field(0.15, gt=0, lt=1)
    """Mean distance between how sure a grader is and how often people agree; above it, evaluation raises the drift
    alert and refits the temperature of a reward model."""
    confidence: float = Field(0.95, gt=0.5, lt=1)
    """Level of every interval."""
    bootstrap_samples: int = Field(2000, ge=100)
    """Resamples behind a bootstrap interval."""
    permutations: int = Field(200, ge=20)
    """Permutations behind the shuffled control."""
    judge_permutations: int = Field(19, ge=1)
    """The same where `judge` decides, which is asked for each answer and each prompt it is dealt to; never fewer than
    `confidence` needs."""
    min_cases: int = Field(20, ge=1)
    """With fewer held-out examples a statistical gate has no data."""
    domain_min_cases: int = Field(30, ge=1)
    """A domain with at least this many cases is gated by itself."""
    max_prompts: int = Field(600, ge=1)
    """Held-out prompts that are answered at most, chosen by a hash that does not depend on their order."""
    max_logged: int = Field(2000, ge=1)
    """Logged answers that are weighed at most for the off-policy estimates."""
    min_effective_samples: float = Field(100.0, ge=1)
    """With a smaller effective sample an off-policy estimate is no evidence."""
    human_answers: int = Field(100, ge=1, le=1000)
    """Held-out prompts whose answers people are asked to compare."""
    perplexity_ratio: float = Field(1.02, ge=1)
    """Perplexity may be at most this many times the champion's."""
    margin: float = Field(0.01, ge=0, lt=1)
    """How far below the champion a share may lie."""
    win_rate: float = Field(0.5, ge=0, lt=1)
    """The lower bound of the win rate's interval must be above this."""
    structured_share: float = Field(0.9, gt=0, le=1)
    """The task counts as structured when this share of the recorded answers are JSON objects."""
    max_new_tokens: int = Field(256, ge=1)
    """Longest answer that is generated."""
    batch_size: int = Field(64, ge=1)
    """Prompts answered at once."""
    router_url: str | None = Field(None, pattern=r"^https?://\S+$")
    """Address of the routers, through which versions are asked whose weights are elsewhere. `None` means `serve.host`
    and `serve.port`."""
    router_key_env: str = "RAYLOOP_API_KEY"
    """Environment variable with an API key of scope `chat` for that."""
    router_concurrency: int = Field(8, ge=1, le=1000)
    """Prompts that are put to the routers at once."""
    router_timeout_s: float = Field(120.0, gt=0)
    """Longest wait for one of their answers."""
    workers: int = Field(0, ge=0)
    """Ray tasks that answer; 0 answers in this process, which is quicker for a small model."""
    worker_gpus: float = Field(0.0, ge=0)
    """GPUs of each of these tasks."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of sampling and of the bootstrap."""
    examples_shown: int = Field(5, ge=0)
    """Answers that differ, shown in a comparison."""
