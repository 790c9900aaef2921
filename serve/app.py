"""The Serve applications, as builder functions that a Serve config names (`import_path: serve.app:gateway`).

Importing this module loads no torch: what an application needs is imported in the replica that runs it.
"""

import asyncio
import importlib
import sys
from collections.abc import Callable
from typing import Any

import ray.serve

from cluster.errors import UnavailableError
from cluster.logs import configure_logging
from cluster.metrics_files import publish_metrics
from cluster.settings import Settings
from serve.config import read_settings, router_deployment
from serve.router import RouterApp

Arguments = dict[str, str]

BUILDERS = {
    "engine": "serve.engines.deployment:build",
    "grader": "serve.graders:build",
    "tools": "serve.tools.deployment:build",
    "control": "serve.control:build",
}
"""Where the applications besides the router come from: `build(settings) -> ray.serve.Application`."""


@ray.serve.deployment(name="Router")
@ray.serve.ingress()
class Router:
    """The router in a replica: hands Serve the raw ASGI callable, so no framework stands between."""

    def __init__(self, settings: Settings) -> None:
        configure_logging(settings.logging)
        publish_metrics(settings.metrics)
        sys.setswitchinterval(settings.serve.switch_interval_ms / 1000)
        self._app = RouterApp(settings, standalone=False)

    async def __serve_build_asgi_app__(self) -> RouterApp:
        """The application of this replica, its first routes and keys read."""
        await asyncio.to_thread(self._app.watcher.refresh)
        return self._app

    def reconfigure(self, document: Any) -> None:
        """Take the `user_config`. Never raises: that would be an outage."""
        self._app.reconfigure(document)


def gateway(arguments: Arguments) -> Any:
    """The router, at `/`."""
    settings = read_settings(arguments)
    deployment: Any = Router
    return deployment.options(**router_deployment(settings)).bind(settings)


def engine(arguments: Arguments) -> Any:
    """The embedded engine, at `/engine`; for another base model under another name and prefix."""
    return _build("engine", arguments)


def grader(arguments: Arguments) -> Any:
    """The grader, at `/grader`."""
    return _build("grader", arguments)


def tools(arguments: Arguments) -> Any:
    """The tool server, at `/tools`."""
    return _build("tools", arguments)


def control(arguments: Arguments) -> Any:
    """The rollout controller, at `/control`."""
    return _build("control", arguments)


def _build(name: str, arguments: Arguments) -> Any:
    module, _, function = BUILDERS[name].partition(":")
    try:
        builder: Callable[[Settings], Any] = getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        raise UnavailableError(
            f"application {name} cannot be built: {error}; leave it out of `serve.applications`"
        ) from None
    return builder(read_settings(arguments))
