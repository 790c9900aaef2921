"""What a rollout acts on in production: the registry, the table of servables, the routers over HTTP."""

import json
import logging
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

from sqlalchemy.engine import Engine

from cluster.errors import NotFoundError, UnavailableError
from cluster.registry import Registry, Version
from cluster.settings import Settings
from cluster.settings.experiments import ApplicationSettings
from serve import servables
from serve.adapter_store import adapter_location
from serve.applications.document import application_name, is_ours
from serve.applications.driver import Applications, Driver, Status
from serve.applications.http_json import Api
from serve.applications.rayservice import RayServiceDriver, access
from serve.applications.serve_rest import ServeRestDriver, dashboard_url
from serve.keys import create_key, digest_of, list_keys, revoke_key
from serve.replicas import is_served
from serve.rollout.steps import Steps
from serve.routes import Route

log = logging.getLogger(__name__)

SMOKE_USER = "rayloop-smoke-test"
KEY_NAME = "rollout-controller"
KEY_LIFETIME_S = 86_400.0
UNAUTHORIZED = 401


class LiveServables:
    """The table `servables`, through which every engine replica learns what to hold.

    `applications` are the engines of further base models; a command does without, the controller brings them up.
    """

    def __init__(
        self, engine: Engine, registry: Registry, settings: Settings, applications: Applications | None = None
    ) -> None:
        self.engine, self.registry, self.settings = engine, registry, settings
        self.applications = applications

    def want(self, version: str) -> None:
        """Fetch the adapter and ask the engine of its base model to load it."""
        found = self.registry.get(version)
        location = adapter_location(self.registry, found)
        servables.want(self.engine, found, self._engine_of(found), adapter_location=location)

    def unwant(self, version: str) -> None:
        """Let the engines drop it."""
        servables.unwant(self.engine, version)

    def status(self, version: str) -> tuple[Status, str]:
        """Ready when every live replica holds it; failed with the first reason given."""
        try:
            if servables.ready(self.engine, version, live_after_s=self.settings.engine.live_after_s):
                return "ready", ""
        except NotFoundError:
            return "absent", ""
        if (unready := self._unready_application(version)) is not None:
            return unready
        said = servables.reports(self.engine, version)
        failed = next((report for report in said if report.state == "failed"), None)
        if failed is not None:
            return "failed", failed.reason or "no reason given"
        return "loading", ", ".join(f"{r.engine}/{r.replica_id} {r.state}" for r in said)

    def sync(self, now_us: int) -> None:
        """Bring up the applications that wanted versions need, take down those that none does."""
        if self.applications is not None:
            self.applications.sync(now_us)

    def _engine_of(self, version: Version) -> str:
        """The engine that holds its base model already, else the configured one, else an application of its own."""
        configured, revision = self.settings.rollout.engine, version.tags.get("base_revision")
        if self.settings.rollout.applications.driver == "none":
            return configured
        known = servables.list_servables(self.engine)
        for held in known:
            if held.wanted and (held.base_model, held.base_revision) == (version.base_model, revision):
                return held.engine
        is_first = not any(held.wanted and held.engine == configured for held in known)
        return configured if is_first else application_name(version.base_model, revision)

    def _unready_application(self, version: str) -> tuple[Status, str] | None:
        """How the application of a version is, where it has one that does not run."""
        if self.applications is None:
            return None
        held = servables.list_servables(self.engine)
        name = next((row.engine for row in held if row.version == version and is_ours(row.engine)), None)
        if name is None:
            return None
        status, said = self.applications.status(name)
        if status == "ready":
            return None
        return ("failed" if status == "failed" else "loading"), f"application {name}: {said}"


class NoRouters:
    """For commands: what the row says is what the routers will read within their next poll."""

    def smoke(self, route: Route, version: str) -> str | None:
        """Nothing to try it on."""
        return None

    def shows(self, route: Route) -> bool:
        """The row is written, and routers follow it."""
        return True


