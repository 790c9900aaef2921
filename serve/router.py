"""The router: one raw ASGI callable in front of everything.

Who asks is decided by the key, who answers by the snapshot (`serve.snapshot`); completions are in `serve.chat`,
what clients report in `serve.intake_http`. No framework: every layer here is paid for by
every request.
"""

import asyncio
import functools
import logging
import os
import random
from typing import Any

import orjson
from sqlalchemy.engine import Engine

from cluster import metrics
from cluster.settings import Settings
from data.alerts import alert
from data.events import Event
from data.feedback import pseudonym_secret
from data.group_commit import GroupCommit
from data.intake.batches import Intake
from data.log import EventLog
from serve import intake_http, labels_http, otlp_http, users_http
from serve.anomalies import AnomalyWatch
from serve.capture import Capture
from serve.chat import Companions, CompletionHandler
from serve.engine_waking import EngineWaker
from serve.engines.token import engine_token
from serve.exchange import CHAT, TEXT, Engines, View
from serve.finetuning.http import ROUTES as FINETUNING
from serve.finetuning.http import FinetuningHandler, is_ours
from serve.intake_http import IntakeHandler
from serve.jwt_keys import JwtKeys
from serve.keys import Key
from serve.limits import KeyLimits
from serve.openai import (
    JSON,
    ApiError,
    ClientGoneError,
    ClientWatch,
    Headers,
    Receive,
    Scope,
    Send,
    header,
    refuse_websocket,
    send_error,
    send_response,
    sending_within,
    text_header,
)
from serve.openapi.document import PATH as OPENAPI
from serve.openapi.document import document as openapi_document
from serve.places import Places
from serve.prompts import PromptPolicy
from serve.shadow import Shadow
from serve.snapshot import Snapshot, Watcher
from serve.status_pages import STATUS, StatusPages

log = logging.getLogger(__name__)

GRADERS = tuple(f"/v1/fine_tuning/alpha/graders/{action}" for action in ("run", "validate"))
"""Where OpenAI's clients look for the grader: told its place, they send the request there."""
METHODS = {
    CHAT: "POST",
    TEXT: "POST",
    "/v1/models": "GET",
    STATUS: "GET",
    "/healthz": "GET",
    "/metrics": "GET",
    OPENAPI: "GET",
    users_http.PATH: "DELETE",
    labels_http.QUEUE: "GET",
    labels_http.LABELS: "POST",
} | dict.fromkeys(intake_http.KINDS, "POST")


def operations() -> list[tuple[str, str]]:
    """Method and path of everything that the router answers, as its OpenAPI document names them."""
    plain = [(method, path) for path, method in METHODS.items()]
    return sorted(plain + [(method, path) for _, path, methods in FINETUNING for method in methods])


