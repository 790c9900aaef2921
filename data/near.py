"""Near duplicates by MinHash LSH: texts that share a band key are candidates, those whose sketches agree are joined.

Keys travel first, sixteen bytes each. Only texts that share one with another need their sketch compared, and it
travels once: to where the other texts of its group of candidates are. What is connected in the end is a cluster.

Source: Leskovec, Rajaraman and Ullman, "Mining of Massive Datasets", chapter 3, http://www.mmds.org
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cluster.settings.curation import DeduplicationSettings
from data.minhash import U64, band_keys, similarity

I64 = NDArray[np.int64]
SLOTS_PER_KEY = 8
KEYS = pa.schema([("band", pa.uint64()), ("text", pa.uint64())])
"""A text under one of its band keys."""
PAIRS = pa.schema([("left", pa.uint64()), ("right", pa.uint64())])
"""Two texts that share a band key, or two nodes that are near duplicates; the lesser first."""
GROUPS = pa.schema([("text", pa.uint64()), ("group", pa.uint64())])
"""Texts that are candidates, sorted, each with the least text of those it is connected with."""
SKETCHES = pa.schema([("text", pa.uint64()), ("node", pa.uint64()), ("salt", pa.uint64()), ("sketch", pa.binary())])
"""A text's sketch (uint32 values), the question it belongs to, and what it shares a key with texts of."""


def near_edges(sketches: pa.Table, settings: DeduplicationSettings) -> pa.Table:
    """Rows of `PAIRS`: the nodes that are near duplicates, where all sketches are in one table."""
    pairs = candidate_pairs(keys_of(sketches, settings), settings)
    return edges_of(sketches, pairs, settings)


def keys_of(sketches: pa.Table, settings: DeduplicationSettings) -> pa.Table:
    """Rows of `KEYS`: each text once a band."""
    keys = band_keys(_matrix(sketches["sketch"], settings), settings.bands, sketches["salt"].to_numpy())
    return pa.table([keys.ravel(), np.repeat(sketches["text"].to_numpy(), settings.bands)], schema=KEYS)


def candidate_pairs(keys: pa.Table, settings: DeduplicationSettings) -> pa.Table:
    """Rows of `PAIRS`: texts that share a key, each pair once. Needs all rows of a key.

    A bucket of more than `bucket_pairs` texts is compared along a chain and with its first text, so that a
    popular text costs no square.
    """
    band, text = keys["band"].to_numpy(), keys["text"].to_numpy()
    shared = _shared(band)
    band, text = band[shared], text[shared]
    order = np.lexsort((text, band))
    band, text = band[order], text[order]
    fresh = np.ones(len(band), dtype=bool)
    fresh[1:] = (np.diff(band) != 0) | (np.diff(text) != 0)
    band, text = band[fresh], text[fresh]
    left, right = _candidates(band, settings.bucket_pairs)
    return _distinct_pairs(text[left], text[right])


def candidate_groups(*pairs: pa.Table) -> pa.Table:
    """Rows of `GROUPS`: which candidates must meet to be compared."""
    texts, group = _components(pa.concat_tables([PAIRS.empty_table(), *pairs]))
    return pa.table([texts, group], schema=GROUPS)


def pairs_with_group(pairs: pa.Table, groups: pa.Table) -> pa.Table:
    """Rows of `PAIRS` with their `group`."""
    return pairs.append_column("group", pa.array(_group_of(pairs["left"].to_numpy(), groups)[0]))


def sketches_with_group(sketches: pa.Table, groups: pa.Table) -> pa.Table:
    """The sketches of candidates, with their `group`."""
    group, known = _group_of(sketches["text"].to_numpy(), groups)
    return sketches.filter(pa.array(known)).append_column("group", pa.array(group[known]))


def edges_of(sketches: pa.Table, pairs: pa.Table, settings: DeduplicationSettings) -> pa.Table:
    """Rows of `PAIRS`: nodes of which two texts are near duplicates. Needs the sketches of all texts of `pairs`."""
    text, first = np.unique(sketches["text"].to_numpy(), return_index=True)
    node = sketches["node"].to_numpy()[first]
    pairs = _distinct_pairs(pairs["left"].to_numpy(), pairs["right"].to_numpy())
    left, right = (first_place(text, pairs[name].to_numpy()) for name in ("left", "right"))
    different = node[left] != node[right]
    left, right = left[different], right[different]
    matrix = _matrix(sketches["sketch"], settings)
    estimate = similarity(_low_bytes(matrix, first[left]), _low_bytes(matrix, first[right]))
    alike = estimate >= settings.threshold - settings.margin
    return _distinct_pairs(node[left[alike]], node[right[alike]])


def first_place(values: U64, wanted: U64) -> I64:
    """Where each wanted value stands among sorted ones that hold them all."""
    return np.searchsorted(values, wanted).astype(np.int64)


