"""The grader: turns answers into rewards over HTTP, in the shapes of OpenAI's grader API.

`POST /v1/graders/run` grades one answer (`model_sample`, `item`) or a batch (`items`), `/v1/graders/validate`
checks a configuration; both also answer under OpenAI's own path `/v1/fine_tuning/alpha/graders/…`. What is
not graded by the deadline, and whatever a grader cannot judge, is an abstention: reward null, never 0.
"""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
import ray.serve

from cluster.database import connect
from cluster.logs import configure_logging
from cluster.settings import Settings
from cluster.settings.engines import GraderSettings
from serve.grading_pool import GraderPool, WorkerError
from serve.keys import Key, KeyRing
from serve.openai import (
    JSON,
    ApiError,
    ClientGoneError,
    Receive,
    Scope,
    Send,
    header,
    parse_object,
    read_body,
    send_error,
    send_response,
)

log = logging.getLogger(__name__)

Json = dict[str, Any]
FindKey = Callable[[str], Awaitable[Key | None]]
SCOPE = "grade"
PREFIXES = ("/v1/graders/", "/v1/fine_tuning/alpha/graders/")
ERRORS: dict[str, Any] = {
    "formula_parse_error": False,
    "sample_parse_error": False,
    "truncated_observation_error": False,
    "unresponsive_reward_error": False,
    "invalid_variable_error": False,
    "other_error": False,
    "python_grader_server_error": False,
    "python_grader_server_error_type": None,
    "python_grader_runtime_error": False,
    "python_grader_runtime_error_details": None,
    "model_grader_server_error": False,
    "model_grader_refusal_error": False,
    "model_grader_parse_error": False,
    "model_grader_server_error_details": None,
}
"""OpenAI's error flags of one grade, none of them raised."""


