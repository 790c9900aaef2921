import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from data.keep import keep_best, least_kept, ranks


def block(rows: list[tuple[float, int, int]]) -> pa.Table:
    """Rows of score, time and question."""
    columns = zip(*rows, strict=True) if rows else ((), (), ())
    scores, times, nodes = (list(column) for column in columns)
    return pa.table(
        {
            "score": pa.array(scores, pa.float64()),
            "at_us": pa.array(times, pa.int64()),
            "node": pa.array(nodes, pa.uint64()),
            "answer_key": pa.array([0] * len(rows), pa.uint64()),
        }
    )


def test_the_best_are_kept_and_of_equals_the_newest() -> None:
    table = block([(0.2, 9, 1), (0.9, 1, 2), (0.9, 5, 3), (0.5, 7, 4)])
    kept, dropped = keep_best(table, least_kept([ranks(table)], 2))
    assert kept["node"].to_pylist() == [2, 3] and dropped == {"beyond the number kept": 2}
    kept, _ = keep_best(table, least_kept([ranks(table)], 1))
    assert kept["node"].to_pylist() == [3]
    assert keep_best(table, least_kept([ranks(table)], 4))[0].equals(table)


@given(
    st.lists(st.tuples(st.sampled_from([0.1, 0.5, 0.9]), st.integers(0, 3), st.integers(0, 10**6)), max_size=30),
    st.integers(1, 30),
    st.integers(1, 5),
)
def test_blocks_are_cut_alike(rows: list[tuple[float, int, int]], most: int, blocks: int) -> None:
    rows = list({row[2]: row for row in rows}.values())
    parts = [block(rows[start::blocks]) for start in range(blocks)]
    least = least_kept([ranks(part) for part in parts], most)
    kept = [node for part in parts for node in keep_best(part, least)[0]["node"].to_pylist()]
    assert len(kept) == min(most, len(rows))
    assert sorted(kept) == sorted(keep_best(block(rows), least)[0]["node"].to_pylist())
