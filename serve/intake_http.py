"""What clients report over HTTP: feedback, behaviour, outcomes, trajectories and traces.

A batch is acknowledged only after its commit, and each item has its own answer. `/v1/traces` takes our own
JSON, and OTLP (`serve.otlp_http`).
"""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import orjson

from cluster import metrics
from cluster.errors import ConflictError, InputError, OverloadedError, UnavailableError
from cluster.settings import Settings
from cluster.settings.serving import ServeSettings
from data.intake.batches import Intake, ItemResult, items_in, read_document
from data.intake.items import Identity
from serve import otlp_http
from serve.keys import Key
from serve.openai import JSON, ApiError, Headers, Receive, Scope, Send, read_body, send_response

KINDS: dict[str, str | None] = {
    "/v1/feedback": "feedback",
    "/v1/behaviour": "behaviour",
    "/v1/outcomes": "outcome",
    "/v1/trajectories": "trajectory",
    otlp_http.PATH: None,
}
"""Path -> the kind of its items; `None` where each item names its own."""
SCOPE = "feedback"
Reply = tuple[int, bytes, tuple[bytes, bytes]]


@dataclass(slots=True)
class IntakeHandler:
    """The intake routes. `intake` appears once the database has answered for the first time."""

    settings: Settings
    intake: Intake | None = None

    async def handle(self, path: str, scope: Scope, receive: Receive, send: Send, key: Key, headers: Headers) -> int:
        """Take one body in; returns the status sent: 400 where no item was good, with the answer of each beside.

        Raises:
            ApiError: the whole body is refused; otherwise each item has its own answer.
        """
        serve = self.settings.serve
        body = await read_body(scope, receive, serve.max_batch_bytes, serve.body_timeout_s)
        identity = Identity(key.tenant, key.workspace, key.user_tier)
        with in_api_shape(serve):
            status, answer, kind = await self._answer(path, scope, body, identity)
        await send_response(send, status, answer, [kind, *headers])
        return status

    async def _answer(self, path: str, scope: Scope, body: bytes, identity: Identity) -> Reply:
        """Status, body and content type of the response."""
        if path == otlp_http.PATH and otlp_http.is_protobuf(scope):
            return await self._spans(await asyncio.to_thread(otlp_http.read_protobuf, body), identity, protobuf=True)
        document = read_document(body)
        if path == otlp_http.PATH and otlp_http.is_export(document):
            return await self._spans(await asyncio.to_thread(otlp_http.read_json, document), identity, protobuf=False)
        kind = KINDS[path]
        results = await self._take_in(items_in(document, self.settings), kind, identity)
        _count(kind or "trace", results)
        shown: dict[str, Any] = {"object": "list", "data": [result.as_dict() for result in results]}
        none_good = bool(results) and all(result.status == "rejected" for result in results)
        if none_good:
            shown["error"] = shown["data"][0]["error"]
        return 400 if none_good else 200, orjson.dumps(shown), JSON

    async def _spans(self, read: otlp_http.Read, identity: Identity, *, protobuf: bool) -> Reply:
        results = await self._take_in(read.items, None, identity)
        _count("span", results)
        metrics.INTAKE.labels("span", "rejected").inc(len(read.problems))
        metrics.INTAKE.labels("span", "ignored").inc(read.ignored)
        return 200, *otlp_http.response(read, results, protobuf=protobuf)

    async def _take_in(self, items: Sequence[Any], kind: str | None, identity: Identity) -> list[ItemResult]:
        if self.intake is None:
            raise UnavailableError("the event log has not been reached yet; send it again")
        return await asyncio.wait_for(
            self.intake.take_in(items, kind, identity), self.settings.serve.feedback_timeout_s
        )


@contextmanager
def in_api_shape(serve: ServeSettings) -> Iterator[None]:
    """What the log refuses, as clients expect to be told."""
    try:
        yield
    except InputError as error:
        raise ApiError(400, str(error), code="invalid_value", param=error.field) from None
    except ConflictError as error:
        raise ApiError(403, str(error), code="feature_disabled", type="permission_error") from None
    except OverloadedError as error:
        raise ApiError(429, str(error), code="overloaded", retry_after_s=error.retry_after_s) from None
    except (UnavailableError, TimeoutError) as error:
        message = str(error) or f"the event log did not answer within {serve.feedback_timeout_s:g} s; send it again"
        raise ApiError(503, message, code="log_unavailable", retry_after_s=serve.retry_after_s) from None


def _count(kind: str, results: Sequence[ItemResult]) -> None:
    for result in results:
        metrics.INTAKE.labels(kind, result.status).inc()
