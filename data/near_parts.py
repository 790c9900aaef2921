"""The near duplicates among blocks of sketches, by tasks: keys travel first, and a sketch once, if at all."""

from functools import partial
from typing import Any

import pyarrow as pa

from cluster.settings.curation import DeduplicationSettings
from data import near
from data.exchange import Blocks, each, exchange, gathered, zipped
from data.minhash import U64


def clusters_of(
    sketches: Blocks, tested_nodes: U64, settings: DeduplicationSettings, parts: int, num_cpus: float
) -> Any:
    """A reference to the `Clusters` of all sketches; `tested_nodes` are those of earlier test items."""
    edges = edges_in_parts(sketches, settings, parts, num_cpus)
    return gathered(edges, partial(_find, tested_nodes), num_cpus)


def edges_in_parts(sketches: Blocks, settings: DeduplicationSettings, parts: int, num_cpus: float) -> list[Any]:
    """References to what `near.near_edges` finds where all sketches are in one table."""
    keys = exchange(each(sketches, near.keys_of, settings, num_cpus=num_cpus), "band", parts, num_cpus)
    pairs = each(keys, near.candidate_pairs, settings, num_cpus=num_cpus)
    groups = gathered(pairs, near.candidate_groups, num_cpus)
    grouped = each(sketches, near.sketches_with_group, groups, num_cpus=num_cpus)
    asked = each(pairs, near.pairs_with_group, groups, num_cpus=num_cpus)
    return zipped(
        exchange(grouped, "group", parts, num_cpus),
        exchange(asked, "group", parts, num_cpus),
        function=partial(near.edges_of, settings=settings),
        num_cpus=num_cpus,
    )


def _find(tested_nodes: U64, *edges: pa.Table) -> near.Clusters:
    return near.find_clusters(pa.concat_tables(edges), tested_nodes)
