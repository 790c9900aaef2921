"""How an event's body is kept: canonical JSON, compressed where that pays, with token arrays packed.

A stored body that starts with `{` is plain JSON; otherwise it is zlib. Digests are taken of the text, so how
it is compressed is free.

Two digests make an event provable. `body_digest` is salted and covers what an erasure takes away: body and
personal ids. `event_digest` covers the envelope and the body's digest. Without an erasure the first is
computed from the body; an erased event keeps it in place of the body, so its envelope can still be checked
and nothing can be guessed back.
"""

import hashlib
import struct
import zlib
from typing import Any

import numpy as np
import orjson

from data.events import Event

ARRAYS = (("prompt_token_ids", "<i4"), ("completion_token_ids", "<i4"), ("completion_logprobs", "<f4"))
"""Fields of a body that are stored as packed little-endian arrays, in this order."""

COMPRESS_FROM_BYTES = 512
"""Below this, compression costs more time than the bytes are worth."""

SALT_BYTES = 16


def encode_body(body: dict[str, Any]) -> tuple[bytes, bytes | None]:
    """The body's text and the packed arrays (`None` where the body has none)."""
    arrays = None
    if "prompt_token_ids" in body or "completion_token_ids" in body or "completion_logprobs" in body:
        packed = [np.asarray(body.get(name, ()), dtype=dtype) for name, dtype in ARRAYS]
        if any(map(len, packed)):
            arrays = struct.pack("<3I", *map(len, packed)) + b"".join(a.tobytes() for a in packed)
            body = {k: v for k, v in body.items() if k not in _ARRAY_NAMES}
    return orjson.dumps(body, option=orjson.OPT_SORT_KEYS), arrays


def compress(text: bytes) -> bytes:
    """A body's text as the database keeps it."""
    return zlib.compress(text, 1) if len(text) >= COMPRESS_FROM_BYTES else text


def decompress(stored: bytes) -> bytes:
    """The inverse of `compress`.

    Raises:
        ValueError: the bytes are damaged.
    """
    try:
        return stored if stored[:1] == b"{" else zlib.decompress(stored)
    except zlib.error as error:
        raise ValueError(f"damaged body: {error}") from None


def decode_body(stored: bytes, arrays: bytes | None) -> dict[str, Any]:
    """The body as it was given to `encode_body`, from its text, compressed or not.

    Raises:
        ValueError: the bytes are damaged.
    """
    body: dict[str, Any] = orjson.loads(decompress(stored))
    try:
        return body if arrays is None else body | _unpack(arrays)
    except struct.error as error:
        raise ValueError(f"damaged body: {error}") from None


def _unpack(arrays: bytes) -> dict[str, Any]:
    lengths, offset = struct.unpack_from("<3I", arrays), 12
    unpacked = {}
    for (name, dtype), length in zip(ARRAYS, lengths, strict=True):
        unpacked[name] = np.frombuffer(arrays, dtype, length, offset).tolist()
        offset += 4 * length
    return unpacked


def lengths_of(arrays: bytes) -> dict[str, int]:
    """How long each of the packed arrays is."""
    lengths = struct.unpack_from("<3I", arrays)
    return {name: length for (name, _), length in zip(ARRAYS, lengths, strict=True)}


def body_digest(salt: bytes, event: Event, text: bytes, arrays: bytes | None) -> bytes:
    """SHA-256 over salt, personal ids, and the body's text and arrays (`encode_body`)."""
    personal = orjson.dumps((event.user_id, event.session_id))
    return hashlib.sha256(b"\0".join((salt, personal, text, arrays or b""))).digest()


def event_digest(seq: int, recorded_at_us: int, event: Event, of_body: bytes) -> bytes:
    """SHA-256 over the place in the log, the envelope without personal ids, and `body_digest`."""
    envelope = orjson.dumps(
        (
            seq,
            recorded_at_us,
            event.event_id,
            event.kind,
            event.tenant,
            event.workspace,
            event.occurred_at_us,
            event.agent,
            event.interaction_id,
        )
    )
    return hashlib.sha256(envelope + b"\0" + of_body).digest()


_ARRAY_NAMES = frozenset(name for name, _ in ARRAYS)
