"""The Serve config file: applications, their size, and the routes they declare.

`rayloop up` writes it to `<home>/serve.yaml` from the settings; it is an ordinary config for `serve deploy`,
so editing a share in it and deploying it again moves traffic. The applications get the settings in force
through a file beside it, not by reading `rayloop.yaml` and the environment a second time.
"""

import os
from pathlib import Path
from typing import Any

import yaml

from cluster.errors import ConfigError
from cluster.settings import Settings, load_settings
from serve.deployment_config import parse_config
from serve.egress import check_endpoints
from serve.places import SPARE_REQUESTS

SERVE_FILE = "serve.yaml"
SETTINGS_FILE = "run/settings.yaml"
PREFIXES = {"gateway": "/", "engine": "/engine", "grader": "/grader", "tools": "/tools", "control": "/control"}


def serve_config(settings: Settings, settings_file: Path, declared: dict[str, Any]) -> dict[str, Any]:
    """The whole config document; `declared` is the router's `user_config`."""
    serve = settings.serve
    return {
        "proxy_location": "HeadOnly",
        "http_options": {"host": serve.host, "port": serve.port, "request_timeout_s": None},
        "logging_config": {"enable_access_log": False, "log_level": "WARNING"},
        "applications": [_application(name, settings, settings_file, declared) for name in serve.applications],
    }


def _application(name: str, settings: Settings, settings_file: Path, declared: dict[str, Any]) -> dict[str, Any]:
    application: dict[str, Any] = {
        "name": name,
        "route_prefix": PREFIXES[name],
        "import_path": f"serve.app:{name}",
        "args": {"settings": str(settings_file)},
    }
    if name == "gateway":
        application["deployments"] = [router_deployment(settings) | {"user_config": declared}]
    return application


def router_deployment(settings: Settings) -> dict[str, Any]:
    """Size and limits of the router."""
    serve = settings.serve
    return {
        "name": "Router",
        "num_replicas": serve.router_replicas,
        "max_ongoing_requests": 2 * serve.max_ongoing_requests + SPARE_REQUESTS,
        "graceful_shutdown_wait_loop_s": 0.2,
        "graceful_shutdown_timeout_s": serve.drain_s + serve.request_timeout_s,
        "ray_actor_options": {"num_cpus": serve.router_cpus},
    }


def declared_routes(settings: Settings, serve_file: Path) -> dict[str, Any]:
    """The router's `user_config`: from the settings, else what an earlier file holds.

    Raises:
        ConfigError: the settings declare something that is not a route.
    """
    if settings.serve.routes:
        declared: dict[str, Any] = {"routes": settings.serve.routes}
        parse_config(declared)
        return declared
    try:
        document = yaml.safe_load(serve_file.read_text(encoding="utf-8"))
        deployments = [d for a in document["applications"] if a["name"] == "gateway" for d in a["deployments"]]
        return next(d["user_config"] for d in deployments if d.get("user_config"))
    except (OSError, yaml.YAMLError, KeyError, TypeError, StopIteration):
        return {"routes": []}


def write_files(settings: Settings) -> Path:
    """Write the settings in force and the Serve config under `home`; returns the config's path.

    Raises:
        ConfigError: the settings declare something that is not a route, or an engine that may not be called.
    """
    check_endpoints(settings.serve.engines, settings.serve.allowed_hosts)
    settings_file, serve_file = settings.home / SETTINGS_FILE, settings.home / SERVE_FILE
    document = serve_config(settings, settings_file, declared_routes(settings, serve_file))
    write_private(settings_file, yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False))
    write_private(serve_file, yaml.safe_dump(document, sort_keys=False))
    return serve_file


def write_private(path: Path, text: str) -> None:
    """Replace a file at once, readable by its owner only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.unlink(missing_ok=True)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    draft.replace(path)


def read_settings(arguments: dict[str, str]) -> Settings:
    """The settings that an application was given.

    `settings` names a file with all of them, as `write_files` makes it; `config` a `rayloop.yaml`, which the
    environment overrides. `engine` and `base_model` make an engine for another base model of them.

    Raises:
        ConfigError: neither can be read.
    """
    settings = _given_settings(arguments)
    named = {"name": arguments.get("engine"), "base_model": arguments.get("base_model")}
    changed = {name: value for name, value in named.items() if value}
    return settings.model_copy(update={"engine": settings.engine.model_copy(update=changed)}) if changed else settings


def _given_settings(arguments: dict[str, str]) -> Settings:
    if "settings" not in arguments:
        return load_settings(arguments.get("config"))[0]
    path = Path(arguments["settings"])
    try:
        return Settings(**yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, TypeError, ValueError) as error:
        raise ConfigError("args.settings", str(path), f"cannot be read ({error})", "run `rayloop up` again") from None
