from collections import Counter

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from cluster.settings.curation import SplitSettings
from data.split import SPLITS, resolve_clusters, split_of

SETTINGS = SplitSettings()


def test_users_are_split_80_10_10() -> None:
    counts = Counter(split_of(f"user{n}", SETTINGS) for n in range(20_000))
    assert abs(counts["train"] / 20_000 - 0.8) < 0.01
    assert abs(counts["validation"] / 20_000 - 0.1) < 0.01


def test_the_split_of_a_user_is_fixed_by_the_salt() -> None:
    users = [f"user{n}" for n in range(200)]
    assert [split_of(u, SETTINGS) for u in users] == [split_of(u, SplitSettings()) for u in users]
    assert [split_of(u, SETTINGS) for u in users] != [split_of(u, SplitSettings(salt="x")) for u in users]


def examples(rows: list[tuple[int, str, bool]]) -> pa.Table:
    clusters, splits, seen = zip(*rows, strict=True) if rows else ((), (), ())
    return pa.table(
        {
            "cluster": pa.array(clusters, pa.uint64()),
            "split": pa.array(splits, pa.string()),
            "seen_in_test": pa.array(seen, pa.bool_()),
        }
    )


def test_a_cluster_stays_only_in_its_strictest_split() -> None:
    table = examples(
        [
            (1, "train", False),
            (1, "validation", False),
            (2, "train", False),
            (3, "train", True),
            (3, "test", True),
        ]
    )
    kept, dropped = resolve_clusters(table)
    assert kept.select(["cluster", "split"]).to_pylist() == [
        {"cluster": 1, "split": "validation"},
        {"cluster": 2, "split": "train"},
        {"cluster": 3, "split": "test"},
    ]
    assert dropped == {"near duplicate in validation": 1, "near duplicate in test": 1}


def test_what_was_once_in_test_never_enters_training() -> None:
    kept, dropped = resolve_clusters(examples([(1, "train", True), (1, "train", True)]))
    assert len(kept) == 0 and dropped == {"was in an earlier test set": 2}


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 30), st.booleans()), max_size=60))
def test_no_user_and_no_cluster_crosses_splits(rows: list[tuple[int, int, bool]]) -> None:
    table = examples([(cluster, split_of(f"user{user}", SETTINGS), seen) for cluster, user, seen in rows])
    table = table.append_column("user", pa.array([f"user{user}" for _, user, _ in rows], pa.string()))
    kept, dropped = resolve_clusters(table)
    assert len(kept) + sum(dropped.values()) == len(rows)
    for what in ("cluster", "user"):
        pairs = set(zip(kept[what].to_pylist(), kept["split"].to_pylist(), strict=True))
        assert len(pairs) == len({name for name, _ in pairs})
    seen_clusters = {cluster for cluster, _, seen in rows if seen}
    for row in kept.to_pylist():
        assert row["split"] in SPLITS
        assert not (row["seen_in_test"] and row["cluster"] in seen_clusters) or row["split"] == "test"
