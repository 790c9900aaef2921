"""The tool server as a Ray Serve application of its own (`serve.app:tools`, at `/tools`)."""

import asyncio
import importlib
from typing import Any

import ray.serve
import sqlalchemy as sa

from cluster.database import connect
from cluster.errors import ConfigError
from cluster.logs import configure_logging
from cluster.metrics_files import publish_metrics
from cluster.settings import Settings
from data.group_commit import GroupCommit
from data.intake.batches import Intake
from data.log import EventLog
from serve.known_keys import KnownKeys
from serve.places import SPARE_REQUESTS
from serve.tools.http import ToolApi
from serve.tools.registry import REGISTRY, Services, Tool
from serve.tools.runner import ToolRunner
from serve.tools.sql import ReadOnlySql

BUILTIN = "serve.tools.builtin"


@ray.serve.deployment(name="Tools")
@ray.serve.ingress()
class ToolsReplica:
    """One replica of the tool server."""

    def __init__(self, settings: Settings) -> None:
        configure_logging(settings.logging)
        publish_metrics(settings.metrics)
        self._settings = settings
        self._commit: GroupCommit | None = None

    async def __serve_build_asgi_app__(self) -> ToolApi:
        """The application of this replica."""
        services = await asyncio.to_thread(open_services, self._settings)
        self._commit = services.intake.commit
        return tool_api(self._settings, services)

    def __del__(self) -> None:
        """Write the records that wait."""
        if self._commit is not None:
            self._commit.close()


def load_tools(settings: Settings) -> dict[str, Tool]:
    """The tools to serve: the built-in ones, and what the modules of `tools.modules` register.

    Raises:
        ConfigError: a module cannot be imported, or a name is not registered.
    """
    for module in (BUILTIN, *settings.tools.modules):
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ConfigError("tools.modules", module, f"cannot be imported ({error})", "mend its name") from None
    tools = REGISTRY.only(settings.tools.serve)
    if not settings.tools.views:
        tools.pop("query_sql", None)
    return tools


def open_services(settings: Settings) -> Services:
    """What the built-in tools stand on.

    Raises:
        UnavailableError: the database does not answer.
    """
    database = connect(settings)
    commit = GroupCommit(EventLog(database), settings.log)
    tools = settings.tools
    source = sa.create_engine(tools.sql_url) if tools.sql_url else database
    sql = ReadOnlySql(source, tools.views, max_rows=tools.max_rows, timeout_s=tools.deadline_s)
    return Services(settings, database, Intake(commit, settings), sql)


def tool_api(settings: Settings, services: Services) -> ToolApi:
    """The ASGI callable over these services."""
    runner = ToolRunner(load_tools(settings), services, settings.tools, settings.serve.breaker)
    keys = KnownKeys(settings, settings.tools.keys_refresh_s, settings.tools.replicas)
    return ToolApi(runner, settings.tools, keys)


def build(settings: Settings) -> Any:
    """The application.

    Raises:
        ConfigError: a tool cannot be loaded.
    """
    load_tools(settings)
    deployment: Any = ToolsReplica  # the decorator made a deployment of the class
    return deployment.options(
        num_replicas=settings.tools.replicas,
        max_ongoing_requests=settings.tools.max_ongoing_requests + SPARE_REQUESTS,
        ray_actor_options={"num_cpus": settings.tools.cpus},
        graceful_shutdown_wait_loop_s=0.2,
    ).bind(settings)
