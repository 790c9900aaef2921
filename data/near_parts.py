"""The near duplicates among blocks of sketches, by tasks: keys travel first, and a sketch once, if at all."""

from functools import partial
from typing import Any

import pyarrow as pa

from cluster.settings.curation import DeduplicationSettings
from data import near
from data.exchange import Blocks, Tasks
from data.minhash import U64


def clusters_of(sketches: Blocks, tested_nodes: U64, settings: DeduplicationSettings, tasks: Tasks) -> Any:
    """A reference to the `Clusters` of all sketches; `tested_nodes` are those of earlier test items."""
    return tasks.gathered(edges_in_parts(sketches, settings, tasks), partial(_find, tested_nodes))


def edges_in_parts(sketches: Blocks, settings: DeduplicationSettings, tasks: Tasks) -> list[Any]:
    """References to what `near.near_edges` finds where all sketches are in one table."""
    keys, found = (partial(f, settings=settings) for f in (near.keys_of, near.candidate_pairs))
    pairs = tasks.exchange(sketches, "band", before=keys, after=found)
    groups = tasks.gathered(pairs, near.candidate_groups)
    return tasks.zipped(
        tasks.exchange(sketches, "group", groups, before=near.sketches_with_group),
        tasks.exchange(pairs, "group", groups, before=near.pairs_with_group),
        function=partial(near.edges_of, settings=settings),
    )


def _find(tested_nodes: U64, *edges: pa.Table) -> near.Clusters:
    return near.find_clusters(pa.concat_tables(edges), tested_nodes)
