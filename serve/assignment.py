"""Which arm serves whom: a pure function of the experiment's salt, the tenant and the user.

The router, the analysis and the tests all call this, so a replica, a restart or a re-analysis never
disagree. There is no state: growing the share only moves the boundary `bucket < share`, so nobody who
has seen the candidate is sent back, and a new experiment reshuffles everybody by its new salt.

Encoding of a bucket: each of salt, tenant and unit is written as its length in UTF-8 bytes (4 bytes,
big-endian) followed by those bytes; the three are concatenated and hashed with SHA-256. The first 8
bytes of the digest, big-endian, divided by 2^64 are the bucket. The division is exact: the low 11 bits,
which a double cannot hold next to the others, are dropped, so that a bucket is always below 1. The unit
is the pseudonymous user, or `session:<id>` or `request:<id>` where one of those stands in.
"""

import hashlib
import struct
from dataclasses import dataclass
from typing import Literal

ServedArm = Literal["stable", "candidate"]
UnitKind = Literal["user", "session", "request"]

MANTISSA_BITS = 53
LARGEST_CONTROL = 0.5  # above this share the two ends of the unit interval would overlap


@dataclass(frozen=True, slots=True)
class Assignment:
    """The arm of one request, as it is recorded with its interaction."""

    arm: ServedArm
    bucket: float
    """In [0, 1), from `bucket()`."""
    propensity: float
    """Probability of the assigned arm under the share in force."""
    unit: UnitKind
    """What was hashed; sessions and requests stand in where there is no user."""


def bucket(salt: str, tenant: str, unit: str) -> float:
    """The place of one user in [0, 1), uniform over users; see the module for the encoding."""
    digest = hashlib.sha256(b"".join(_prefixed(field) for field in (salt, tenant, unit))).digest()
    return (int.from_bytes(digest[:8], "big") >> (64 - MANTISSA_BITS)) / (1 << MANTISSA_BITS)


def _prefixed(field: str) -> bytes:
    encoded = field.encode()
    return struct.pack(">I", len(encoded)) + encoded


def assign(share: float, bucket: float) -> ServedArm:
    """The candidate serves buckets [0, share), stable the others."""
    return "candidate" if bucket < share else "stable"


def propensity(share: float, arm: ServedArm) -> float:
    """Probability that a user gets `arm` while the candidate has `share`."""
    return share if arm == "candidate" else 1.0 - share


def in_control_slice(share: float, bucket: float) -> bool:
    """True for users the analysis compares the candidate with: stable now, and last to move.

    The slice [1 - min(share, 0.5), 1) is as large as the candidate's and grows in step with it, so
    both sides were met at the same times. Above a share of one half it is what is left on stable.
    """
    return bucket >= max(1.0 - min(share, LARGEST_CONTROL), share)


def choose_unit(user: str | None, session: str | None, request: str) -> tuple[UnitKind, str]:
    """What to assign by: the user, else the session, else the request itself."""
    if user:
        return "user", user
    return ("session", session) if session else ("request", request)


def assign_request(
    share: float, salt: str, tenant: str, *, user: str | None, session: str | None, request: str
) -> Assignment:
    """The arm of one request and everything the record of it needs."""
    kind, unit = choose_unit(user, session, request)
    place = bucket(salt, tenant, unit if kind == "user" else f"{kind}:{unit}")
    arm = assign(share, place)
    return Assignment(arm, place, propensity(share, arm), kind)


def share_in_force(arm: ServedArm, propensity: float) -> float:
    """The candidate's share that a recorded arm and propensity imply; undoes `propensity()`.

    Rounded to 9 digits: 1 - (1 - 0.1) is not 0.1 in floating point.
    """
    return round(propensity if arm == "candidate" else 1.0 - propensity, 9)