class GraderApi:
    """The ASGI callable; `find_key` looks a bearer secret up."""

    def __init__(self, settings: GraderSettings, find_key: FindKey) -> None:
        self._settings, self._find_key = settings, find_key
        self.pool = GraderPool(settings)
        self.abstained = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or start and stop with the server."""
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        try:
            body = await self._answer(path, scope, receive)
            await send_response(send, 200, orjson.dumps(body), [JSON])
        except ApiError as error:
            await send_error(send, error)
        except ClientGoneError:
            log.debug("client left before its request was whole")

    async def _answer(self, path: str, scope: Scope, receive: Receive) -> Json:
        if path == "/healthz":
            return {"status": "ok", "waiting": self.pool.waiting, "replaced": self.pool.replaced}
        action = next((path.removeprefix(p) for p in PREFIXES if path.startswith(p)), None)
        if action not in ("run", "validate"):
            raise ApiError(404, f"There is no {path} here; known is {PREFIXES[0]}run and validate.", code="not_found")
        if scope["method"] != "POST":
            raise ApiError(405, f"{path} answers POST only.", code="method_not_allowed")
        await self._authorise(scope)
        deadline = asyncio.get_running_loop().time() + self._settings.deadline_s
        limit, timeout_s = self._settings.max_body_bytes, self._settings.body_timeout_s
        document = parse_object(await read_body(scope, receive, limit, timeout_s))
        grader = document.get("grader")
        if not isinstance(grader, dict):
            raise ApiError(400, "grader must be an object with a type.", param="grader", code="invalid_value")
        return await (self._validate(grader) if action == "validate" else self._run(grader, document, deadline))

    async def _authorise(self, scope: Scope) -> None:
        kind, _, secret = (header(scope, b"authorization") or b"").partition(b" ")
        key = await self._find_key(secret.strip().decode("latin-1")) if kind.lower() == b"bearer" else None
        if key is None:
            raise ApiError(401, "The API key is missing, wrong, revoked or expired.", code="invalid_api_key")
        if not key.may(SCOPE):
            message = f"The key {key.name} does not have the scope {SCOPE}."
            raise ApiError(403, message, code="insufficient_scope")

    async def _validate(self, grader: Json) -> Json:
        deadline = asyncio.get_running_loop().time() + self._settings.deadline_s
        try:
            reply = await self.pool.ask({"grader": grader}, deadline)
        except (TimeoutError, WorkerError):
            raise self._busy("The grader could not be checked in time.", 503) from None
        _refuse_invalid(reply)
        return {"grader": grader, "name": reply["name"], "version": reply["version"]}

    async def _run(self, grader: Json, document: Json, deadline: float) -> Json:
        batch = "items" in document
        entries = document["items"] if batch else [document]
        if not isinstance(entries, list) or not 0 < len(entries) <= self._settings.max_batch:
            message = f"items must be a list of 1 to {self._settings.max_batch} answers."
            raise ApiError(400, message, param="items", code="invalid_value")
        tasks = [_task(grader, entry, f"items.{i}." if batch else "") for i, entry in enumerate(entries)]
        if self.pool.waiting + len(tasks) > self._settings.max_queued:
            raise self._busy("Too many answers wait to be graded.", 429)
        async with asyncio.TaskGroup() as group:
            grades = [group.create_task(self._grade(task, deadline)) for task in tasks]
        results = [grade.result() for grade in grades]
        invalid = next((r for r in results if "invalid" in r), None)
        if invalid is not None:
            _refuse_invalid(invalid)
        return {"object": "list", "data": results} if batch else results[0]

    async def _grade(self, task: Json, deadline: float) -> Json:
        began = time.perf_counter()
        try:
            reply = await self.pool.ask(task, deadline)
        except TimeoutError:
            reason = f"no grade within {self._settings.deadline_s:g} s"
            reply = {"reward": None, "reason": reason, "error": "unresponsive_reward_error"}
        except WorkerError as error:
            reply = {"reward": None, "reason": str(error), "error": "other_error"}
        if "invalid" in reply:
            return reply
        if "failed" in reply:
            reply = {"reward": None, "reason": reply["failed"], "error": "other_error"}
        self.abstained += reply["reward"] is None
        return _grade_document(task["grader"], reply, time.perf_counter() - began)

    def _busy(self, message: str, status: int) -> ApiError:
        return ApiError(status, message, code="grader_overloaded", retry_after_s=self._settings.retry_after_s)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                await self.pool.start()
                await send({"type": "lifespan.startup.complete"})
            elif message["type"] == "lifespan.shutdown":
                await self.pool.close()
                await send({"type": "lifespan.shutdown.complete"})
                return


def _task(grader: Json, entry: Any, where: str) -> Json:
    """One answer as a worker takes it: `sample` from `model_sample`, with its JSON where it is JSON.

    Raises:
        ApiError: 400 with the name of the field.
    """
    if not isinstance(entry, dict):
        raise ApiError(400, "must be an object", param=where.rstrip("."), code="invalid_value")
    item, text = entry.get("item") or {}, entry.get("model_sample")
    if not isinstance(text, str):
        raise ApiError(400, "model_sample must be a text.", param=f"{where}model_sample", code="invalid_value")
    if not isinstance(item, dict):
        raise ApiError(400, "item must be an object.", param=f"{where}item", code="invalid_value")
    sample: Json = {"output_text": text}
    with contextlib.suppress(ValueError, RecursionError):
        sample["output_json"] = json.loads(text)
    if isinstance(entry.get("output_tools"), list):
        sample["output_tools"] = entry["output_tools"]
    return {"grader": grader, "item": item, "sample": sample}


def _grade_document(grader: Json, reply: Json, seconds: float) -> Json:
    error = reply.get("error")
    metadata = {
        "name": reply.get("name") or grader.get("name") or "grader",
        "type": grader.get("type"),
        "errors": ERRORS | ({error: True} if error else {}),
        "execution_time": seconds,
        "scores": reply.get("scores") or {},
        "token_usage": None,
        "sampled_model_name": None,
        "grader_version": reply.get("version"),
        "abstained": reply["reward"] is None,
        "reason": reply.get("reason") or "",
    }
    return {
        "reward": reply["reward"],
        "metadata": metadata,
        "sub_rewards": reply.get("scores") or {},
        "model_grader_token_usage_per_model": {},
    }


def _refuse_invalid(reply: Json) -> None:
    if "invalid" in reply:
        raise ApiError(400, reply["invalid"], param=reply.get("field"), code="invalid_grader")


class KnownKeys:
    """API keys from the database, read again when older than `refresh_s`; a failure keeps the last ones."""

    def __init__(self, settings: Settings, refresh_s: float) -> None:
        self._settings, self._refresh_s = settings, refresh_s
        self._database: Any = None
        self._ring = KeyRing()
        self._read_at = float("-inf")
        self._reading = asyncio.Lock()

    async def find(self, secret: str) -> Key | None:
        """The key behind a secret."""
        async with self._reading:
            if time.monotonic() - self._read_at > self._refresh_s:
                self._read_at = time.monotonic()
                await asyncio.to_thread(self._read)
        return self._ring.find(secret)

    def _read(self) -> None:
        try:
            if self._database is None:
                self._database = connect(self._settings)
            self._ring = KeyRing.read(self._database)
        except Exception as error:  # whatever the database says, the keys known so far stay good
            log.warning("API keys could not be read (%s); the last known ones stay in use", error)


@ray.serve.deployment(name="Grader")
@ray.serve.ingress()
class GraderReplica:
    """One replica of the grader."""

    def __init__(self, settings: Settings) -> None:
        configure_logging(settings.logging)
        self._settings = settings

    async def __serve_build_asgi_app__(self) -> GraderApi:
        """The application of this replica."""
        grader = self._settings.grader
        return GraderApi(grader, KnownKeys(self._settings, grader.keys_refresh_s).find)


def build(settings: Settings) -> Any:
    """The application, at `/grader`."""
    deployment: Any = GraderReplica  # the decorator made a deployment of the class
    return deployment.options(
        num_replicas=settings.grader.replicas,
        max_ongoing_requests=settings.grader.max_queued,
        ray_actor_options={"num_cpus": settings.grader.cpus},
        graceful_shutdown_wait_loop_s=0.2,
    ).bind(settings)
