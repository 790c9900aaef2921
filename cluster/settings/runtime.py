"""Where things are kept and how Ray is reached."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from cluster.settings.base import Section


class DatabaseSettings(Section):
    """The event log, projections, routes and job table."""

    url: str | None = None
    """SQLAlchemy URL. `None` means SQLite under `home`; a cluster uses
    `postgresql+psycopg://user@host/database`."""
    pool_size: int = Field(5, ge=1, le=200)
    """Connections kept open by one process."""
    busy_timeout_s: float = Field(30.0, gt=0)
    """How long a SQLite write waits for another process's write before it fails."""
    sqlite_cache_mb: int = Field(64, ge=1)
    """Page cache of one SQLite connection: with too little of it, random inserts write pages twice."""
    sqlite_checkpoint_pages: int = Field(8000, ge=100)
    """Pages of 4 KB that SQLite's write-ahead log holds before they go to the database file."""
    connect_timeout_s: float = Field(5.0, gt=0)
    """How long to wait for a PostgreSQL server before it counts as unreachable."""


class StorageSettings(Section):
    """Locations of files. `None` means a folder under `home`."""

    datasets: str | None = None
    """Datasets: one folder each, named by dataset id."""
    files: str | None = None
    """Uploaded files: a folder for each tenant."""
    events: str | None = None
    """Sealed days of the event log, as Parquet: a folder, or any URI of `pyarrow.fs` (s3://, gs://, …)."""
    adapters: str | None = None
    """Where engines on other machines find adapters: a shared folder, or any URI of `pyarrow.fs`. `None`: engines read
    the controller's copy, so they must be on its machine or see its disk."""
    endpoint_url: str | None = Field(None, pattern=r"^https?://[^/?#@]+/?$")
    """S3-compatible server that holds `adapters` where that is an s3:// URI without a query of its own."""


class MetricsSettings(Section):
    """Metrics as files, for one address that answers with those of every process (`rayloop metrics`)."""

    folder: Path | None = None
    """Where every application writes its own, on its machine. `None`: they are at the `/metrics` of each only."""
    interval_s: float = Field(5.0, gt=0)
    """How often they are written."""
    forget_after_s: float = Field(30.0, gt=0)
    """What is older was left behind by a process that was killed."""

    @model_validator(mode="after")
    def _is_written_before_it_is_forgotten(self) -> "MetricsSettings":
        if self.forget_after_s <= 2 * self.interval_s:
            raise ValueError("metrics.forget_after_s must be more than twice metrics.interval_s")
        return self


class MLflowSettings(Section):
    """Runs and versions."""

    tracking_uri: str | None = None
    """`None` means SQLite under `home`."""
    artifact_location: str | None = None
    """Root of run artifacts for experiments made by Rayloop. `None` means a folder under `home`, or the
    server's own default when `tracking_uri` is an `http(s)` address."""
    experiment: str = "rayloop"
    """Name of the MLflow experiment that holds the runs."""


class RaySettings(Section):
    """The Ray session a command starts or joins."""

    address: str | None = None
    """Address of a running cluster. `None` starts one on this machine."""
    num_cpus: int = Field(6, ge=1)
    """Logical CPUs of a cluster started here. Six by default even on two cores: with fewer, Serve and
    Ray Data together can wait for each other for ever."""
    object_store_mb: int = Field(512, ge=80)
    """Object store of a cluster started here, in MB."""
    io_workers: int = Field(1, ge=1, le=64)
    """Processes of a cluster started here that move objects to disk when its store is full, and as many that bring them
    back; about 45 MB each."""
    scheduling_warning_s: float = Field(30.0, gt=0)
    """A wait for resources longer than this names the resource that is short."""
    connect_timeout_s: float = Field(5.0, gt=0)
    """How long to wait for a cluster at `address` before it counts as unreachable."""
    auth_mode: Literal["disabled", "token"] = "disabled"
    """Ray's own token authentication. A cluster started here listens on loopback only, and is
    disabled by default; the Kubernetes manifests set `token`."""


class LoggingSettings(Section):
    """Logs of Rayloop's own processes."""

    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Lowest level that is written."""
    json_lines: bool = False
    """One JSON object a line, for log collectors."""
