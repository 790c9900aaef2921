"""Where the client of an agent process sends to, and how; from the environment where nobody says otherwise."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from cluster.errors import ConfigError
from serve.delivery import Delivery, FileDelivery, HttpDelivery
from serve.remote import Remote
from serve.sender import SenderLimits

DRY_RUN_FILE = "rayloop-dry-run.jsonl"
YES = ("true", "1")


@dataclass(frozen=True, slots=True)
class ClientConfig:
    """Where to and how. `ClientConfig.from_environment()` is what `Client()` uses."""

    enabled: bool = False
    url: str | None = None
    """Address of the router, for example `https://rayloop.internal`."""
    api_key: str | None = field(default=None, repr=False)
    """A key with the scope `feedback`; `grade` and `tools` where those are called."""
    dry_run: Path | None = None
    """Write JSON lines to this file; nothing is sent."""
    tools_url: str | None = None
    """The tool server; `<url>/tools` where absent."""
    grader_url: str | None = None
    """The grader; `<url>/grader` where absent."""
    call_timeout_s: float = 2.0
    """What `call_tool` and `grade` may cost the agent."""
    scrub: bool = True
    """Replace personal data before anything leaves the process."""
    limits: SenderLimits = field(default_factory=SenderLimits)

    @classmethod
    def from_environment(cls) -> "ClientConfig":
        """`RAYLOOP_ENABLED`, `RAYLOOP_URL`, `RAYLOOP_API_KEY`, `RAYLOOP_TOOLS_URL`, `RAYLOOP_GRADER_URL`, and
        `RAYLOOP_DRY_RUN`: `true`, or the file to write to."""
        given = {name: os.environ.get(f"RAYLOOP_{name}", "").strip() for name in ENVIRONMENT}
        dry_run = given["DRY_RUN"]
        file = DRY_RUN_FILE if dry_run.lower() in YES else "" if dry_run.lower() in ("false", "0") else dry_run
        return cls(
            enabled=given["ENABLED"].lower() in YES,
            url=given["URL"] or None,
            api_key=given["API_KEY"] or None,
            dry_run=Path(file) if file else None,
            tools_url=given["TOOLS_URL"] or None,
            grader_url=given["GRADER_URL"] or None,
        )

    def check(self) -> None:
        """Raise `ConfigError` where an enabled client could not work."""
        if self.url is None and self.dry_run is None:
            raise ConfigError(
                "RAYLOOP_URL", None, "is missing", "set it, or RAYLOOP_DRY_RUN=true, or disable the client"
            )
        for name in ("url", "tools_url", "grader_url"):
            value = getattr(self, name)
            parts = urlsplit(value or "http://none")
            if parts.scheme not in ("http", "https") or not parts.hostname:
                variable = f"RAYLOOP_{name.upper()}"
                raise ConfigError(variable, value, "must be an http or https address", "write https://host:port")
        if not self.call_timeout_s > 0:
            raise ConfigError("call_timeout_s", self.call_timeout_s, "must be > 0", "give the budget in seconds")
        for name in ("queue_items", "queue_bytes", "item_bytes", "batch_items", "batch_bytes"):
            if getattr(self.limits, name) < 1:
                raise ConfigError(f"limits.{name}", getattr(self.limits, name), "must be >= 1", "raise it")


ENVIRONMENT = ("ENABLED", "URL", "API_KEY", "DRY_RUN", "TOOLS_URL", "GRADER_URL")


def delivery(config: ClientConfig) -> Delivery:
    """Where an enabled client's records go."""
    if config.dry_run is not None:
        return FileDelivery(config.dry_run)
    assert config.url is not None
    return HttpDelivery(Remote(config.url.rstrip("/"), config.api_key), config.limits.timeout_s)


def remote(config: ClientConfig, url: str | None, path: str) -> Remote | None:
    """A service's address; `None` where it is not to be called."""
    if not config.enabled or config.dry_run is not None:
        return None
    base = url or (config.url.rstrip("/") + path if config.url else None)
    return None if base is None else Remote(base.rstrip("/"), config.api_key)
