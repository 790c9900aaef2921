"""What manifest and card need to know of a block of examples, so that the examples stay where they are."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data.card import Histograms
from data.minhash import U64
from data.stages import split_counts


@dataclass(frozen=True)
class Summary:
    """Of one block."""

    counts: list[str]
    """Its counting rows."""
    sizes: Counter[tuple[str, str]]
    """Examples of each kind and split."""
    labels: set[bool]
    """Which verdicts the unpaired examples hold."""
    times: list[int]
    """First and last moment, in microseconds; empty without examples."""
    tested: U64
    """Nodes of the examples in test."""
    histograms: Histograms
    prompts: Counter[str]
    """Examples behind each agent's prompt, by its digest."""


def summary_of(table: pa.Table) -> Summary:
    """The summary of a block, counting rows included."""
    rows, counts = split_counts(table)
    groups = rows.group_by(["kind", "split"]).aggregate([([], "count_all")]).to_pylist()
    ends = pc.min_max(rows["at_us"]).as_py()
    return Summary(
        counts,
        Counter({(group["kind"], group["split"]): group["count_all"] for group in groups}),
        set(pc.unique(rows["label"].drop_null()).to_pylist()),
        [at for at in ends.values() if at is not None],
        np.unique(rows.filter(pc.equal(rows["split"], "test"))["node"].to_numpy()).astype(np.uint64),
        Histograms.of(rows),
        Counter(rows["prompt_digest"].drop_null().to_pylist()),
    )
