"""Engines and graders: what generates answers and what scores them (serving.md)."""

from typing import Any, Literal

from pydantic import Field, model_validator

from cluster.settings.base import Section


class VllmSettings(Section):
    """vLLM's server as a child of the engine's replica (`engine.kind: vllm`)."""

    python: str | None = None
    """The interpreter that has vLLM, for example `.venv-vllm/bin/python` (`make vllm`). `None`: this one."""
    kv_cache_gb: float = Field(1.0, gt=0)
    """Memory for keys and values on a CPU."""
    gpu_memory_share: float = Field(0.9, gt=0, le=1)
    """Share of a GPU's memory that vLLM takes."""
    max_active_adapters: int = Field(8, ge=1)
    """Adapters mixed in one batch; all that are loaded stay in memory."""
    tool_call_parser: str | None = "hermes"
    """vLLM's parser of the model's tool calls. `None`: requests with tools are refused."""
    structural_tags: bool = False
    """Hold every call to the parser's own form and to its tool's schema, also with `tool_choice: auto`. Off: `auto` is
    the model's own, and a call that is asked for is compact JSON by its schema, which suits small models: in tags they
    may write blanks for ever. Parsers of calls that are no JSON (`glm47`) keep to `tool_choice` only with it."""
    enforce_eager: bool = False
    """Compile nothing: starts sooner, answers slower."""
    start_timeout_s: float = Field(600.0, gt=0)
    """How long it may take until it answers."""
    unload_wait_s: float = Field(60.0, ge=0)
    """How long an unload waits for answers that use the adapter."""
    extra_arguments: tuple[str, ...] = ()
    """Further arguments of vLLM's server, for example `("--tensor-parallel-size", "2")`."""


class AutoscalingSettings(Section):
    """How the number of an engine's replicas follows the requests."""

    max_replicas: int | None = Field(None, ge=1)
    """With it, Serve adds replicas up to this many while requests pile up, and takes them away again down to
    `engine.replicas`. A replica answers once it holds every wanted adapter."""
    target_requests: float = Field(32.0, gt=0)
    """Requests at once per replica that Serve aims at."""
    upscale_delay_s: float = Field(10.0, ge=0)
    """How long there must be too many requests before replicas are added."""
    downscale_delay_s: float = Field(600.0, ge=0)
    """How long there must be too few before replicas are taken away."""
    look_back_s: float = Field(30.0, gt=10)
    """Over how long the requests are averaged; Serve counts them every 10 s."""
    scale_to_zero: Literal["never", "candidates", "always"] = "never"
    """Which engines may have no replica while nobody asks: those that rollouts bring up for candidates on another base
    model, or this one too. The first request then waits until a replica is up; versions stay servable."""
    idle_s: float = Field(600.0, gt=0)
    """How long nobody must have asked before the last replica goes."""


