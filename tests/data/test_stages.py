from collections import Counter

import pyarrow as pa

from data.stages import Dropped, Stage, StageCount, split_counts, sum_counts


def halve(table: pa.Table) -> tuple[pa.Table, Dropped]:
    return table.slice(0, len(table) // 2), Counter({"second half": len(table) - len(table) // 2})


def test_counts_travel_with_the_rows_and_add_up_over_blocks() -> None:
    stages = [Stage("first", halve), Stage("second", halve)]
    lines: list[str] = []
    for block in (pa.table({"x": range(8)}), pa.table({"x": range(4)})):
        for stage in stages:
            block = stage(block)
        rows, counts = split_counts(block)
        assert rows.column_names == ["x"]
        lines += counts
    assert sum_counts(lines, ["second", "first", "absent"]) == [
        StageCount("second", 6, 3, {"second half": 3}),
        StageCount("first", 12, 6, {"second half": 6}),
    ]
