"""The embedded engine as a Ray Serve application (`serve.app:engine`, at `/engine`).

Importing this module loads no torch; the replica does. A replica counts as started when the base and every
wanted adapter is loaded, so a restart never answers 404 for a version that was served before.
"""

import logging
import os
import threading
from pathlib import Path
from typing import Any

import ray.serve
from pydantic import ValidationError

from cluster.database import connect
from cluster.errors import ConfigError, UnavailableError
from cluster.logs import configure_logging
from cluster.metrics_files import publish_metrics
from cluster.settings import Settings
from cluster.settings.engines import EngineSettings
from serve.engines.autoscaling import scale
from serve.places import SPARE_REQUESTS

log = logging.getLogger(__name__)

HEALTH_TIMEOUT_S = 60.0  # a step of a large model may hold the interpreter for long
CHANGEABLE = {
    "max_adapters", "max_rank", "default_max_tokens", "max_choices", "max_top_logprobs", "max_body_bytes",
    "unload_delay_s", "retry_failed_s", "live_after_s", "retry_after_s",
}  # fmt: skip
"""Fields of `engine` that a deployment config may change without a restart."""


@ray.serve.deployment(name="Engine")
@ray.serve.ingress()
class EngineReplica:
    """One replica: the engine, its HTTP interface, and its side of the table of servables."""

    def __init__(self, settings: Settings) -> None:
        os.environ.setdefault("OMP_NUM_THREADS", str(settings.engine.torch_threads))
        self._reconciler: Any = None
        self._stopping = threading.Event()
        configure_logging(settings.logging)
        publish_metrics(settings.metrics)
        self._settings = settings
        self._engine, self._api = open_engine(settings)
        if not self._follow():
            threading.Thread(target=self._follow_later, name="servables-wait", daemon=True).start()

    def __serve_build_asgi_app__(self) -> Any:
        """The application of this replica."""
        return self._api

    def reconfigure(self, document: Any) -> None:
        """Take the `user_config`: some fields of `engine`. Never raises: that would be an outage."""
        try:
            self._engine.apply(changed(self._engine.settings, document))
        except ConfigError as error:
            log.error("the engine's deployment config is refused, the old one stays: %s", error)

    def check_health(self) -> None:
        """Serve restarts the replica, and vLLM with it, when the engine has ended."""
        if not self._engine.alive:
            raise RuntimeError("the engine has ended")

    def __del__(self) -> None:
        """Leave the table of servables and end the engine."""
        self._stopping.set()
        if self._reconciler is not None:
            self._reconciler.close()
        if hasattr(self, "_engine"):
            self._engine.close()

    def _follow(self) -> bool:
        """Begin to follow the table of servables; false while the database is away."""
        from serve.engines.reconciler import Reconciler

        try:
            database = connect(self._settings)
        except UnavailableError as error:
            log.warning("the engine serves its base only until the database answers: %s", error)
            return False
        reconciler = Reconciler(self._engine, database, ray.serve.get_replica_context().replica_id.unique_id)
        reconciler.start()
        self._reconciler = reconciler
        return True

    def _follow_later(self) -> None:
        while not self._stopping.wait(self._settings.engine.live_after_s):
            if self._follow():
                return


def open_engine(settings: Settings) -> tuple[Any, Any]:
    """The engine of the kind that is set, and its HTTP side.

    Raises:
        ConfigError, UnavailableError: it cannot be started.
    """
    from serve.engines.token import engine_token

    token = engine_token(settings)
    if settings.engine.kind == "vllm":
        from serve.engines.vllm.engine import VllmEngine
        from serve.engines.vllm.http_api import VllmApi

        vllm = VllmEngine(settings.engine)
        return vllm, VllmApi(vllm, token)
    from serve.engines.http_api import EngineApi
    from serve.engines.local import LocalEngine

    local = LocalEngine(settings.engine)
    return local, EngineApi(local, token)


def changed(settings: EngineSettings, document: Any) -> EngineSettings:
    """The settings with what a deployment config changes.

    Raises:
        ConfigError: an unknown field, one that needs a restart, or a value out of bounds.
    """
    if document is None:
        return settings
    if not isinstance(document, dict):
        raise ConfigError("engine.user_config", document, "must be a mapping", "name fields of `engine`")
    for name, value in document.items():
        if name not in CHANGEABLE and value != getattr(settings, name, None):
            known = ", ".join(sorted(CHANGEABLE))
            raise ConfigError(f"engine.user_config.{name}", value, "cannot change while serving", f"only {known} can")
    try:
        return EngineSettings.model_validate(settings.model_dump() | document)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        name = ".".join(str(part) for part in problem["loc"])
        raise ConfigError(f"engine.user_config.{name}", problem["input"], problem["msg"], "mend the config") from None


def build(settings: Settings) -> Any:
    """The application.

    Raises:
        ConfigError: no base model is set, or its directory does not exist.
    """
    engine = settings.engine
    base = engine.base_model
    if not base:
        remedy = "set `engine.base_model` in rayloop.yaml, for example to what `rayloop train toy` made"
        raise ConfigError("engine.base_model", base, "is not set", remedy)
    path = Path(base).expanduser()
    if path.is_dir():
        located = engine.model_copy(update={"base_model": str(path.resolve())})
        settings = settings.model_copy(update={"engine": located})
    elif path.is_absolute() or base.startswith((".", "~")):
        raise ConfigError(
            "engine.base_model", base, "does not exist", "name a transformers model directory or a hub id"
        )
    deployment: Any = EngineReplica  # the decorator made a deployment of the class
    return deployment.options(
        **scale(engine),
        max_ongoing_requests=engine.max_rows + engine.max_queued + SPARE_REQUESTS,
        ray_actor_options={"num_cpus": engine.cpus, "num_gpus": engine.gpus},
        graceful_shutdown_wait_loop_s=0.2,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
    ).bind(settings)
