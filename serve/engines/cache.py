"""Keys and values of every running answer, one slot each, in tensors that are allocated once and reused.

transformers' own caches hold one batch that starts and ends together; here rows join and leave at any
step. Row `i` of a forward pass writes its tokens at its own positions of slot `first + i` and reads the
first `length` columns of that slot, so nothing is concatenated or shifted between steps. The last column
of a slot takes what padding tokens write; no mask ever admits it. A head's columns lie together in memory:
attention of one new token reads them as one stream, and that read is what bounds a step.

Shape letters: S slots, C columns of a slot, H key/value heads, D head size, B rows of this pass, Q tokens
of a row in this pass.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache

KeyValue = list[tuple[Tensor, Tensor]]
"""One (keys, values) pair a layer, each [H, tokens, D]."""


@dataclass(frozen=True)
class LayerShape:
    """Key/value heads and head sizes of one attention layer."""

    heads: int
    key_size: int
    value_size: int


class SlotCache(Cache):  # type: ignore[misc]
    """A transformers cache over slots. `aim` says which slots and columns the next forward pass uses."""

    def __init__(self, shapes: list[LayerShape], *, slots: int, columns: int, dtype: torch.dtype, device: str) -> None:
        super().__init__(layers=[])
        self._shapes, self._dtype, self._device = shapes, dtype, device
        self.slots, self.columns = 0, 0
        self._keys: list[Tensor] = []  # one [S, H, C, D] a layer
        self._values: list[Tensor] = []
        self._targets: dict[int, Tensor] = {}  # heads -> flat [B * H * Q] rows of the [S * H * C, D] view
        self._slots_B11 = self._columns_B1Q = torch.empty(0)
        self._rows = slice(0, 0)
        self._length = 0
        self.reserve(slots, columns)

    def reserve(self, slots: int, columns: int) -> None:
        """Grow to at least this size, keeping what the slots hold. Never shrinks."""
        if slots <= self.slots and columns + 1 <= self.columns:
            return
        # Doubling keeps the number of copies logarithmic in the final size.
        new_slots = self.slots if slots <= self.slots else max(slots, 2 * self.slots)
        new_columns = self.columns if columns + 1 <= self.columns else max(columns + 1, 2 * self.columns)
        self._keys = [
            self._grown(self._keys, i, new_slots, new_columns, s.heads, s.key_size) for i, s in enumerate(self._shapes)
        ]
        self._values = [
            self._grown(self._values, i, new_slots, new_columns, s.heads, s.value_size)
            for i, s in enumerate(self._shapes)
        ]
        self.slots, self.columns = new_slots, new_columns

    def _grown(self, old: list[Tensor], layer: int, slots: int, columns: int, heads: int, size: int) -> Tensor:
        grown = torch.zeros(slots, heads, columns, size, dtype=self._dtype, device=self._device)
        if old:
            grown[: self.slots, :, : self.columns] = old[layer]
        return grown

    def aim(self, first_slot: int, positions_BQ: Tensor, padding_BQ: Tensor | None, length: int) -> None:
        """The next pass uses slots `first_slot…`, writes at `positions_BQ` and reads `length` columns.

        Tokens where `padding_BQ` is true are written to the unread last column.
        """
        rows = positions_BQ.shape[0]
        columns_BQ = positions_BQ if padding_BQ is None else positions_BQ.masked_fill(padding_BQ, self.columns - 1)
        self._slots_B11 = torch.arange(first_slot, first_slot + rows, device=self._device)[:, None, None]
        self._columns_B1Q = columns_BQ.unsqueeze(1)
        self._targets = {}
        self._rows = slice(first_slot, first_slot + rows)
        self._length = length

    def update(  # type: ignore[no-untyped-def]  # extra arguments differ between transformers' models
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_args, **_kwargs
    ) -> tuple[Tensor, Tensor]:
        """Store the pass's keys and values, [B, H, Q, D], and return those of all columns read."""
        keys = self._store(self._keys[layer_idx], key_states)
        values = self._store(self._values[layer_idx], value_states)
        return keys, values

    def _store(self, slots_SHCD: Tensor, states_BHQD: Tensor) -> Tensor:
        heads, size = slots_SHCD.shape[1], slots_SHCD.shape[3]
        target = self._targets.get(heads)
        if target is None:
            rows_BH1 = self._slots_B11 * heads + torch.arange(heads, device=self._device)[:, None]
            target = self._targets[heads] = (rows_BH1 * self.columns + self._columns_B1Q).reshape(-1)
        slots_SHCD.view(-1, size).index_copy_(0, target, states_BHQD.reshape(-1, size))
        return slots_SHCD[self._rows, :, : self._length]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns read by the pass; transformers asks for it where no position ids are given."""
        return self._length

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` columns of one slot over another."""
        for tensor in (*self._keys, *self._values):
            tensor[target, :, :length] = tensor[source, :, :length]

    def clear(self, slot: int) -> None:
        """Zero a slot: a not-a-number left behind would reach the slot's next row through its mask."""
        for tensor in (*self._keys, *self._values):
            tensor[slot].zero_()

    def read(self, slot: int, start: int, end: int) -> KeyValue:
        """A copy of columns `start:end` of a slot."""
        pairs = zip(self._keys, self._values, strict=True)
        return [(k[slot, :, start:end].clone(), v[slot, :, start:end].clone()) for k, v in pairs]

    def write(self, slot: int, start: int, block: KeyValue) -> None:
        """Put a block from `read` at column `start` of a slot."""
        for layer, (keys, values) in enumerate(block):
            end = start + keys.shape[1]
            self._keys[layer][slot, :, start:end] = keys
            self._values[layer][slot, :, start:end] = values


def layer_shapes(cache: Cache) -> list[LayerShape]:
    """The shapes of a transformers cache that one forward pass has filled.

    Raises:
        ValueError: a layer keeps something else than the keys and values of every token.
    """
    shapes = []
    for layer in cache.layers:
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is None or values is None or keys.dim() != 4:
            raise ValueError(f"a layer of type {type(layer).__name__} keeps no plain keys and values")
        shapes.append(LayerShape(keys.shape[1], keys.shape[3], values.shape[3]))
    return shapes
