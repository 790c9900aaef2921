import pyarrow as pa
import pytest

from train.draw import drawn


def table(*weights: float) -> pa.Table:
    return pa.table({"example_id": [f"{n:05d}" for n in range(len(weights))], "weight": list(weights)})


def test_rows_are_drawn_in_proportion_to_their_weight() -> None:
    rows = table(*[1.0, 0.5, 0.05] * 2000)
    kept = drawn(rows, seed=1)["weight"].to_pylist()
    assert kept.count(1.0) == 2000
    assert kept.count(0.5) == pytest.approx(1000, abs=100) and kept.count(0.05) == pytest.approx(100, abs=40)
    assert drawn(rows, seed=1).equals(drawn(rows, seed=1)) and not drawn(rows, seed=2).equals(drawn(rows, seed=1))


def test_equal_weights_lose_no_row_however_small() -> None:
    assert drawn(table(0.1, 0.1, 0.1), seed=0).num_rows == 3
    assert drawn(table(), seed=0).num_rows == 0


def test_a_row_is_drawn_alike_whatever_stands_beside_it() -> None:
    rows = table(1.0, *[0.5] * 400)
    half = pa.concat_tables([rows.slice(0, 1), rows.slice(200)])
    both = set(drawn(rows, seed=3)["example_id"].to_pylist()) & set(half["example_id"].to_pylist())
    assert set(drawn(half, seed=3)["example_id"].to_pylist()) == both
