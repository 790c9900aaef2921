"""Rows of a key meet in one block, and near duplicates found in parts are those found in one table."""

import random
import time

import numpy as np
import pyarrow as pa
import pytest
import ray
from ray.experimental import get_object_locations

from cluster.runtime import INLINED_BYTES
from cluster.settings.curation import DeduplicationSettings
from data import exchange, near
from data.dedup import sketch_texts
from data.exchange import Places, Tasks, parts_of
from data.near_parts import edges_in_parts

SETTINGS = DeduplicationSettings()
CPUS = 0.5


def test_a_part_is_the_same_for_equal_keys_and_null_is_a_key() -> None:
    keys = pa.chunked_array([["a", None, "b"], ["a", None]], pa.string())
    parts = parts_of(keys, 7).tolist()
    assert parts[0] == parts[3] and parts[1] == parts[4] and set(parts) <= set(range(7))
    numbers = pa.chunked_array([[2**64 - 1, None, 5, 2**64 - 1]], pa.uint64())
    assert parts_of(numbers, 7).tolist()[0] == parts_of(numbers, 7).tolist()[3]
    spread = np.bincount(parts_of(pa.chunked_array([[f"user{n}" for n in range(7000)]]), 7), minlength=7)
    assert spread.min() > 800


@pytest.mark.ray
@pytest.mark.parametrize("parts", [1, 2, 5])
def test_exchange_keeps_every_row_and_brings_a_key_together(ray_session: None, parts: int) -> None:
    rows = [{"key": None if n % 11 == 0 else f"k{n % 13}", "n": n} for n in range(200)]
    blocks = [ray.put(pa.Table.from_pylist(rows[at : at + 50])) for at in range(0, 200, 50)]
    blocks.append(ray.put(pa.table({})))
    found = ray.get(Tasks(CPUS, parts).exchange(blocks, "key"))
    assert len(found) == parts
    assert sorted(n for table in found for n in table["n"].to_pylist()) == list(range(200))
    homes = [set(table["key"].to_pylist()) for table in found]
    assert sum(map(len, homes)) == len(set().union(*homes)) == 14


@pytest.mark.ray
@pytest.mark.parametrize("parts", [1, 3])
def test_functions_before_and_after_an_exchange_have_no_task_of_their_own(ray_session: None, parts: int) -> None:
    def numbers(first: int, more: int) -> pa.Table:
        return pa.table({"key": [n % 4 for n in range(first, first + more)], "n": list(range(first, first + more))})

    def sums(table: pa.Table) -> pa.Table:
        return table.group_by("key").aggregate([("n", "sum")])

    tasks, ten = Tasks(CPUS, parts), ray.put(10)
    found = ray.get(tasks.exchange([0, 10, 20], "key", ten, before=numbers))
    assert sorted(n for table in found for n in table["n"].to_pylist()) == list(range(30))
    homes = [set(table["key"].to_pylist()) for table in found]
    assert sum(map(len, homes)) == len(set().union(*homes)) == 4
    summed = ray.get(tasks.exchange([0, 10, 20], "key", ten, before=numbers, after=sums))
    totals = {row["key"]: row["n_sum"] for table in summed for row in table.to_pylist()}
    assert totals == {key: sum(range(key, 30, 4)) for key in range(4)}
    assert sum(map(len, summed)) == 4


@pytest.mark.ray
@pytest.mark.parametrize(("blocks", "parts"), [(1, 1), (4, 3), (10, 1), (10, 7), (7, 16), (1, 17)])
def test_exchange_in_two_rounds_is_that_in_one(
    ray_session: None, blocks: int, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rows(first: int) -> pa.Table:
        numbers = range(first, first + 40)
        return pa.table({"part": [n * 7 % parts for n in numbers], "n": list(numbers)})

    def place(table: pa.Table) -> Places:
        return table["part"].to_numpy()

    def ordered(table: pa.Table) -> pa.Table:
        return table.sort_by("n")

    firsts = list(range(0, 40 * blocks, 40))
    made = []
    for most in (1000, 1):
        monkeypatch.setattr(exchange, "MOST_PIECES", most)
        made.append(ray.get(Tasks(CPUS, 99).dealt(firsts, place, parts, before=rows, after=ordered)))
    once, twice = ([table.to_pydict() for table in tables] for tables in made)
    assert twice == once and len(once) == parts
    everything = [n * 7 % parts for n in range(40 * blocks)]
    for part, table in enumerate(once):
        assert table["n"] == [n for n, given in enumerate(everything) if given == part]


@pytest.mark.ray
def test_small_pieces_stay_off_the_heap_of_the_driver(ray_session: None) -> None:
    """Pieces of 40 kB, which Ray would send in its answers up to ten million bytes a task."""
    pieces = ray.remote(lambda: [bytes(40_000)] * 20).options(num_cpus=CPUS, num_returns=20).remote()

    def in_answer() -> int:
        places = get_object_locations(pieces)
        return sum(not places[piece]["node_ids"] for piece in pieces)

    deadline = time.monotonic() + 20  # where an object lies is known some time after the object
    while in_answer() > INLINED_BYTES // 40_000 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert in_answer() <= INLINED_BYTES // 40_000


def edited(rng: random.Random, text: str) -> str:
    words = text.split()
    words[rng.randrange(len(words))] = "other"
    return " ".join(words)


@pytest.mark.ray
@pytest.mark.parametrize("parts", [1, 3])
def test_edges_found_in_parts_are_those_found_in_one_table(ray_session: None, parts: int) -> None:
    rng = random.Random(4)
    texts = [" ".join(f"w{rng.randrange(500)}" for _ in range(60)) for _ in range(60)]
    texts += [edited(rng, rng.choice(texts[:20])) for _ in range(40)]
    ids = np.arange(1, len(texts) + 1, dtype=np.uint64)
    sketches = sketch_texts(texts, ids, ids, np.zeros(len(texts), np.uint64), SETTINGS)
    whole = near.near_edges(sketches, SETTINGS).to_pylist()
    blocks = [ray.put(sketches.slice(at, 25).combine_chunks()) for at in range(0, 100, 25)]
    edges = ray.get(edges_in_parts(blocks, SETTINGS, Tasks(CPUS, parts)))
    assert sorted((e["left"], e["right"]) for table in edges for e in table.to_pylist()) == [
        (e["left"], e["right"]) for e in whole
    ]
    assert len(whole) >= 40


def test_a_text_of_one_key_only_is_no_candidate() -> None:
    keys = pa.table([[1, 1, 2, 3, 3, 3], [7, 8, 9, 4, 4, 6]], schema=near.KEYS)
    pairs = near.candidate_pairs(keys, SETTINGS)
    assert pairs.to_pylist() == [{"left": 4, "right": 6}, {"left": 7, "right": 8}]
    groups = near.candidate_groups(pairs)
    assert groups.to_pylist() == [
        {"text": 4, "group": 4},
        {"text": 6, "group": 4},
        {"text": 7, "group": 7},
        {"text": 8, "group": 7},
    ]


@pytest.mark.ray
def test_each_resolves_what_blocks_share(ray_session: None) -> None:
    blocks = [ray.put(pa.table({"n": [n]})) for n in (1, 2)]
    shared = ray.put(10)
    assert ray.get(Tasks(CPUS, 1).each(blocks, added, shared)) == [11, 12]


def added(table: pa.Table, more: int) -> int:
    return int(table["n"][0].as_py()) + more
