"""Uploaded files and the fine-tuning API (training.md)."""

from pydantic import Field

from cluster.settings.base import Section


class RemoteSettings(Section):
    """Trainings sent to another endpoint that speaks OpenAI's fine-tuning API."""

    base_url: str | None = Field(None, pattern=r"^https?://[^\s?#]+$")
    """Its address in front of `/files`; for example `https://api.openai.com/v1`."""
    api_key_env: str = "OPENAI_API_KEY"
    """Name of the environment variable that holds its key."""
    max_examples: int = Field(50_000, ge=1)
    """Examples that one training may send."""
    max_mb: float = Field(200.0, gt=0)
    """Size of the training file that may be sent."""
    max_jobs_per_day: int = Field(5, ge=1)
    """Trainings that one tenant may send within 24 hours."""
    poll_s: float = Field(15.0, gt=0)
    """How often the remote job is looked at."""
    timeout_s: float = Field(86_400.0, gt=0)
    """A remote job that takes longer is cancelled there."""


class FinetuningSettings(Section):
    """`/v1/files` and `/v1/fine_tuning/jobs`."""

    base_models: dict[str, str] = {}
    """Names that clients may give as `model` -> model folder or hub id. The engine's base model is always
    among them, under the last part of its path."""
    max_file_mb: float = Field(200.0, gt=0)
    """Longer uploads are answered 413."""
    upload_timeout_s: float = Field(600.0, gt=0)
    """How long a client may take to send a file."""
    max_uploads_at_once: int = Field(4, ge=1)
    """Files that one router takes in at the same time; more are answered 429."""
    max_files: int = Field(1000, ge=1)
    """Files that one tenant may keep."""
    min_examples: int = Field(10, ge=1)
    """A training file with fewer lines is refused."""
    max_examples: int = Field(100_000, ge=1)
    """A file with more lines is refused."""
    max_active_jobs: int = Field(20, ge=1)
    """Jobs of one tenant that may wait, run or pause; how many run at once is
    `training.limits.max_concurrent_jobs`."""
    max_compute_multiplier: float = Field(8.0, gt=0)
    """Highest `compute_multiplier` of a reinforcement job."""
    ray_jobs_address: str | None = Field(None, pattern=r"^https?://[^\s?#]+$")
    """Dashboard of the Ray cluster that runs the jobs, as Ray jobs. `None` runs each as a process beside the
    application `control`."""
    use_ray: bool = True
    """Train on Ray Train workers; false trains inside the job's own process."""
    tick_s: float = Field(1.0, gt=0)
    """How often waiting, stopped and ended jobs are looked at."""
    start_timeout_s: float = Field(120.0, gt=0)
    """A job's process that has not reported by then counts as not started."""
    stop_grace_s: float = Field(20.0, ge=0)
    """A paused or cancelled process that has not ended by itself by then is killed."""
    max_starts: int = Field(3, ge=1)
    """How often a process that only had to register its result is started again."""
    ready_timeout_s: float = Field(120.0, gt=0)
    """How long a job waits for the engine to load its model before it counts as succeeded all the same."""
    resume_wait_s: float = Field(15.0, ge=0)
    """How long a request to resume waits for the paused process to end."""
    event_poll_s: float = Field(0.5, gt=0)
    """How often a stream of events looks for more."""
    remote: RemoteSettings = RemoteSettings()