def _group_of(texts: U64, groups: pa.Table) -> tuple[U64, NDArray[np.bool_]]:
    known, group = groups["text"].to_numpy(), groups["group"].to_numpy()
    if not len(known):
        return np.zeros(len(texts), np.uint64), np.zeros(len(texts), bool)
    place = np.minimum(np.searchsorted(known, texts), len(known) - 1)
    return group[place], known[place] == texts


def _low_bytes(matrix: NDArray[np.uint32], rows: I64) -> NDArray[np.uint8]:
    return matrix[rows].astype(np.uint8)


def _shared(keys: U64) -> I64:
    """Indexes of all keys that occur more than once, and of a few others: most keys are alone, and to sort bare numbers
    takes a fraction of what it takes to sort their places."""
    ordered = np.sort(keys)
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    slots = np.uint64((1 << int(len(keys) * SLOTS_PER_KEY).bit_length()) - 1)
    taken = np.zeros(int(slots) + 1, bool)
    taken[(twice & slots).astype(np.int64)] = True
    return np.flatnonzero(taken[(keys & slots).astype(np.int64)])


def _distinct_pairs(one: U64, other: U64) -> pa.Table:
    """Rows of `PAIRS`, each once, sorted."""
    left, right = np.minimum(one, other), np.maximum(one, other)
    order = np.lexsort((right, left))
    left, right = left[order], right[order]
    fresh = np.ones(len(left), dtype=bool)
    fresh[1:] = (np.diff(left) != 0) | (np.diff(right) != 0)
    return pa.table([left[fresh], right[fresh]], schema=PAIRS)


def _candidates(keys: U64, most: int) -> tuple[I64, I64]:
    """Index pairs within runs of equal keys: all pairs of a short run, chain and star of a long one."""
    starts = np.flatnonzero(np.concatenate([[True], np.diff(keys) != 0])) if len(keys) else np.zeros(0, np.int64)
    sizes = np.diff(np.append(starts, len(keys)))
    lefts, rights = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for size in np.unique(sizes[sizes > 1]):
        begin = starts[sizes == size]
        if size <= most:
            i, j = np.triu_indices(size, 1)
        else:
            rest = np.arange(1, size)
            i, j = np.concatenate([rest - 1, np.zeros(size - 1, np.int64)]), np.concatenate([rest, rest])
        lefts.append((begin[:, None] + i[None, :]).ravel())
        rights.append((begin[:, None] + j[None, :]).ravel())
    return np.concatenate(lefts), np.concatenate(rights)


@dataclass(frozen=True)
class Clusters:
    """Clusters of more than one node, and nodes that are or were test items; the rest stand alone."""

    nodes: U64
    """Sorted."""
    clusters: U64
    """The least node of each one's cluster."""
    tested: U64
    """Clusters that hold a test item of an earlier dataset, sorted."""


def find_clusters(edges: pa.Table, tested_nodes: U64) -> Clusters:
    """Connected components of the edges: `tested_nodes` are those of earlier test items."""
    nodes, clusters = _components(edges)
    found = Clusters(nodes, clusters, np.zeros(0, np.uint64))
    return Clusters(nodes, clusters, np.unique(cluster_of(tested_nodes, found)))


def _components(edges: pa.Table) -> tuple[U64, U64]:
    """The sorted ends of the edges, and for each the least it is connected with."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    left, right = edges["left"].to_numpy(), edges["right"].to_numpy()
    ends, index = np.unique(np.concatenate([left, right]).astype(np.uint64), return_inverse=True)
    i, j = np.split(index, 2)
    graph = coo_array((np.ones(len(i), dtype=np.int8), (i, j)), shape=(len(ends), len(ends)))
    count, component = connected_components(graph, directed=False)
    least = np.full(count, np.iinfo(np.uint64).max, dtype=np.uint64)
    np.minimum.at(least, component, ends)
    return ends, least[component]


def cluster_of(nodes: U64, clusters: Clusters) -> U64:
    """The cluster of each node; a node alone is its own."""
    if not len(clusters.nodes) or not len(nodes):
        return nodes.astype(np.uint64)
    place = np.minimum(np.searchsorted(clusters.nodes, nodes), len(clusters.nodes) - 1)
    known = clusters.nodes[place] == nodes
    return np.where(known, clusters.clusters[place], nodes).astype(np.uint64)


def _matrix(column: pa.ChunkedArray, settings: DeduplicationSettings) -> NDArray[np.uint32]:
    """Sketches of equal length as a matrix, without a copy where they lie in one piece."""
    width = settings.bands * settings.rows_per_band
    parts: list[Any] = []
    for chunk in column.chunks:
        if len(chunk):
            begin = int(np.frombuffer(chunk.buffers()[1], np.int32, len(chunk) + chunk.offset)[chunk.offset])
            parts.append(np.frombuffer(chunk.buffers()[2], np.uint32, len(chunk) * width, begin))
    joined = parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, np.uint32), *parts])
    return joined.reshape(len(column), width)
