"""Which arm a unit gets: a pure function of salt, tenant and unit, the same on every replica.

`bucket = first 8 bytes of SHA-256(length-prefixed salt, tenant, unit) / 2^64`; the candidate takes the
buckets [0, share), so a growing share never moves anybody back.
"""

import hashlib
from typing import Literal

Arm = Literal["stable", "candidate"]


def bucket(salt: str, tenant: str, unit: str) -> float:
    """Where `unit` (a pseudonymous user, a session or a request) stands, in [0, 1)."""
    digest = hashlib.sha256()
    for part in (salt, tenant, unit):
        raw = part.encode()
        digest.update(len(raw).to_bytes(4, "big") + raw)
    # 53 bits: dividing all 64 could round up to 1.0
    return (int.from_bytes(digest.digest()[:8], "big") >> 11) / 2**53


def assign(share: float, bucket: float) -> Arm:
    """The candidate has the buckets [0, share)."""
    return "candidate" if bucket < share else "stable"
