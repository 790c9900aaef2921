"""Which arm serves whom: a pure function of the experiment's salt, the tenant and the user.

The router, the analysis and the tests all call this, so a replica, a restart or a re-analysis never
disagree. There is no state: every candidate has a slice of the unit interval, `[start, start + share)`, and growing
its share only moves the slice's end, so nobody who has seen a candidate is sent back or to another one. Stable has
what is left. A new experiment reshuffles everybody by its new salt.

Encoding of a bucket: each of salt, tenant and unit is written as its length in UTF-8 bytes (4 bytes,
big-endian) followed by those bytes; the three are concatenated and hashed with SHA-256. The first 8
bytes of the digest, big-endian, divided by 2^64 are the bucket. The division is exact: the low 11 bits,
which a double cannot hold next to the others, are dropped, so that a bucket is always below 1. The unit
is the pseudonymous user, or `session:<id>` or `request:<id>` where one of those stands in.
"""

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

ServedArm = Literal["stable", "candidate"]
UnitKind = Literal["user", "session", "request"]

MANTISSA_BITS = 53
LARGEST_CONTROL = 0.5  # of one candidate; a larger slice of stable would meet the candidate's own
DIGITS = 9
"""To which sums of shares are rounded: 0.1 + 0.2 is not 0.3 in floating point."""


@dataclass(frozen=True, slots=True)
class Slice:
    """The buckets `[start, start + share)` of one candidate."""

    start: float
    share: float


@dataclass(frozen=True, slots=True)
class Assignment:
    """The arm of one request, as it is recorded with its interaction."""

    arm: ServedArm
    bucket: float
    """In [0, 1), from `bucket()`."""
    propensity: float
    """Probability of the assigned arm under the shares in force."""
    unit: UnitKind
    """What was hashed; sessions and requests stand in where there is no user."""
    candidate: int | None = None
    """Place of the assigned candidate among the slices; `None` for stable."""


def alone(share: float) -> tuple[Slice]:
    """The slices of a split with one candidate."""
    return (Slice(0.0, share),)


def bucket(salt: str, tenant: str, unit: str) -> float:
    """The place of one user in [0, 1), uniform over users; see the module for the encoding."""
    digest = hashlib.sha256(b"".join(_prefixed(field) for field in (salt, tenant, unit))).digest()
    return (int.from_bytes(digest[:8], "big") >> (64 - MANTISSA_BITS)) / (1 << MANTISSA_BITS)


def _prefixed(field: str) -> bytes:
    encoded = field.encode()
    return struct.pack(">I", len(encoded)) + encoded


def assign(slices: Sequence[Slice], bucket: float) -> int | None:
    """Place of the candidate whose slice holds the bucket; `None` for stable, which has the others."""
    for number, own in enumerate(slices):
        if own.start <= bucket < own.start + own.share:
            return number
    return None


def propensity(slices: Sequence[Slice], candidate: int | None) -> float:
    """Probability that a user gets that candidate, or stable where it is `None`."""
    return 1.0 - sum(own.share for own in slices) if candidate is None else slices[candidate].share


def highest_end(slices: Sequence[Slice]) -> float:
    """Where the last slice that holds anybody ends; no candidate has a bucket from there on."""
    return max((own.start + own.share for own in slices if own.share > 0), default=0.0)


def in_control_slice(slices: Sequence[Slice], candidate: int, bucket: float) -> bool:
    """True for users the analysis compares that candidate with: on stable now, and last to move.

    The slice [1 - min(share, 0.5), 1) is as large as the candidate's and grows in step with it, so both sides were
    met at the same times. Where candidates reach into it, it is what they leave.
    """
    return bucket >= max(1.0 - min(slices[candidate].share, LARGEST_CONTROL), highest_end(slices))


def choose_unit(user: str | None, session: str | None, request: str) -> tuple[UnitKind, str]:
    """What to assign by: the user, else the session, else the request itself."""
    if user:
        return "user", user
    return ("session", session) if session else ("request", request)


def assign_request(
    slices: Sequence[Slice], salt: str, tenant: str, *, user: str | None, session: str | None, request: str
) -> Assignment:
    """The arm of one request and everything the record of it needs."""
    kind, unit = choose_unit(user, session, request)
    place = bucket(salt, tenant, unit if kind == "user" else f"{kind}:{unit}")
    chosen = assign(slices, place)
    arm: ServedArm = "stable" if chosen is None else "candidate"
    return Assignment(arm, place, propensity(slices, chosen), kind, chosen)


def share_in_force(arm: ServedArm, propensity: float) -> float:
    """The share of a split's one candidate that a recorded arm and propensity imply; undoes `propensity()`."""
    return round(propensity if arm == "candidate" else 1.0 - propensity, DIGITS)
