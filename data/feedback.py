"""Feedback: pseudonyms for the people it comes from, and one reward in [-1, 1] for every kind of it."""

import contextlib
import hmac
import logging
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

from cluster.errors import ConfigError, InputError
from cluster.settings import Settings
from cluster.settings.capture import RewardSettings

log = logging.getLogger(__name__)

EXPLICIT = frozenset(
    {
        "thumbs_up",
        "thumbs_down",
        "rating",
        "correction",
        "follow_up",
        "abandonment",
        "draft_approved",
        "draft_rejected",
    }
)
"""Types a person gives on purpose; all others are implicit. A computed `abandonment` is marked implicit."""

SERVER_FIELDS = ("reward", "source")
"""Fields of a feedback body that no client may set."""

SECRET_FILE = "secret.key"
PSEUDONYMS_KEPT = 50_000
"""Of one process; whoever uses an agent at all uses it many times an hour."""


def pseudonym_secret(settings: Settings) -> bytes:
    """The key of the pseudonyms: from the settings, else `<home>/secret.key`, made here at first use.

    Raises:
        ConfigError: the file cannot be read or written, or holds too little.
    """
    if settings.capture.pseudonym_secret is not None:
        return settings.capture.pseudonym_secret.encode()
    path = settings.home / SECRET_FILE
    try:
        if not path.exists():
            _make_secret(path)
            if not settings.database_url.startswith("sqlite"):
                log.warning(
                    "made %s; other machines on this database need the same key, or one user gets two names",
                    path,
                )
        secret = path.read_bytes()
    except OSError as error:
        remedy = "set RAYLOOP_CAPTURE__PSEUDONYM_SECRET"
        raise ConfigError("capture.pseudonym_secret", str(path), f"cannot be used ({error.strerror})", remedy) from None
    if len(secret) < 16:
        raise ConfigError("capture.pseudonym_secret", str(path), "holds fewer than 16 bytes", "remove the file")
    return secret


def _make_secret(path: Path) -> None:
    """Write the whole key under a name of its own, then link it: two processes end with one key."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(os.urandom(32).hex().encode())
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
    finally:
        draft.unlink()


@lru_cache(PSEUDONYMS_KEPT)
def pseudonym(secret: bytes, tenant: str, user: str) -> str:
    """The name under which `user` appears in the log: 32 hex digits of a keyed hash.

    The tenant's length goes first, so ("ab", "c") and ("a", "bc") differ.
    """
    name = tenant.encode()
    message = len(name).to_bytes(4, "big") + name + user.encode()
    made = _keyed(secret).copy()
    made.update(message)
    return made.hexdigest()[:32]


@lru_cache(maxsize=64)
def _keyed(secret: bytes) -> hmac.HMAC:
    """HMAC-SHA256 that has taken the key in. `hmac.digest` hands the interpreter's lock away at every call, and where
    another thread is busy, as the log's writer is, gets it back late."""
    return hmac.new(secret, digestmod="sha256")


def reward(type: str, value: float | None, rewards: RewardSettings) -> float:
    """What one signal is worth by the configured table, in [-1, 1]."""
    if type == "rating":
        assert value is not None, "a rating has a value"
        return max(-1.0, min(1.0, (value - rewards.rating_neutral) * rewards.rating_step))
    worth: float = getattr(rewards, type)
    return worth


def complete_feedback(body: dict[str, Any], rewards: RewardSettings) -> dict[str, Any]:
    """A validated feedback body with what the server adds: `source` and `reward`.

    Raises:
        InputError: the fields do not fit the type.
    """
    _check_fields(body)
    body["source"] = "explicit" if body["type"] in EXPLICIT else "implicit"
    body["reward"] = reward(body["type"], body.get("value"), rewards)
    return body


def refuse_server_fields(body: dict[str, Any]) -> None:
    """Raise `InputError` where a client sets what only the server may."""
    for name in SERVER_FIELDS:
        if name in body:
            raise InputError(name, body[name], "is set by the server", "leave it out")


def _check_fields(body: dict[str, Any]) -> None:
    type, value, text = body["type"], body.get("value"), body.get("text")
    if type == "rating" and (value is None or not 1 <= value <= 5):
        raise InputError("value", value, "must be a number from 1 to 5 where type is rating", "send the rating")
    if type != "rating" and value is not None:
        raise InputError("value", value, f"does not belong to type {type}", "leave it out")
    if type == "correction" and not (text and text.strip()):
        raise InputError("text", text, "must hold the better answer where type is correction", "send the answer")
    if type != "correction" and body.get("category") is not None:
        raise InputError("category", body["category"], f"does not belong to type {type}", "leave it out")
