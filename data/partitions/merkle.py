"""Merkle trees as RFC 6962 section 2.1 defines them: one hash that no leaf can leave, enter or change unnoticed.

Leaves and inner nodes are hashed with different prefixes, so no node passes for a leaf. `MerkleTree` takes
leaves one at a time and keeps only the roots of whole subtrees: memory grows with the logarithm.
"""

import hashlib
from collections.abc import Iterable

EMPTY_ROOT = hashlib.sha256(b"").digest()
"""MTH({}): the hash of an empty list."""


class MerkleTree:
    """The root over the leaves added so far, in order."""

    def __init__(self) -> None:
        self.size = 0
        self._subtrees: list[bytes] = []  # roots of complete subtrees, the largest first

    def add(self, leaf: bytes) -> None:
        """Append one leaf."""
        node = hashlib.sha256(b"\x00" + leaf).digest()
        complete = self.size
        while complete & 1:  # two subtrees of one size become one
            node = _inner(self._subtrees.pop(), node)
            complete >>= 1
        self._subtrees.append(node)
        self.size += 1

    def root(self) -> bytes:
        """MTH of the leaves, 32 bytes."""
        if not self._subtrees:
            return EMPTY_ROOT
        node = self._subtrees[-1]
        for left in reversed(self._subtrees[:-1]):
            node = _inner(left, node)
        return node


def merkle_root(leaves: Iterable[bytes]) -> bytes:
    """MTH of some leaves, 32 bytes. Source: RFC 6962 section 2.1."""
    tree = MerkleTree()
    for leaf in leaves:
        tree.add(leaf)
    return tree.root()


def _inner(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()
