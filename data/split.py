"""Stage 10, split: users go to train, validation or test by a keyed hash.

A near-duplicate cluster that touches several splits stays only in the strictest of them (test, then
validation). What was once a test item, or nearly, never enters a later training set: its sketch is kept.
"""

import hashlib
import hmac
from collections import Counter
from typing import Literal, get_args

import pyarrow as pa

from cluster.settings.curation import SplitSettings
from data.stages import Dropped, keep

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
"""From the loosest to the strictest."""
STRICTNESS = {split: rank for rank, split in enumerate(SPLITS)}


def split_of(user_id: str, settings: SplitSettings) -> Split:
    """The split of a user: the same for ever, under one salt."""
    digest = hmac.new(settings.salt.encode(), user_id.encode(), hashlib.sha256).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    if place < settings.train:
        return "train"
    return "validation" if place < settings.train + settings.validation else "test"


def resolve_clusters(table: pa.Table) -> tuple[pa.Table, Dropped]:
    """Keeps of each cluster only the rows in its strictest split.

    Needs all rows of a cluster; columns `cluster`, `split`, and `seen_in_test` for clusters that hold, or
    held in an earlier dataset, a test item.
    """
    columns = (table[name].to_pylist() for name in ("cluster", "split", "seen_in_test"))
    rows = list(zip(*columns, strict=True))
    strictest: dict[int, int] = {}
    for cluster, split, _ in rows:
        strictest[cluster] = max(strictest.get(cluster, 0), STRICTNESS[split])
    reasons: list[str | None] = []
    for cluster, split, seen_in_test in rows:
        if STRICTNESS[split] < strictest[cluster]:
            reasons.append(f"near duplicate in {SPLITS[strictest[cluster]]}")
        elif seen_in_test and split != "test":
            reasons.append("was in an earlier test set")
        else:
            reasons.append(None)
    return keep(table, reasons)


def split_counts(table: pa.Table) -> Counter[str]:
    """Rows in each split."""
    return Counter(table["split"].to_pylist())
