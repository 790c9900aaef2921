import hashlib
import random
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.settings.curation import CurationSettings, DeduplicationSettings
from data.dedup import (
    assign_clusters,
    deduplicate,
    fingerprint,
    normalise_text,
    record_fields,
    sketches_of,
)
from data.join import to_json
from data.minhash import SKETCH_VERSION, Shingles, shingle, similarity, sketch, sketch_column
from data.near import PAIRS, cluster_of, find_clusters, near_edges
from data.stages import with_column
from tests.data.rows import rows
from tests.data.traffic import texts

SETTINGS = CurationSettings()
NONE = np.zeros(0, np.uint64)
WORDS = [f"word{n}" for n in range(400)]


def shingle_sets(found: Shingles) -> list[set[int]]:
    return [set(found.hashes[i:j].tolist()) for i, j in pairwise(found.offsets)]


def prose(rng: random.Random, length: int = 60) -> list[str]:
    return [rng.choice(WORDS) for _ in range(length)]


def clustered(*changes: dict[str, object], settings: CurationSettings = SETTINGS) -> pa.Table:
    table, _ = fingerprint(rows(*changes), settings)
    edges = near_edges(sketches_of(table, settings.dedup), settings.dedup)
    return assign_clusters(table, find_clusters(edges, NONE))[0]


def ask(number: int, text: str, answer: str = "a b c", **more: object) -> dict[str, object]:
    return {
        "interaction_id": f"i{number}",
        "messages": [{"role": "system", "content": "Same for all."}, {"role": "user", "content": text}],
        "response": {"role": "assistant", "content": answer},
    } | more


def test_shingles_are_padded_so_that_every_word_counts_alike() -> None:
    found = shingle(pa.array(["A b, c!", "a B  c", "a b d", ""]), 3)
    sets = shingle_sets(found)
    assert [len(s) for s in sets] == [5, 5, 5, 1]  # words + 2; an empty text is all padding
    assert sets[0] == sets[1]
    assert len(sets[0] & sets[2]) == 2  # "-- -- a" and "-- a b"


def test_sketches_are_those_of_their_version() -> None:
    """Sketches kept with earlier datasets are compared with today's: other values need another version."""
    said = ["", "One two, THREE!", "naïve Straße – 東京 42", "a" * 30 + " b", "x\x10y_z@home"]
    made = sketch_column(pa.array(said), 3, bins=120, seed=42)
    assert SKETCH_VERSION == "words-2/one-permutation-1"
    assert hashlib.sha256(made.tobytes()).hexdigest().startswith("a8ef4ee8eb9adf60296d7ce7b55c5476")


def test_sketch_similarity_estimates_jaccard() -> None:
    words = prose(random.Random(0), 100)
    other = [*words[:50], "changed", *words[51:]]
    found = shingle(pa.array([" ".join(words), " ".join(other)]), 3)
    matrix = sketch(found, 2000, seed=1).astype(np.uint8)
    assert similarity(matrix[:1], matrix[1:])[0] == pytest.approx(99 / 105, abs=0.02)  # 102 shingles, 3 differ


def test_pairs_at_the_threshold_are_found() -> None:
    rng = random.Random(6)
    said = []
    for number in range(400):  # each text differs from its neighbour in 6 of 56 shingles: 50/62 = 0.806
        words = [f"w{number}x{n}" for n in range(54)]
        said += [
            " ".join(words),
            " ".join([*words[:20], "one", *words[21:40], f"two{rng.randrange(10**9)}", *words[41:]]),
        ]
    sets = shingle_sets(shingle(pa.array(said[:2]), 3))
    assert len(sets[0] & sets[1]) / len(sets[0] | sets[1]) == pytest.approx(50 / 62)
    clusters = clustered(*(ask(n, text) for n, text in enumerate(said)))["cluster"].to_pylist()
    found = sum(one == other for one, other in zip(clusters[::2], clusters[1::2], strict=True))
    assert found >= 0.95 * 400 and len(set(clusters)) >= 400


def test_near_duplicate_questions_share_a_cluster_and_others_do_not() -> None:
    rng = random.Random(1)
    base, other = prose(rng), prose(rng)
    edited = [*base[:30], "edited", *base[31:]]  # 62 shingles, 3 of them differ: 59/65 = 0.91
    half = [*base[:30], *other[:30]]
    table = clustered(*(ask(n, " ".join(words)) for n, words in enumerate([base, edited, half, other])))
    clusters = table["cluster"].to_pylist()
    assert clusters[0] == clusters[1]
    assert len(set(clusters)) == 3


def test_same_question_in_other_spelling_is_one_node() -> None:
    table = clustered(ask(1, "What  IS it?"), ask(2, "what is it?"))
    assert len(set(table["node"].to_pylist())) == 1
    assert normalise_text("ﬁne\u00a0 Caf\u00e9") == "fine café"