class RouterApp:
    """The ASGI application of one replica.

    `standalone`: notice by itself when a client goes away, and send `x-request-id`. Ray Serve does both
    from outside, and doing them twice would cost time and give the header twice.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        default_engine_url: str | None = None,
        standalone: bool = True,
        policy: PromptPolicy | None = None,
    ) -> None:
        self.settings = settings
        self._standalone = standalone
        serve = settings.serve
        self._completing = Places(serve.max_ongoing_requests, serve.retry_after_s)
        self._others = Places(serve.max_ongoing_requests, serve.retry_after_s)
        """Slow senders of feedback or files must not keep those out who chat, nor the other way round."""
        self._commit: GroupCommit | None = None
        on = settings.learning.enabled and settings.capture.enabled
        tell = functools.partial(alert, settings)
        self._capture = Capture(settings.serve.capture, settings.log, settings.home, tell) if on else None
        self._intake = IntakeHandler(settings)
        self._finetuning = FinetuningHandler(settings)
        self._users = users_http.UsersHandler(settings)
        self._labels = labels_http.LabelsHandler(settings)
        self._tokens = JwtKeys(settings)
        self._limits = KeyLimits(settings.serve.limits, settings.serve.router_replicas)
        self._anomalies = AnomalyWatch(settings.serve.anomaly)
        self.watcher = Watcher(settings, self._database_found, self._at_each_poll)
        url = default_engine_url or f"http://{settings.serve.host}:{settings.serve.port}/engine"
        engines = Engines(settings.serve, url, os.environ, engine_token(settings))
        self._waker = EngineWaker(settings, engines.application_url)
        shadow = self._shadow(engines)
        companions = Companions(self._limits, self._anomalies, self._capture, shadow, policy)
        self._completions = CompletionHandler(settings.serve, engines, companions, pseudonym_secret(settings))
        self._pages = StatusPages(self.watcher, self._anomalies, self._completions.breaker_states, settings.tenant)

    def _shadow(self, engines: Engines) -> Shadow | None:
        shadow, most = self.settings.shadow, self.settings.serve.max_ongoing_requests
        if not shadow.enabled or self._capture is None:
            return None

        def busy() -> bool:
            return self._completing.taken > shadow.max_load * most

        return Shadow(self.settings, engines, self._capture, lambda: self.watcher.current, busy)

    def start(self) -> None:
        """Begin to read routes and keys."""
        self.watcher.start()
        if self._tokens.is_on:
            self._tokens.start()

    def reconfigure(self, document: Any) -> None:
        """Take a deployment config; never raises."""
        self.watcher.configure(document)

    def stop(self) -> None:
        """Bring what waits to the log and end."""
        self._tokens.stop()
        self.watcher.stop()
        if self._capture is not None:
            self._capture.close()
        if self._commit is not None:
            self._commit.close()
        self.watcher.close()

    def _database_found(self, engine: Engine) -> None:
        self._commit = GroupCommit(EventLog(engine), self.settings.log, self._queue_was_full)
        self._intake.intake = Intake(self._commit, self.settings)
        self._finetuning.database = engine
        self._users.engine = engine
        self._labels.reach(engine, self._commit)
        if self._capture is not None:
            self._capture.commit = self._commit

    def _at_each_poll(self, engine: Engine, snapshot: Snapshot) -> None:
        """In the watcher's thread, with the database at hand."""
        self._limits.exchange(engine)
        self._waker.wake(engine)
        found = self._anomalies.check(snapshot.routes.values())
        if found:
            repeat_s = self.settings.serve.anomaly.repeat_s
            EventLog(engine).append([a.event(self.settings.workspace, repeat_s) for a in found])
            self._anomalies.told(found)
        for anomaly in found:
            log.warning(
                "version %s of %s: %s %.3g, above %.3g over %d requests",
                anomaly.version, anomaly.route.agent, anomaly.signal, anomaly.value, anomaly.limit, anomaly.requests,
            )  # fmt: skip

    def _queue_was_full(self, refused: int) -> Event:
        reason = f"{refused} events were turned away while log.queue_events={self.settings.log.queue_events} waited"
        return alert(self.settings, "queue_full", reason, {"refused": refused})

    # ASGI

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, or the life of the server."""
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:
            await refuse_websocket(send)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                self.start()
                await send({"type": "lifespan.startup.complete"})
            elif message["type"] == "lifespan.shutdown":
                self._completions.close()
                await asyncio.to_thread(self.stop)
                await send({"type": "lifespan.shutdown.complete"})
                return

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = users_http.PATH if scope["path"].startswith(users_http.PREFIX) else scope["path"]
        request_id = text_header(scope, b"x-request-id") or f"{random.getrandbits(128):032x}"
        headers: Headers = [(b"x-request-id", request_id.encode())] if self._standalone else []
        started = False

        async def tracked(message: dict[str, Any]) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            status = await self._answer(path, scope, receive, tracked, request_id, headers)
        except ApiError as error:
            status = error.status
            if not started:
                await _refuse(scope, send, error, headers)
        except ClientGoneError:
            status = 499
        except Exception:
            log.exception("request %s failed", request_id)
            status = 500
            if started:
                raise
            await send_error(
                send,
                ApiError(500, "The router failed; the request may be sent again.", code="internal_error"),
                headers,
            )
        metrics.REQUESTS.labels(path if path in METHODS else "other", str(status)).inc()

    async def _answer(
        self, path: str, scope: Scope, receive: Receive, send: Send, request_id: str, headers: Headers
    ) -> int:
        if is_ours(path):
            snapshot = self._snapshot()
            with self._others.one():
                return await self._finetuning.handle(
                    scope, receive, send, lambda needed: self._key(scope, needed), snapshot, headers
                )
        if path in GRADERS:
            await send_response(send, 307, b"", [(b"location", b"../../../../grader" + path.encode()), *headers])
            return 307
        wanted = METHODS.get(path)
        if wanted is None:
            raise ApiError(404, f"There is nothing at {path}.", code="unknown_url")
        if scope["method"] != wanted and (wanted, scope["method"]) != ("GET", "HEAD"):
            headers.append((b"allow", wanted.encode()))
            raise ApiError(405, f"{path} takes {wanted}, not {scope['method']}.", code="method_not_allowed")
        if path in (CHAT, TEXT):
            return await self._bounded(scope, receive, send, request_id, headers)
        if path in intake_http.KINDS:
            key = self._key(scope, intake_http.SCOPE)
            with self._others.one():
                return await self._intake.handle(path, scope, receive, send, key, headers)
        if path in (labels_http.QUEUE, labels_http.LABELS):
            key = self._key(scope, labels_http.SCOPE)
            with self._others.one():
                return await self._labels.handle(path, scope, receive, send, key, headers)
        if path == users_http.PATH:
            key = self._key(scope, users_http.SCOPE)
            with self._others.one():
                return await self._users.handle(scope, send, key, headers)
        if path == OPENAPI:  # what it is made of takes seconds to import, once
            await send_response(send, 200, await asyncio.to_thread(openapi_document), [JSON, *headers])
            return 200
        status, body, kind = self._page(path, scope)
        await send_response(send, status, body, [kind, *headers])
        return status

    async def _bounded(self, scope: Scope, receive: Receive, send: Send, request_id: str, headers: Headers) -> int:
        key = self._key(scope, "chat")
        send = sending_within(send, self.settings.serve.write_timeout_s)
        with self._completing.one():
            if self._standalone:
                return await self._watched(scope, receive, send, key, request_id, headers)
            return await self._complete(scope, receive, send, key, request_id, headers)

    async def _complete(
        self, scope: Scope, receive: Receive, send: Send, key: Key, request_id: str, headers: Headers
    ) -> int:
        view = View(self.watcher.current, self.watcher.endpoints)
        return await self._completions.handle(scope, receive, send, key, view, request_id, headers)

    async def _watched(
        self, scope: Scope, receive: Receive, send: Send, key: Key, request_id: str, headers: Headers
    ) -> int:
        watch = ClientWatch(receive)
        try:
            return await self._complete(scope, watch.receive, send, key, request_id, headers)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not watch.gone or task is None:
                raise
            task.uncancel()
            raise ClientGoneError from None
        finally:
            watch.close()

    def _key(self, scope: Scope, needed: str) -> Key:
        snapshot = self._snapshot()
        given = header(scope, b"authorization") or b""
        kind, _, secret = given.partition(b" ")
        key = self._found(snapshot, secret.strip().decode("latin-1")) if kind.lower() == b"bearer" else None
        if key is None:
            message = (
                "The API key is wrong, revoked or expired."
                if given
                else "No API key; send `Authorization: Bearer rl-…`."
            )
            raise ApiError(401, message, code="invalid_api_key")
        if not key.may(needed):
            raise ApiError(403, f"The key {key.name} does not have the scope {needed}.", code="insufficient_scope")
        self._limits.admit(key)
        return key

    def _found(self, snapshot: Snapshot, secret: str) -> Key | None:
        return snapshot.keys.find(secret) or self._tokens.find(secret)

    def _snapshot(self) -> Snapshot:
        snapshot = self.watcher.current
        if not snapshot.read_at:
            raise ApiError(
                503, "Routes and keys have not been read yet; the database does not answer.",
                code="not_ready", retry_after_s=self.settings.serve.retry_after_s,
            )  # fmt: skip
        return snapshot

    # small pages

    def _page(self, path: str, scope: Scope) -> tuple[int, bytes, tuple[bytes, bytes]]:
        if path == "/metrics":
            if not self.settings.serve.open_metrics:
                self._require_operator(scope)
            return 200, metrics.exposition(), metrics.CONTENT_TYPE
        if path == "/healthz":
            status, document = self._pages.health()
            return status, orjson.dumps(document), JSON
        key, snapshot = self._key(scope, "chat"), self._snapshot()
        document = self._pages.models(key, snapshot) if path == "/v1/models" else self._pages.status(key, snapshot)
        return 200, orjson.dumps(document), JSON

    def _require_operator(self, scope: Scope) -> None:
        """What names every tenant is for an admin of the tenant that runs the installation."""
        key = self._key(scope, "admin")
        if key.tenant != self.settings.tenant:
            raise ApiError(403, f"The key {key.name} is of another tenant.", code="insufficient_scope")


async def _refuse(scope: Scope, send: Send, error: ApiError, headers: Headers) -> None:
    if scope["path"] == otlp_http.PATH and otlp_http.is_protobuf(scope):
        await otlp_http.send_status(send, error, headers)
    else:
        await send_error(send, error, headers)