class EngineSettings(Section):
    """The engine of this installation, and the rules for engines elsewhere."""

    kind: Literal["local", "vllm"] = "local"
    """`local`: transformers and peft in the replica; `vllm`: vLLM's server as its child."""
    vllm: VllmSettings = VllmSettings()

    name: str = Field("local", pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")
    """Name of this engine in the table of servables; one engine serves one base model."""
    base_model: str | None = None
    """Directory or hub id of the base model. The engine does not start without one."""
    replicas: int = Field(1, ge=1)
    """Copies of the engine; each holds the base and every wanted adapter."""
    autoscaling: AutoscalingSettings = AutoscalingSettings()
    cpus: float = Field(1.0, ge=0)
    """Logical CPUs each replica reserves."""
    gpus: float = Field(0.0, ge=0)
    """GPUs each replica reserves; set `device` to match."""
    device: str = "cpu"
    """Torch device that holds the model, for example `cpu` or `cuda:0`."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the weights. `float32` gives the trainer's log-probs to the last digits."""
    torch_threads: int = Field(1, ge=1)
    """Threads of the step loop. One is fastest for a small model that shares its cores."""
    max_rows: int = Field(64, ge=1, le=4096)
    """Answers generated at the same time; more wait in the queue."""
    max_queued: int = Field(256, ge=0)
    """Answers that may wait; beyond it a request is refused with 429 at once."""
    retry_after_s: float = Field(1.0, gt=0)
    """What a refused client is told to wait."""
    max_context_tokens: int | None = Field(None, ge=8)
    """Prompt and answer together. `None` takes what the base model was made for."""
    default_max_tokens: int = Field(256, ge=1)
    """Length of an answer when the request names none."""
    max_choices: int = Field(16, ge=1)
    """Largest `n` of one request."""
    max_top_logprobs: int = Field(20, ge=0)
    """Largest `top_logprobs` of one request."""
    max_prefill_tokens: int = Field(4096, ge=16)
    """Prompt tokens read in one step; bounds how long running answers wait for new ones."""
    prefix_cache_mb: int = Field(128, ge=0)
    """Memory for the beginnings of prompts that were seen more than once. 0 turns it off."""
    prefix_block_tokens: int = Field(16, ge=1)
    """Beginnings are kept in blocks of this many tokens."""
    stream_tokens: int = Field(8, ge=1)
    """A streamed chunk carries at most about this many tokens; a chunk costs a hop through the proxy."""
    stream_interval_ms: float = Field(50.0, ge=0)
    """A streamed chunk leaves after this long even when it is not full."""
    max_body_bytes: int = Field(4_000_000, ge=1024)
    """Longer request bodies are answered 413 without being read to the end."""
    body_timeout_s: float = Field(30.0, gt=0)
    """How long a client may take to send its body."""
    max_adapters: int = Field(16, ge=0)
    """Adapters held at the same time."""
    max_rank: int = Field(64, ge=1)
    """Largest LoRA rank that is loaded."""
    canary_prompts: tuple[str, ...] = (
        "The quick brown fox jumps over the lazy dog.",
        '{"verdict": "escalate", "owner": "',
    )
    """Texts whose log-probs an adapter must move against the base, or it does nothing."""
    canary_min_shift: float = Field(1e-5, ge=0)
    """Least change, in nats, of the most moved token of the canary prompts."""
    canary_max_distance: float = Field(0.2, gt=0)
    """How far, in nats a token, a served adapter's log-probs may be from those its training wrote beside it; a base in
    other arithmetic (4 bits, bf16) costs some of it. Adapters without such a file are not held to it."""
    poll_interval_s: float = Field(0.5, gt=0)
    """How often a replica reads which versions it should hold."""
    heartbeat_s: float = Field(2.0, gt=0)
    """How often a replica says that it lives."""
    live_after_s: float = Field(10.0, gt=0)
    """A replica whose heartbeat is older is not waited for."""
    unload_delay_s: float = Field(30.0, ge=0)
    """How long a version stays loaded after it is no longer wanted."""
    retry_failed_s: float = Field(30.0, gt=0)
    """How long until a version that failed its checks is tried again."""

    @model_validator(mode="after")
    def _heartbeat_is_seen(self) -> "EngineSettings":
        if self.live_after_s <= 2 * self.heartbeat_s:
            raise ValueError("engine.live_after_s must be more than twice engine.heartbeat_s")
        most = self.autoscaling.max_replicas
        if most is not None and most < self.replicas:
            raise ValueError("engine.autoscaling.max_replicas must not be below engine.replicas")
        return self


class OnlineGradingSettings(Section):
    """Grading a sample of live traffic after the answers left."""

    grader: dict[str, Any] | None = None
    """The grader, as `/v1/graders/run` takes it. It has the conversation as `item.messages` and no reference.
    `None`: only the detectors look at answers."""
    share: float = Field(0.02, gt=0, le=1)
    """Share of the interactions that are graded, chosen by a hash of their id."""
    detectors: bool = True
    """Look at the same sample with the detectors of `curation.detectors`: toxic, and not borne by its passages."""
    pair_grader: dict[str, Any] | None = None
    """A grader of type `pair_model` that compares a live answer with the shadow's, as `item.opponent`. `None`: the
    rewards that `grader` gives both are compared."""
    pair_share: float = Field(1.0, gt=0, le=1)
    """Share of the shadow pairs that are compared, chosen by a hash of their id."""
    interval_s: float = Field(2.0, gt=0)
    """How often the log is read for more."""
    batch: int = Field(500, ge=1, le=10_000)
    """Most interactions read at a time."""
    deadline_s: float = Field(10.0, gt=0)
    """Nobody waits for these grades, so they may take longer; past it they are abstentions."""


class GraderSettings(Section):
    """The grader deployment."""

    replicas: int = Field(1, ge=1)
    """Copies of the grader."""
    cpus: float = Field(0.1, ge=0)
    """Logical CPUs each replica reserves."""
    deadline_s: float = Field(2.0, gt=0)
    """A grade not there by then is an abstention, never a zero."""
    max_batch: int = Field(256, ge=1)
    """Most answers in one request."""
    max_body_bytes: int = Field(4_000_000, ge=1024)
    """Longer request bodies are answered 413 without being read to the end."""
    body_timeout_s: float = Field(30.0, gt=0)
    """How long a client may take to send its body."""
    workers: int = Field(2, ge=1)
    """Processes that run graders; one that misses the deadline is ended and replaced."""
    worker_memory_mb: int = Field(1024, ge=256)
    """Address space of one such process."""
    max_queued: int = Field(1024, ge=1)
    """Answers that may wait for a process; beyond it a request is refused with 429 at once."""
    retry_after_s: float = Field(1.0, gt=0)
    """What a refused client is told to wait."""
    keys_refresh_s: float = Field(1.0, gt=0, le=2.0)
    """How often the API keys are read; a revoked key stops working within this time."""
    reward_model_url: str | None = Field(None, pattern=r"^https?://")
    """Address of `rayloop train reward-server`, which graders of type `reward_model` ask."""
    judge_url: str | None = Field(None, pattern=r"^https?://[^\s?#]+$")
    """Address in front of `/v1` of the OpenAI-compatible server that graders of types `label_model` and
    `score_model` ask, and `text_similarity` with `cosine`."""
    judge_api_key_env: str | None = None
    """Name of the environment variable that holds the bearer key of that server."""
    judge_structured: bool = True
    """That server takes `response_format`. Where it does not, judges are only told the form of their reply."""
    judge_connections: int = Field(64, ge=1)
    """Most requests to judges and reward models at once; more wait, within their deadline."""
    embedding_model: str | None = None
    """Model of that server that makes embeddings; without one there is no `cosine`."""
    python_workers: int = Field(2, ge=1)
    """`python` graders that run at the same time."""
    python_memory_mb: int = Field(256, ge=64)
    """Address space of the process a `python` grader runs in."""
    cache_entries: int = Field(20_000, ge=0)
    """Grades kept in memory of each replica, so that what was graded is not graded again. 0 turns it off."""
    judged_days: float = Field(30.0, gt=0)
    """How long the database keeps what judges said, so that every replica gives the same answer the same reward."""
    abstention_share: float = Field(0.2, gt=0, le=1)
    """Share of a replica's latest grades that may be abstentions; above it an alert goes out."""
    abstention_window: int = Field(200, ge=10)
    """How many of the latest grades that share is of."""
    abstention_check_s: float = Field(30.0, gt=0)
    """How often a replica looks at that share."""
    online: OnlineGradingSettings = OnlineGradingSettings()
