"""How many interactions a dataset of all agents keeps: the best and then the newest, up to a number.

Blocks are ranked by the same three numbers wherever they are, so one threshold cuts them all alike.
"""

from collections import Counter
from collections.abc import Iterable

import numpy as np
import pyarrow as pa

from data.minhash import mix
from data.stages import Dropped

Rank = tuple[float, int, int]
"""Score, time in microseconds, and a hash that breaks ties; greater is better."""


def ranks(table: pa.Table) -> pa.Table:
    """Rows (score, at_us, tie) of a block with fingerprints."""
    tie = mix(table["node"].to_numpy() ^ mix(table["answer_key"].to_numpy()))
    return pa.table([table["score"], table["at_us"], tie], names=["score", "at_us", "tie"])


def least_kept(blocks: Iterable[pa.Table], most: int) -> Rank | None:
    """The rank of the last row that is kept; `None` where there are no more than `most` rows."""
    tables = list(blocks)
    if sum(map(len, tables)) <= most:
        return None
    table = pa.concat_tables(tables)
    score, at_us, tie = (table[name].to_numpy() for name in ("score", "at_us", "tie"))
    last = np.lexsort((tie, at_us, score))[-most]
    return float(score[last]), int(at_us[last]), int(tie[last])


def keep_best(table: pa.Table, least: Rank | None) -> tuple[pa.Table, Dropped]:
    """The rows of that rank or better."""
    if least is None:
        return table, Counter()
    score, at_us, tie = (ranks(table)[name].to_numpy() for name in ("score", "at_us", "tie"))
    same_score, same_time = score == least[0], at_us == least[1]
    kept = (score > least[0]) | (same_score & ((at_us > least[1]) | (same_time & (tie >= np.uint64(least[2])))))
    return table.filter(pa.array(kept)), +Counter({"beyond the number kept": int((~kept).sum())})
