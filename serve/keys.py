"""API keys: bearer secrets `rl-…`, of which only the SHA-256 is kept.

A key is bound to a tenant, a workspace and scopes. Routers hold all live keys in a `KeyRing` that is read
again with every poll, so a new or revoked key takes effect within seconds.
"""

import hashlib
import hmac
import secrets
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from cluster.clock import SECOND_US, now_us
from cluster.database import write
from cluster.errors import InputError, NotFoundError
from cluster.tables import api_keys

PREFIX = "rl-"
SCOPES = ("chat", "feedback", "label", "owner", "admin", "tools", "grade", "train", "erase")
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
) -> str:
    """Make a key and return its secret, which nobody can read again.

    Raises:
        InputError: no scope, or one that does not exist.
    """
    if not scopes or set(scopes) - set(SCOPES):
        raise InputError("scopes", ",".join(scopes), f"must be some of {', '.join(SCOPES)}", "name known scopes")
    secret = PREFIX + secrets.token_urlsafe(32)
    created = now_us()
    row = {
        "digest": digest_of(secret),
        "key_id": uuid.uuid4().hex[:12],
        "name": name,
        "tenant": tenant,
        "workspace": workspace,
        "scopes": sorted(set(scopes)),
        "user_tier": user_tier,
        "created_at_us": created,
        "expires_at_us": None if lifetime_s is None else created + round(lifetime_s * SECOND_US),
        "revoked_at_us": None,
    }
    with write(engine).begin() as connection:
        connection.execute(api_keys.insert().values(**row))
    return secret


def list_keys(engine: Engine, tenant: str | None = None) -> list[Key]:
    """Every key, revoked and expired ones too, oldest first."""
    query = sa.select(api_keys).order_by(api_keys.c.created_at_us, api_keys.c.key_id)
    if tenant is not None:
        query = query.where(api_keys.c.tenant == tenant)
    with engine.connect() as connection:
        rows = connection.execute(query).mappings().all()
    return [Key(**{**row, "scopes": frozenset(row["scopes"])}) for row in rows]


def revoke_key(engine: Engine, key_id: str, tenant: str | None = None) -> Key:
    """Make a key worthless; routers notice with their next poll.

    Raises:
        NotFoundError: no such key; the message names the live ones.
    """
    known = list_keys(engine, tenant)
    found = next((key for key in known if key.key_id == key_id), None)
    if found is None:
        live = ", ".join(f"{k.key_id} ({k.name})" for k in known if k.revoked_at_us is None) or "none"
        raise NotFoundError(f"key {key_id!r} does not exist; live keys: {live}")
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
