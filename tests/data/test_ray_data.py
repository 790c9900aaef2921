"""Ray Data's stages on blocks that are there."""

from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa
import pytest
import ray

from data.ray_data import map_blocks, quiet_ray_data

FREE = 0.5


@contextmanager
def cpus_taken(number: float) -> Iterator[None]:
    """So many CPUs of the session are somebody else's, as they are beside Serve."""

    class Busy:
        def ready(self) -> bool:
            return True

    actor = ray.remote(num_cpus=number)(Busy).remote()
    assert ray.get(actor.ready.remote())
    try:
        yield
    finally:
        ray.kill(actor)


@pytest.mark.ray
def test_blocks_are_mapped_in_order_where_no_whole_cpu_is_free(ray_session: None) -> None:
    def doubled(table: pa.Table) -> pa.Table:
        rows = [{"n": 2 * n, "text": text} for n, text in zip(*table.to_pydict().values(), strict=True)]
        return pa.Table.from_pylist([row for row in rows if row["n"] != 2], table.schema)

    blocks = [ray.put(pa.table({"n": [n], "text": ["long" * 50_000 * n]})) for n in range(4)]
    with cpus_taken(ray.cluster_resources()["CPU"] - FREE), quiet_ray_data():
        found = ray.get(map_blocks(blocks, doubled, FREE))
    assert [table["n"].to_pylist() for table in found] == [[0], [4], [6]]
    assert map_blocks([], doubled, FREE) == []
