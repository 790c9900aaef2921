"""Keys and values of prompt beginnings that came more than once: an agent's system prompt, mostly.

A beginning is kept in blocks of a few tokens, each under the adapter and every token before it, so two
prompts share exactly the blocks they have in common. A block is stored at its second sighting: most ends
of prompts never return, and copying them would only push the useful blocks out.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

from serve.engines.cache import KeyValue

SEEN_PER_BLOCK = 8  # sightings remembered for each block there is room for


class PrefixCache:
    """Blocks by the digest of everything before and in them; least recently used go first.

    Used by the step loop's thread only.
    """

    def __init__(self, block_tokens: int, max_blocks: int) -> None:
        self.block_tokens, self.max_blocks = block_tokens, max_blocks
        self._blocks: OrderedDict[bytes, KeyValue] = OrderedDict()
        self._seen: OrderedDict[bytes, None] = OrderedDict()
        self.hit_tokens = 0
        self.asked_tokens = 0

    def lookup(self, owner: int, prompt: Sequence[int]) -> list[KeyValue]:
        """The stored blocks that `prompt` begins with; never the whole prompt, its last token must run.

        `owner` identifies the loaded adapter, so a reload under the same name shares nothing.
        """
        found = []
        for key in self._keys(owner, prompt):
            block = self._blocks.get(key)
            if block is None:
                break
            self._blocks.move_to_end(key)
            found.append(block)
        self.asked_tokens += len(prompt)
        self.hit_tokens += len(found) * self.block_tokens
        return found

    def wanted(self, owner: int, prompt: Sequence[int]) -> list[tuple[int, bytes]]:
        """(index, key) of the blocks of `prompt` worth storing, seen before and not stored yet."""
        wanted = []
        for index, key in enumerate(self._keys(owner, prompt)):
            if key in self._blocks:
                continue
            if key in self._seen:
                wanted.append((index, key))
            else:
                self._remember(key)
        return wanted

    def store(self, key: bytes, block: KeyValue) -> None:
        """Keep a block, dropping the least recently used beyond the limit."""
        self._blocks[key] = block
        self._seen.pop(key, None)
        while len(self._blocks) > self.max_blocks:
            self._blocks.popitem(last=False)

    def _remember(self, key: bytes) -> None:
        self._seen[key] = None
        while len(self._seen) > SEEN_PER_BLOCK * self.max_blocks:
            self._seen.popitem(last=False)

    def _keys(self, owner: int, prompt: Sequence[int]) -> list[bytes]:
        if not self.max_blocks:
            return []
        size = self.block_tokens
        digest = hashlib.blake2b(owner.to_bytes(8, "big"), digest_size=16)
        keys = []
        for start in range(0, (len(prompt) - 1) // size * size, size):
            digest.update(array("q", prompt[start : start + size]).tobytes())
            keys.append(digest.digest())
        return keys
