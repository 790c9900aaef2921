"""`DELETE /v1/users/{id}`: a person is erased before the answer comes; asked again, the answer is the same."""

import asyncio
from dataclasses import dataclass

from sqlalchemy.engine import Engine

from cluster.errors import ConflictError, NotFoundError, UnavailableError
from cluster.settings import Settings
from data.feedback import pseudonym, pseudonym_secret
from serve.asgi import send_json
from serve.keys import Key
from serve.openai import ApiError, Headers, Scope, Send

PREFIX = "/v1/users/"
PATH = "/v1/users/{id}"
SCOPE = "erase"
LONGEST_USER = 256


@dataclass(slots=True)
class UsersHandler:
    """The route. `engine` appears once the database has answered for the first time."""

    settings: Settings
    engine: Engine | None = None

    async def handle(self, scope: Scope, send: Send, key: Key, headers: Headers) -> int:
        """Erase the user of the key's tenant that the path names; returns the status sent.

        Raises:
            ApiError: no such user, or the erasure could not be finished; it goes on with the next call.
        """
        from data.erasure.erase import erase
        from data.erasure.person import Person

        user = scope["path"].removeprefix(PREFIX)
        if not 0 < len(user) <= LONGEST_USER:
            raise ApiError(
                400, f"The user must have 1 to {LONGEST_USER} characters, not {len(user)}.",
                code="invalid_value", param="id",
            )  # fmt: skip
        retry_after_s = self.settings.serve.retry_after_s
        if self.engine is None:
            raise ApiError(
                503, "The event log has not been reached yet; send it again.",
                code="log_unavailable", retry_after_s=retry_after_s,
            )  # fmt: skip
        person = Person(key.tenant, pseudonym(pseudonym_secret(self.settings), key.tenant, user))
        try:
            report = await asyncio.to_thread(erase, self.engine, self.settings, person)
        except NotFoundError as error:
            raise ApiError(404, str(error), code="user_not_found", param="id") from None
        except ConflictError as error:
            raise ApiError(409, str(error), code="erasure_unfinished", retry_after_s=retry_after_s) from None
        except UnavailableError as error:
            raise ApiError(503, str(error), code="erasure_unfinished", retry_after_s=retry_after_s) from None
        await send_json(send, {"object": "user.erased", **report}, headers=headers)
        return 200
