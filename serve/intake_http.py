"""Feedback, behaviour, outcomes and trajectories over HTTP: acknowledged only after the commit."""

import asyncio
from dataclasses import dataclass

import orjson

from cluster import metrics
from cluster.errors import ConflictError, InputError, OverloadedError, UnavailableError
from cluster.settings import Settings
from data.intake import Intake, ItemResult, read_items
from data.items import Identity
from serve.keys import Key
from serve.openai import ApiError, Headers, Receive, Scope, Send, read_body, send_response

PATHS = {
    "/v1/feedback": "feedback",
    "/v1/behaviour": "behaviour",
    "/v1/outcomes": "outcome",
    "/v1/trajectories": "trajectory",
}
SCOPE = "feedback"


@dataclass(slots=True)
class IntakeHandler:
    """The four intake routes. `intake` appears once the database has answered for the first time."""

    settings: Settings
    intake: Intake | None = None

    async def handle(self, kind: str, scope: Scope, receive: Receive, send: Send, key: Key, headers: Headers) -> int:
        """Take one body in; returns the status sent.

        Raises:
            ApiError: the whole body is refused; otherwise each item has its own answer.
        """
        serve = self.settings.serve
        body = await read_body(scope, receive, serve.max_body_bytes, serve.body_timeout_s)
        try:
            items = read_items(body, self.settings)
            results = await self._take_in(items, kind, Identity(key.tenant, key.workspace, key.user_tier))
        except InputError as error:
            raise ApiError(400, str(error), code="invalid_value", param=error.field) from None
        except ConflictError as error:
            raise ApiError(403, str(error), code="feature_disabled", type="permission_error") from None
        except OverloadedError as error:
            raise ApiError(429, str(error), code="overloaded", retry_after_s=error.retry_after_s) from None
        except (UnavailableError, TimeoutError) as error:
            message = str(error) or f"the event log did not answer within {serve.feedback_timeout_s:g} s; send it again"
            raise ApiError(503, message, code="log_unavailable", retry_after_s=serve.retry_after_s) from None
        for result in results:
            metrics.INTAKE.labels(kind, result.status).inc()
        await send_response(send, 200, _listed(results), [(b"content-type", b"application/json"), *headers])
        return 200

    async def _take_in(self, items: list[object], kind: str, identity: Identity) -> list[ItemResult]:
        if self.intake is None:
            raise UnavailableError("the event log has not been reached yet; send it again")
        return await asyncio.wait_for(
            self.intake.take_in(items, kind, identity), self.settings.serve.feedback_timeout_s
        )


def _listed(results: list[ItemResult]) -> bytes:
    return orjson.dumps({"object": "list", "data": [result.as_dict() for result in results]})
