"""A signed POST to somebody else's address, after the Standard Webhooks specification.

The receiver recomputes the signature over id, time and body with the shared secret, refuses what is older than
a few minutes, and remembers ids: a delivery that is made again carries the same id. Source:
https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md
"""

import base64
import binascii
import hmac
import os
import time
from dataclasses import dataclass
from typing import Literal

from cluster.errors import ConfigError, UnavailableError
from cluster.http_post import Answer, post

SECRET_PREFIX = "whsec_"
ABOUT_THE_MESSAGE = {400, 413, 415, 422}
"""Statuses by which a receiver refuses this message for good."""


class DeliveryError(Exception):
    """A delivery did not succeed.

    `how`: `refused` (this message, for good), `failed` (an answer that is no success), `unreachable` (no answer).
    `delivered`: how many messages of the batch had arrived before.
    """

    def __init__(
        self,
        reason: str,
        how: Literal["refused", "failed", "unreachable"],
        *,
        retry_after_s: float | None = None,
        delivered: int = 0,
    ) -> None:
        super().__init__(reason)
        self.how, self.retry_after_s, self.delivered = how, retry_after_s, delivered


def signature(secret: bytes, message_id: str, timestamp_s: int, body: bytes) -> str:
    """The header `webhook-signature`: `v1,` and the HMAC-SHA256 of `id.timestamp.body`, in base64."""
    signed = b".".join((message_id.encode(), str(timestamp_s).encode(), body))
    return "v1," + base64.b64encode(hmac.digest(secret, signed, "sha256")).decode()


def secret_bytes(variable: str) -> bytes:
    """The secret in an environment variable: `whsec_` and base64, or any text of at least 16 characters.

    Raises:
        ConfigError: it is not set, too short, or no base64 after its prefix.
    """
    text = environment_value(variable)
    if text.startswith(SECRET_PREFIX):
        try:
            return base64.b64decode(text.removeprefix(SECRET_PREFIX), validate=True)
        except binascii.Error:
            raise ConfigError(variable, "whsec_…", "is not base64 after its prefix", "copy the whole secret") from None
    if len(text) < 16:
        raise ConfigError(variable, "…", "has fewer than 16 characters", "take a longer random secret")
    return text.encode()


def environment_value(variable: str) -> str:
    """A secret from the environment.

    Raises:
        ConfigError: it is not set.
    """
    value = os.environ.get(variable, "")
    if not value:
        raise ConfigError(variable, None, "is not set", f"export {variable} where the live side starts")
    return value


@dataclass(frozen=True, slots=True)
class Webhook:
    """One receiver."""

    url: str
    secret: bytes | None
    """`None`: deliveries are not signed."""
    timeout_s: float

    def send(self, message_id: str, body: bytes) -> None:
        """Deliver one message.

        Raises:
            DeliveryError: with what to do about it.
        """
        headers = {"user-agent": "rayloop", "webhook-id": message_id, "idempotency-key": message_id}
        if self.secret is not None:
            timestamp_s = int(time.time())
            headers["webhook-timestamp"] = str(timestamp_s)
            headers["webhook-signature"] = signature(self.secret, message_id, timestamp_s, body)
        deliver(self.url, body, headers, self.timeout_s)


def deliver(url: str, body: bytes, headers: dict[str, str], timeout_s: float) -> Answer:
    """POST, and take anything but a 2xx for a failure.

    Raises:
        DeliveryError: with what to do about it.
    """
    try:
        answer = post(url, body, headers, timeout_s)
    except UnavailableError as error:
        raise DeliveryError(str(error), "unreachable") from None
    if 200 <= answer.status < 300:
        return answer
    shown = answer.body[:200].decode("utf-8", "replace").strip()
    reason = f"status {answer.status}" + (f": {shown}" if shown else "")
    how: Literal["refused", "failed"] = "refused" if answer.status in ABOUT_THE_MESSAGE else "failed"
    raise DeliveryError(reason, how, retry_after_s=answer.retry_after_s)
