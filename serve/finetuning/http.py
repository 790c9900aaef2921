"""The routes under `/v1/files` and `/v1/fine_tuning/jobs`, and the models that come of them."""

import asyncio
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from sqlalchemy.engine import Engine

from cluster.errors import ConflictError, InputError, NotFoundError, OverloadedError, UnavailableError
from cluster.settings import Settings
from data.finetuning.rows import LineError
from data.finetuning.uploads import Uploads
from serve.asgi import send_json
from serve.finetuning.files_http import FileRoutes
from serve.finetuning.jobs_http import JobRoutes
from serve.finetuning.objects import Json, file_object
from serve.keys import Key
from serve.openai import ApiError, Headers, Receive, Scope, Send, parse_object, read_body, unknown_model
from serve.query import Query
from serve.servables import unwant
from serve.snapshot import Snapshot

SCOPE = "train"
PREFIXES = ("/v1/files", "/v1/fine_tuning/jobs", "/v1/models/")
ACTIONS = ("pause", "resume", "cancel")
ROUTES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("files", "/v1/files", ("GET", "POST")),
    ("file", "/v1/files/{file_id}", ("GET", "DELETE")),
    ("content", "/v1/files/{file_id}/content", ("GET",)),
    ("jobs", "/v1/fine_tuning/jobs", ("GET", "POST")),
    ("job", "/v1/fine_tuning/jobs/{job_id}", ("GET",)),
    *((action, f"/v1/fine_tuning/jobs/{{job_id}}/{action}", ("POST",)) for action in ACTIONS),
    ("events", "/v1/fine_tuning/jobs/{job_id}/events", ("GET",)),
    ("checkpoints", "/v1/fine_tuning/jobs/{job_id}/checkpoints", ("GET",)),
    ("model", "/v1/models/{model}", ("GET", "DELETE")),
)
"""Name, path and methods of each."""
PARTS = {"{model}": r"([^\0]+)", "{file_id}": r"([^/\0]+)", "{job_id}": r"([^/\0]+)"}
"""What may stand for a part of a path: a model's name may hold slashes, and no name holds a NUL character."""
PATTERNS = tuple(
    (name, re.compile(re.sub(r"\{\w+\}", lambda part: PARTS[part[0]], path)), methods) for name, path, methods in ROUTES
)


def is_ours(path: str) -> bool:
    """True for a path that `FinetuningHandler` answers."""
    return path.startswith(PREFIXES)


