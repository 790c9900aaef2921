"""Curation reads sealed days from Parquet and the rest from the database, each event once."""

from pathlib import Path

import pytest
from sqlalchemy.engine import Engine

from cluster.clock import DAY_US
from cluster.settings import Settings, load_settings
from data.log import EventLog
from data.partitions.partition import read_partitions
from data.seal import seal
from data.source import Block, describe_sources, plan_blocks, read_block
from tests.data.days import AFTER_US, asked, said, three_days


@pytest.fixture
def settings(tmp_path: Path, database: Engine) -> Settings:
    url = database.url.render_as_string(hide_password=False)
    options = {"page_events": 9, "keep_days": 0, "partition_events": 25}
    return load_settings(home=tmp_path / "home", database={"url": url}, seal=options)[0]


def rows(engine: Engine, settings: Settings, parallelism: int | None) -> list[dict[str, object]]:
    blocks = plan_blocks(engine, EventLog(engine).last_seq(), 20, parallelism)
    assert parallelism is None or len(blocks) == parallelism
    found = [row for block in blocks for row in read_block(settings, block).to_pylist()]
    return sorted(found, key=lambda row: str(row["event_id"]))


def test_blocks_cover_an_open_log_without_overlap(database: Engine) -> None:
    def spans(last: int, per_block: int, parallelism: int | None) -> list[tuple[int, int]]:
        return [(b.after, b.last) for b in plan_blocks(database, last, per_block, parallelism)]

    assert spans(10, 4, None) == [(0, 3), (3, 6), (6, 10)]
    assert spans(10, 100, 2) == [(0, 5), (5, 10)]
    assert spans(1, 100, 8) == [(0, 1)]


@pytest.mark.parametrize("parallelism", [None, 1, 3])
def test_sealed_and_open_events_give_the_rows_of_the_open_log(
    database: Engine, settings: Settings, parallelism: int | None
) -> None:
    three_days(database)
    EventLog(database).append([asked("today", 3), said("f", 3, about="today")])
    before = rows(database, settings, parallelism)
    assert len(before) == 62
    assert seal(database, settings, AFTER_US).bodies_left == 60
    EventLog(database).append([said("late", 1)])
    seal(database, settings, AFTER_US + DAY_US)
    after = rows(database, settings, parallelism)
    assert [row for row in after if row["event_id"] != "late"] == before
    assert sum(row["event_id"] == "late" for row in after) == 1


def test_sources_name_each_sealed_partition_with_its_hashes_and_the_tail(database: Engine, settings: Settings) -> None:
    three_days(database)
    seal(database, settings, AFTER_US)
    EventLog(database).append([asked("today", 3), said("f", 3, about="today")])
    last = EventLog(database).last_seq()
    found = describe_sources(database, plan_blocks(database, last, 20, 3))
    with database.connect() as connection:
        sealed = read_partitions(connection)
    assert [(p["name"], p["sha256"], p["root"]) for p in found["partitions"]] == [
        (p.name, p.sha256, p.root) for p in sealed
    ]
    assert sum(p["num_events"] for p in found["partitions"]) == 60
    assert found["tail"] == {"first_seq": max(p.upto_seq for p in sealed) + 1, "last_seq": last}


def test_block_survives_its_way_through_ray() -> None:
    block = Block(((0, "2024-10-04"), (25, "2024-10-05")), 60, 71)
    assert Block.from_json(block.to_json()) == block
