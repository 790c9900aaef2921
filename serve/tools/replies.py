"""Idempotency keys: a write that is sent again gets the first one's reply.

A row is taken before the write and holds the reply after it. While it is taken, the same key waits; a row that
was taken long ago belongs to a server that died, and the write, which is safe to repeat under its key, is made
again. A key sent with other arguments is refused.
"""

import hashlib
from typing import Any

import orjson
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from cluster.clock import SECOND_US, now_us
from cluster.database import write
from cluster.errors import ConflictError, InputError
from cluster.tables import tool_replies

DAY_S = 86_400
Owner = tuple[str, str, str]
"""Tenant, workspace and tool."""


class Replies:
    """The table of replies."""

    def __init__(self, database: Engine, *, taken_s: float, keep_days: float) -> None:
        self._database, self._taken_s, self._keep_days = database, taken_s, keep_days

    def begin(self, owner: Owner, key: str, arguments: Any) -> dict[str, Any] | None:
        """Take a key, or give the reply that it stands for.

        Raises:
            InputError: the key was used with other arguments.
            ConflictError: the first call is still under way.
        """
        digest = hashlib.sha256(orjson.dumps(arguments, option=orjson.OPT_SORT_KEYS)).hexdigest()
        row = {"arguments_digest": digest, "state": "taken", "reply": None, "begun_at_us": now_us()}
        try:
            with write(self._database).begin() as connection:
                connection.execute(tool_replies.insert().values(**_names(owner, key), **row))
            return None
        except sa.exc.IntegrityError:
            return self._known(owner, key, digest)

    def finish(self, owner: Owner, key: str, reply: dict[str, Any]) -> None:
        """Keep the reply of a write that was made."""
        with write(self._database).begin() as connection:
            done = tool_replies.update().where(_mine(owner, key)).values(state="done", reply=reply)
            connection.execute(done)

    def release(self, owner: Owner, key: str) -> None:
        """Give a key back: nothing was written under it."""
        with write(self._database).begin() as connection:
            connection.execute(tool_replies.delete().where(_mine(owner, key), tool_replies.c.state == "taken"))

    def forget_old(self) -> int:
        """Delete what is older than is kept; how many."""
        before = now_us() - round(self._keep_days * DAY_S * SECOND_US)
        with write(self._database).begin() as connection:
            return int(connection.execute(tool_replies.delete().where(tool_replies.c.begun_at_us < before)).rowcount)

    def _known(self, owner: Owner, key: str, digest: str) -> dict[str, Any] | None:
        with write(self._database).begin() as connection:
            row = connection.execute(sa.select(tool_replies).where(_mine(owner, key))).mappings().first()
            if row is None:
                raise ConflictError("another call with this idempotency key has just failed; send it again")
            if row["arguments_digest"] != digest:
                rule = "was used with other arguments"
                raise InputError("idempotency_key", key, rule, "make a new key for a new call")
            if row["state"] == "done":
                return dict(row["reply"])
            if now_us() - row["begun_at_us"] < self._taken_s * SECOND_US:
                raise ConflictError("a call with this idempotency key is under way; send it again later")
            connection.execute(tool_replies.update().where(_mine(owner, key)).values(begun_at_us=now_us()))
        return None


def _names(owner: Owner, key: str) -> dict[str, str]:
    return dict(zip(("tenant", "workspace", "tool"), owner, strict=True)) | {"idempotency_key": key}


def _mine(owner: Owner, key: str) -> sa.ColumnElement[bool]:
    return sa.and_(*[tool_replies.c[name] == value for name, value in _names(owner, key).items()])