class HttpRouters:
    """The routers behind one address, spoken to as any client would, and read back one by one in the database."""

    def __init__(self, engine: Engine, url: str, settings: Settings, key_for: Callable[[Route], str]) -> None:
        self.engine, self.url, self.settings, self.key_for = engine, url.rstrip("/"), settings, key_for

    def smoke(self, route: Route, version: str) -> str | None:
        """Hold each of the configured conversations with the candidate.

        Raises:
            UnavailableError: the routers refuse the key, as they do a new one until their next poll.
        """
        for conversation in self.settings.rollout.smoke_conversations:
            messages: list[dict[str, Any]] = []
            for turn in conversation:
                messages.append({"role": "user", "content": turn})
                try:
                    messages.append(self._answer(route, version, messages))
                except (OSError, ValueError, LookupError, TypeError) as error:
                    if isinstance(error, urllib.error.HTTPError) and error.code == UNAUTHORIZED:
                        raise UnavailableError("the routers do not know the controller's key (yet)") from None
                    return f"{turn!r}: {_shown(error)}"
        return None

    def _answer(self, route: Route, version: str, messages: list[dict[str, Any]]) -> dict[str, Any]:
        """The candidate's next message. What it says is for the gates to judge, and a tiny model may say nothing."""
        limit = self.settings.rollout.smoke_tokens
        body = {"model": version, "messages": messages, "max_tokens": limit, "user": SMOKE_USER}
        message: dict[str, Any] = self._ask(route, "/v1/chat/completions", body)["choices"][0]["message"]
        return message

    def shows(self, route: Route) -> bool:
        """True when every live replica, a draining one too, serves this revision or a later one."""
        return is_served(self.engine, route, self.settings.serve.live_after_s)

    def _ask(self, route: Route, path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            self.url + path,
            data=json.dumps(body).encode(),
            headers={"authorization": f"Bearer {self.key_for(route)}", "content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=self.settings.rollout.smoke_timeout_s) as response:
            answer: dict[str, Any] = json.load(response)
        return answer


class OwnKeys:
    """An API key for each tenant whose candidates the controller tries; revoked at the end.

    That of the configured tenant is made at once, so that routers know it when it is needed; others on demand. Those
    of a controller that was killed run out.
    """

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine, self.settings = engine, settings
        self._secrets: dict[str, tuple[str, float]] = {}
        if not self._given:
            self._secret_of(settings.tenant)

    @property
    def _given(self) -> str | None:
        return os.environ.get(self.settings.rollout.router_key_env)

    def __call__(self, route: Route) -> str:
        """The secret for the route's tenant."""
        return self._given or self._secret_of(route.tenant)

    def _secret_of(self, tenant: str) -> str:
        secret, renewed_at = self._secrets.get(tenant, ("", float("-inf")))
        if time.monotonic() - renewed_at > KEY_LIFETIME_S / 2:
            secret = create_key(
                self.engine, KEY_NAME, tenant, self.settings.workspace, ("chat",), lifetime_s=KEY_LIFETIME_S
            )
            self._secrets[tenant] = secret, time.monotonic()
        return secret

    def close(self) -> None:
        """Revoke these keys; a successor has its own."""
        mine = {digest_of(secret) for secret, _ in self._secrets.values()}
        for key in list_keys(self.engine):
            if key.digest in mine:
                revoke_key(self.engine, key.key_id)
        self._secrets.clear()


def command_steps(engine: Engine, settings: Settings) -> Steps:
    """The effects as a command on the terminal uses them: it writes the row and does not wait for routers."""
    registry = Registry(settings)
    return Steps(engine, registry, LiveServables(engine, registry, settings), NoRouters())


def controller_steps(engine: Engine, settings: Settings, keys: OwnKeys) -> Steps:
    """The effects as the controller uses them: it tries candidates and reads back what is served."""
    registry = Registry(settings)
    url = settings.rollout.router_url or f"http://{settings.serve.host}:{settings.serve.port}"
    held = LiveServables(engine, registry, settings, applications(engine, settings))
    return Steps(engine, registry, held, HttpRouters(engine, url, settings, keys))


def applications(engine: Engine, settings: Settings) -> Applications | None:
    """The applications of candidates; `None` where no driver is configured."""
    given = settings.rollout.applications
    return None if given.driver == "none" else Applications(engine, lambda: make_driver(given), given.linger_s)


def make_driver(given: ApplicationSettings) -> Driver:
    """The configured driver.

    Raises:
        ConfigError: its API has no address.
    """
    if given.driver == "rayservice":
        return RayServiceDriver(access(given), given)
    return ServeRestDriver(Api(given.dashboard_url or dashboard_url(), given.timeout_s), given.template)


def _shown(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code}: {error.read(200).decode(errors='replace')}"
    return str(error) or type(error).__name__
