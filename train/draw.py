"""Which rows a run learns from: each is drawn by its weight, so that what curation capped stays capped.

A row's `weight` says how much the votes behind it may count. The heaviest rows are always drawn, and a row of half
their weight every second time, by a hash of its id and the run's seed: the same rows on every worker and after
every restart, and others with another seed.
"""

import hashlib

import pyarrow as pa
import pyarrow.compute as pc


def drawn(table: pa.Table, seed: int) -> pa.Table:
    """The rows that this seed draws, in their order."""
    if not table.num_rows:
        return table
    heaviest = pc.max(table["weight"]).as_py()
    names, weights = table["example_id"].to_pylist(), table["weight"].to_pylist()
    kept = [
        weight == heaviest or chance_of(name, seed) * heaviest < weight
        for name, weight in zip(names, weights, strict=True)
    ]
    return table if all(kept) else table.filter(pa.array(kept, pa.bool_()))


def chance_of(example_id: str, seed: int) -> float:
    """A number in [0, 1) that looks random and follows from the two alone."""
    digest = hashlib.sha256(f"{seed}:{example_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