@pytest.mark.parametrize(
    "text",
    ["a: 1\nb: x y\nc: z", "a: 1; b: x y; c: z", '{"a": 1, "b": "x y", "c": null}', "a=1 b=xy c=z"],
)
def test_record_fields_are_read_from_the_usual_notations(text: str) -> None:
    assert record_fields(text, 3)
    assert record_fields(text, 3) != record_fields(text.replace("1", "2"), 3)


def test_prose_is_no_record() -> None:
    assert record_fields("Note: he said this.\nWe saw: nothing, really, at 5.", 3) == ""


def test_two_thousand_alerts_from_small_vocabularies_are_all_different() -> None:
    alerts = texts(2000)
    table = clustered(*(ask(n, text) for n, text in enumerate(alerts)))
    assert len(set(table["cluster"].to_pylist())) >= 0.99 * len(set(alerts))


def test_records_that_differ_only_beside_their_fields_are_near_duplicates() -> None:
    record = "host: db1\nlevel: high\nzone: eu\n"
    rng = random.Random(2)
    story = " ".join(prose(rng))
    table = clustered(
        ask(1, record + story),
        ask(2, record + story + " please"),
        ask(3, record.replace("high", "low") + story),
    )
    clusters = table["cluster"].to_pylist()
    assert clusters[0] == clusters[1] != clusters[2]


def test_chains_become_one_cluster_named_by_its_least_node() -> None:
    edges = pa.table([[3, 5, 9], [5, 8, 11]], schema=PAIRS)
    clusters = find_clusters(edges, np.array([11, 77], np.uint64))
    nodes = np.array([3, 8, 11, 9, 42], np.uint64)
    assert cluster_of(nodes, clusters).tolist() == [3, 3, 9, 9, 42]
    assert clusters.tested.tolist() == [9, 77]


def test_a_large_bucket_is_compared_along_a_chain() -> None:
    settings = DeduplicationSettings(bucket_pairs=2)
    story = " ".join(prose(random.Random(3), 200))
    table, _ = fingerprint(rows(*(ask(n, f"{story} {n}") for n in range(20))), SETTINGS)
    edges = near_edges(sketches_of(table, settings), settings)
    assert len(set(cluster_of(table["node"].to_numpy(), find_clusters(edges, NONE)).tolist())) == 1


def judged(table: pa.Table, scores: list[float], weights: list[float] | None = None) -> pa.Table:
    table = with_column(table, "score", scores, pa.float64())
    table = with_column(table, "weight", weights or [1.0] * len(scores), pa.float64())
    return with_column(table, "explicit", [2 * s - 1 for s in scores], pa.float64())


def test_equal_answers_are_merged_and_their_scores_averaged() -> None:
    table = clustered(
        ask(1, "q", "Yes, it is.", user_id="ada", signals=[{"type": "thumbs_up", "user": "ada"}]),
        ask(2, "q", "yes, it  is.", user_id="ada", at_us=5),
        ask(3, "q", "No.", user_id="ada"),
    )
    kept, dropped = deduplicate(judged(table, [1.0, 0.0, 0.5], [3.0, 1.0, 1.0]), SETTINGS)
    merged = {tuple(row["interaction_ids"]): row for row in kept.to_pylist()}
    assert set(merged) == {("i1", "i2"), ("i3",)}
    assert merged["i1", "i2"]["score"] == 0.75 and merged["i1", "i2"]["explicit"] == 0.5
    assert merged["i1", "i2"]["weight"] == 4.0
    assert merged["i1", "i2"]["signals"] == to_json([{"type": "thumbs_up", "user": "ada"}])
    assert dropped == {"exact duplicate": 1}


def test_near_equal_answers_are_dropped_unless_one_is_good_and_one_bad() -> None:
    words = prose(random.Random(4))
    near = " ".join([*words[:20], "other", *words[21:]])
    table = clustered(ask(1, "q", " ".join(words)), ask(2, "q", near), ask(3, "q", "entirely different"))
    kept, dropped = deduplicate(judged(table, [0.9, 0.85, 0.9]), SETTINGS)
    assert sorted(kept["interaction_id"].to_pylist()) == ["i1", "i3"] and dropped == {"near duplicate": 1}
    assert len(deduplicate(judged(table, [0.9, 0.1, 0.9]), SETTINGS)[0]) == 3


@given(st.lists(st.text(st.characters(max_codepoint=127)), min_size=1))
def test_words_of_ascii_text_do_not_depend_on_its_neighbours(found: list[str]) -> None:
    alone = shingle_sets(shingle(pa.array(found), 3))
    beside = shingle_sets(shingle(pa.array([*found, "é"]), 3))
    assert alone == beside[:-1]
    sliced = shingle_sets(shingle(pa.array(["x y", *found]).slice(1), 3))
    assert alone == sliced
