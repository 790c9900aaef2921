import pyarrow as pa

from data.balance import least_nodes, sample_of_all
from data.blocks import ROWS_AT_ONCE, apply_to_rows
from data.stages import Dropped, Stage, split_counts, sum_counts


def odd_only(table: pa.Table) -> tuple[pa.Table, Dropped]:
    kept = pa.array([n % 2 == 1 for n in table["n"].to_pylist()], pa.bool_())
    return table.filter(kept), Dropped({"even": len(table) - kept.true_count})


def test_rows_some_at_a_time_come_and_count_as_all_at_once() -> None:
    total = 2 * ROWS_AT_ONCE + 3
    block = Stage("first", lambda table: (table, Dropped()))(pa.table({"n": range(total)}))
    seen: list[int] = []
    stages = (lambda table: seen.append(len(table)) or table, Stage("second", odd_only))
    made = apply_to_rows(block, stages)
    rows, counts = split_counts(made)
    assert rows["n"].to_pylist() == list(range(1, total, 2))
    assert max(seen) <= ROWS_AT_ONCE
    first, second = sum_counts(counts, ["first", "second"])
    assert (first.rows_in, first.rows_out) == (total, total)
    assert (second.rows_in, second.rows_out, second.dropped) == (total, total // 2, {"even": total - total // 2})


def test_rows_of_a_key_are_seen_together() -> None:
    total = 3 * ROWS_AT_ONCE
    keys = pa.array([n * 7919 % (total // 3) for n in range(total)], pa.uint64())
    seen: list[list[int]] = []
    made = apply_to_rows(pa.table({"key": keys}), (lambda t: seen.append(t["key"].to_pylist()) or t,), together="key")
    assert sorted(made["key"].to_pylist()) == sorted(keys.to_pylist())
    assert len(seen) == 3 and max(map(len, seen)) <= ROWS_AT_ONCE + 3
    assert sum(len(set(some)) for some in seen) == len(set(keys.to_pylist())) == total // 3
    assert made["key"].num_chunks <= 2  # the rows, and those that count


def test_no_rows_keep_their_columns() -> None:
    made = apply_to_rows(pa.table({"n": pa.array([], pa.int64())}), [Stage("second", odd_only)])
    rows, counts = split_counts(made)
    assert (rows.column_names, len(rows), len(counts)) == (["n"], 0, 1)


def test_the_sample_of_all_blocks_is_the_same_however_they_are_cut() -> None:
    rows = pa.table({"node": pa.array([n * 7919 % 1000 for n in range(600)], pa.uint64()), "question": ["q"] * 600})
    whole = least_nodes(rows, 50)
    assert whole["node"].to_pylist() == sorted(set(rows["node"].to_pylist()))[:50]
    for size in (100, 37):
        cut = (least_nodes(rows.slice(at, size), 50) for at in range(0, 600, size))
        assert sample_of_all(cut, 50).equals(whole)
