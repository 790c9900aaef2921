"""How an event's body is kept: canonical JSON, compressed where that pays, with token arrays packed.

A stored body that starts with `{` is plain JSON; otherwise it is zlib. `digest` ties a body to its
envelope: change either, or the place in the log, and the digest no longer fits. It is salted, so nothing
can be guessed back from it once body and salt are erased.
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
    """The stored text and the packed arrays (`None` where the body has none)."""
    arrays = None
    if "prompt_token_ids" in body or "completion_token_ids" in body or "completion_logprobs" in body:
        packed = [np.asarray(body.get(name, ()), dtype=dtype) for name, dtype in ARRAYS]
        if any(map(len, packed)):
            arrays = struct.pack("<3I", *map(len, packed)) + b"".join(a.tobytes() for a in packed)
            body = {k: v for k, v in body.items() if k not in _ARRAY_NAMES}
    text = orjson.dumps(body, option=orjson.OPT_SORT_KEYS)
    return (zlib.compress(text, 1) if len(text) >= COMPRESS_FROM_BYTES else text), arrays


def decode_body(stored: bytes, arrays: bytes | None) -> dict[str, Any]:
    """The body as it was given to `encode_body`.

    Raises:
        ValueError: the bytes are damaged.
    """
    try:
        body: dict[str, Any] = orjson.loads(stored if stored[:1] == b"{" else zlib.decompress(stored))
        return body if arrays is None else body | _unpack(arrays)
    except (zlib.error, struct.error) as error:
        raise ValueError(f"damaged body: {error}") from None


def _unpack(arrays: bytes) -> dict[str, Any]:
    lengths, offset = struct.unpack_from("<3I", arrays), 12
    unpacked = {}
    for (name, dtype), length in zip(ARRAYS, lengths, strict=True):
        unpacked[name] = np.frombuffer(arrays, dtype, length, offset).tolist()
        offset += 4 * length
    return unpacked


def digest(seq: int, recorded_at_us: int, event: Event, salt: bytes, stored: bytes, arrays: bytes | None) -> bytes:
    """SHA-256 over salt, envelope and body as stored."""
    envelope = orjson.dumps(
        (
            seq,
            recorded_at_us,
            event.event_id,
            event.kind,
            event.tenant,
            event.workspace,
            event.occurred_at_us,
            event.user_id,
            event.session_id,
            event.agent,
            event.interaction_id,
        )
    )
    return hashlib.sha256(b"\0".join((salt, envelope, stored, arrays or b""))).digest()


_ARRAY_NAMES = frozenset(name for name, _ in ARRAYS)