@dataclass(slots=True)
class FinetuningHandler:
    """Answers every request about files and jobs. `database` appears once it has answered for the first time."""

    settings: Settings
    database: Engine | None = None
    _files: FileRoutes = field(init=False)
    _jobs: JobRoutes = field(init=False)

    def __post_init__(self) -> None:
        self._files, self._jobs = FileRoutes(self.settings), JobRoutes(self.settings)

    async def handle(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        key_of: Callable[[str], Key],
        snapshot: Snapshot,
        headers: Headers,
    ) -> int:
        """Answer one request; returns the status sent. `key_of` finds the caller's key for a scope, or refuses it.

        Raises:
            ApiError: the request is refused.
        """
        name, arguments = _route(scope, headers)
        key = key_of("chat" if (name, scope["method"]) == ("model", "GET") else SCOPE)
        if self.database is None:
            raise ApiError(
                503, "The database has not been reached yet; try again.",
                code="not_ready", retry_after_s=self.settings.serve.retry_after_s,
            )  # fmt: skip
        with _in_openai_shape(self.settings.serve.retry_after_s):
            if name == "content":
                await self._files.content(self._uploads(key), arguments[0], send, headers)
            elif name == "events" and Query(scope).choice("stream", ("false", "true")) == "true":
                await self._jobs.stream(self.database, key, arguments[0], Query(scope), receive, send, headers)
            else:
                answer = await self._answer(name, arguments, scope, receive, key, snapshot, self.database)
                await send_json(send, answer, headers=headers)
        return 200

    async def _answer(
        self, name: str, arguments: tuple[str, ...], scope: Scope, receive: Receive, key: Key,
        snapshot: Snapshot, database: Engine,
    ) -> Json:  # fmt: skip
        query, post = Query(scope), scope["method"] == "POST"
        match name:
            case "files" if post:
                return await self._files.upload(self._uploads(key), scope, receive)
            case "files":
                return await self._files.list(self._uploads(key), query)
            case "file" if scope["method"] == "DELETE":
                return await self._files.delete(self._uploads(key), arguments[0])
            case "file":
                return file_object(await asyncio.to_thread(self._uploads(key).get, arguments[0]))
            case "jobs" if post:
                serve = self.settings.serve
                body = await read_body(scope, receive, serve.max_body_bytes, serve.body_timeout_s)
                return await self._jobs.create(database, key, snapshot, scope, parse_object(body))
            case "jobs":
                return await self._jobs.list(database, key, query)
            case "job":
                return await self._jobs.retrieve(database, key, arguments[0])
            case action if action in ACTIONS:
                return await self._jobs.act(database, key, arguments[0], action)
            case "model":
                return await asyncio.to_thread(_model, scope["method"], arguments[0], key, snapshot, database)
            case "events":
                return await self._jobs.events(database, key, arguments[0], query)
            case _:
                return await self._jobs.checkpoints(database, key, arguments[0], query)

    def _uploads(self, key: Key) -> Uploads:
        assert self.database is not None
        return Uploads(self.database, self.settings.files_root, key.tenant, key.workspace)


def _model(method: str, name: str, key: Key, snapshot: Snapshot, database: Engine) -> Json:
    """One model; a deleted fine-tuned one is no longer served, its version stays in the registry."""
    if name not in snapshot.known_models(key.tenant):
        raise unknown_model(name, snapshot.known_models(key.tenant))
    if method == "GET":
        return {"id": name, "object": "model", "created": 0, "owned_by": key.tenant}
    if not name.startswith("ft:"):
        raise ConflictError(f"{name!r} is no fine-tuned model; its route decides whether it is served")
    version = snapshot.targets[name].version
    routes = [route.agent for route in snapshot.routes.values() if version in route.versions]
    if routes:
        raise ConflictError(f"{name!r} answers for {', '.join(routes)}; take it out of the route first")
    unwant(database, version)
    return {"id": name, "object": "model", "deleted": True}


def _route(scope: Scope, headers: Headers) -> tuple[str, tuple[str, ...]]:
    """The name of the route and the parts of the path that it names.

    Raises:
        ApiError: 404 or 405.
    """
    path, method = scope["path"], scope["method"]
    for name, pattern, methods in PATTERNS:
        match = pattern.fullmatch(path)
        if match is None:
            continue
        if method not in methods:
            allowed = ", ".join(methods)
            headers.append((b"allow", allowed.encode()))
            raise ApiError(405, f"{path} takes {allowed}, not {method}.", code="method_not_allowed")
        return name, match.groups()
    raise ApiError(404, f"There is nothing at {path}.", code="unknown_url")


@contextmanager
def _in_openai_shape(retry_after_s: float) -> Iterator[None]:
    """Our errors as OpenAI's clients expect them."""
    try:
        yield
    except LineError as error:
        raise ApiError(400, str(error), code="invalid_file", param=f"file.line.{error.line}") from None
    except InputError as error:
        raise ApiError(400, str(error), code="invalid_value", param=error.field) from None
    except NotFoundError as error:
        raise ApiError(404, str(error), code="not_found") from None
    except ConflictError as error:
        raise ApiError(409, str(error), code="wrong_state", retry=False) from None
    except OverloadedError as error:
        raise ApiError(429, str(error), code="limit_reached", retry_after_s=error.retry_after_s, retry=False) from None
    except UnavailableError as error:
        raise ApiError(503, str(error), code="unavailable", retry_after_s=retry_after_s) from None
