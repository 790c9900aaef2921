"""API keys: bearer secrets `rl-…`, of which only the SHA-256 is kept.

A key is bound to a tenant, a workspace, scopes and limits. Routers hold all live keys in a `KeyRing` that is
read again with every poll, so a new, rotated or revoked key takes effect within seconds.
"""

import hashlib
import hmac
import secrets
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from cluster.clock import SECOND_US, now_us
from cluster.database import write
from cluster.errors import InputError, NotFoundError
from cluster.tables import api_keys, key_usage

PREFIX = "rl-"
SCOPES = ("chat", "feedback", "label", "owner", "admin", "tools", "grade", "train", "erase")
LAST_US = 2**63 - 1
EVERYDAY = ("chat", "feedback")
"""Scopes of a key when none are named."""


@dataclass(frozen=True, slots=True)
class Key:
    """What is known of a key; never its secret."""

    digest: str
    key_id: str
    name: str
    tenant: str
    workspace: str
    scopes: frozenset[str]
    user_tier: str | None
    created_at_us: int
    expires_at_us: int | None
    revoked_at_us: int | None
    requests_per_minute: int | None = None
    tokens_per_day: int | None = None

    def may(self, scope: str) -> bool:
        """True when the key carries the scope; `admin` carries all."""
        return scope in self.scopes or "admin" in self.scopes


def digest_of(secret: str) -> str:
    """What is stored of a secret."""
    return hashlib.sha256(secret.encode()).hexdigest()


def create_key(
    engine: Engine,
    name: str,
    tenant: str,
    workspace: str,
    scopes: Sequence[str] = EVERYDAY,
    *,
    user_tier: str | None = None,
    lifetime_s: float | None = None,
    requests_per_minute: int | None = None,
    tokens_per_day: int | None = None,
) -> str:
    """Make a key and return its secret, which nobody can read again.

    Raises:
        InputError: no scope, one that does not exist, or a limit below 1.
    """
    for limit, value in (("requests_per_minute", requests_per_minute), ("tokens_per_day", tokens_per_day)):
        if value is not None and value < 1:
            raise InputError(limit, value, "must be at least 1", "leave it out for no limit; `revoke` ends a key")
    if not scopes or set(scopes) - set(SCOPES):
        raise InputError("scopes", ",".join(scopes), f"must be some of {', '.join(SCOPES)}", "name known scopes")
    created = now_us()
    secret = PREFIX + secrets.token_urlsafe(32)
    key = Key(
        digest=digest_of(secret),
        key_id=uuid.uuid4().hex[:12],
        name=name,
        tenant=tenant,
        workspace=workspace,
        scopes=frozenset(scopes),
        user_tier=user_tier,
        created_at_us=created,
        expires_at_us=None if lifetime_s is None else created + round(lifetime_s * SECOND_US),
        revoked_at_us=None,
        requests_per_minute=requests_per_minute,
        tokens_per_day=tokens_per_day,
    )
    with write(engine).begin() as connection:
        connection.execute(api_keys.insert().values(**_row(key)))
    return secret


def _row(key: Key) -> dict[str, object]:
    return {name: getattr(key, name) for name in Key.__slots__} | {"scopes": sorted(key.scopes)}


def list_keys(engine: Engine, tenant: str | None = None) -> list[Key]:
    """Every key, revoked and expired ones too, oldest first."""
    query = sa.select(api_keys).order_by(api_keys.c.created_at_us, api_keys.c.key_id)
    if tenant is not None:
        query = query.where(api_keys.c.tenant == tenant)
    with engine.connect() as connection:
        rows = connection.execute(query).mappings().all()
    return [Key(**{**row, "scopes": frozenset(row["scopes"])}) for row in rows]


def rotate_key(engine: Engine, key_id: str, overlap_s: float, tenant: str | None = None) -> str:
    """Make a successor with the same rights and limits; the old secret works for `overlap_s` more.

    Both happen in one transaction. A key that expires keeps its end.

    Raises:
        NotFoundError: no such key.
        InputError: it is revoked or expired already, or the overlap is negative.
    """
    old = _find(engine, key_id, tenant)
    moment = now_us()
    if not overlap_s >= 0:
        raise InputError("overlap_s", overlap_s, "must not be negative", "give 0 to end the old secret at once")
    if old.revoked_at_us is not None or (old.expires_at_us is not None and old.expires_at_us <= moment):
        raise InputError("key_id", key_id, "is revoked or expired", "make one with `rayloop keys create`")
    secret = PREFIX + secrets.token_urlsafe(32)
    fresh = replace(old, digest=digest_of(secret), key_id=uuid.uuid4().hex[:12], created_at_us=moment)
    with write(engine).begin() as connection:
        connection.execute(api_keys.insert().values(**_row(fresh)))
        spent = sa.select(sa.literal(fresh.key_id), key_usage.c.day, key_usage.c.tokens)
        columns = ["key_id", "day", "tokens"]  # its days' budgets go on where they are
        connection.execute(key_usage.insert().from_select(columns, spent.where(key_usage.c.key_id == old.key_id)))
        until = min(moment + round(overlap_s * SECOND_US), old.expires_at_us or LAST_US)
        connection.execute(api_keys.update().where(api_keys.c.digest == old.digest).values(expires_at_us=until))
    return secret


def _find(engine: Engine, key_id: str, tenant: str | None) -> Key:
    known = list_keys(engine, tenant)
    found = next((key for key in known if key.key_id == key_id), None)
    if found is None:
        live = ", ".join(f"{k.key_id} ({k.name})" for k in known if k.revoked_at_us is None) or "none"
        raise NotFoundError(f"key {key_id!r} does not exist; live keys: {live}")
    return found


def revoke_key(engine: Engine, key_id: str, tenant: str | None = None) -> Key:
    """Make a key worthless; routers notice with their next poll.

    Raises:
        NotFoundError: no such key; the message names the live ones.
    """
    found = _find(engine, key_id, tenant)
    if found.revoked_at_us is None:
        with write(engine).begin() as connection:
            where = api_keys.c.digest == found.digest
            connection.execute(api_keys.update().where(where).values(revoked_at_us=now_us()))
    return found


class KeyRing:
    """The keys that open something now, by digest. Immutable; a poll makes a new one."""

    def __init__(self, keys: Sequence[Key] = ()) -> None:
        self._keys: Mapping[str, Key] = {k.digest: k for k in keys if k.revoked_at_us is None}

    @classmethod
    def read(cls, engine: Engine) -> "KeyRing":
        """The ring as the database has it."""
        return cls(list_keys(engine))

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, secret: str) -> Key | None:
        """The key behind a secret, unless it is unknown, revoked or expired.

        The table is indexed by digest, which tells a guesser nothing about a secret; the digests are
        then compared in constant time.
        """
        digest = digest_of(secret)
        key = self._keys.get(digest)
        if key is None or not hmac.compare_digest(key.digest, digest):
            return None
        if key.expires_at_us is not None and key.expires_at_us <= now_us():
            return None
        return key
